"""The temporary folder of a calibration: what is left of one that was killed is removed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from zmoe.calibration.scratch import scratch
from zmoe.errors import InputError


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_nothing_is_left_also_after_an_error(parent: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch(1) as folder:
        (folder / "weights").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not list(parent.iterdir())


def test_what_a_killed_one_left_is_removed_by_the_next(parent: Path) -> None:
    program = (
        "import os, signal, sys, tempfile\n"
        "from zmoe.calibration.scratch import scratch\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "with scratch(1) as folder:\n"
        "    (folder / 'weights').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(parent)], timeout=60)
    assert done.returncode == -9
    (left,) = parent.iterdir()
    others = parent / "others"
    others.mkdir()
    with scratch(1) as first, scratch(1) as second:
        assert not left.exists()
        assert first.is_dir()  # it is in use
        assert set(parent.iterdir()) == {first, second, others}


def test_too_little_room_is_said_beforehand(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(parent)._replace(free=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(InputError, match=f"needs 2.0 GB in .*{parent}, which has 1.5 GB left"),
        scratch(2_000_000_000),
    ):
        pass
