"""What is shipped: an sdist, and a wheel built from it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check_wheel(wheel: Path) -> None:
    """It is for every Python from the oldest on; it holds the model, the types and the compiled
    module, and no more.
    """
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = requires.removeprefix(">=").replace(".", "")
    assert wheel.name.split("-")[2:4] == [f"cp{oldest}", "abi3"]
    names = zipfile.ZipFile(wheel).namelist()
    assert "zmoe/py.typed" in names
    assert "zmoe/_native.abi3.so" in names
    assert "zmoe/data/zmoe-tiny/model.safetensors" in names
    assert "zmoe/server/page/index.html" in names
    assert not [n for n in names if n.startswith(("tests", "bench", "tools", "csrc"))]
    assert wheel.stat().st_size < 12 << 20


def check_sdist(sdist: Path) -> None:
    """It holds the sources."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "csrc/exchange/exchange.h",
        "csrc/exchange/exchange.c",
        "tools/build_native.py",
        "LICENSE",
    } <= names


def check_runs(wheel: Path, folder: Path) -> None:
    """What it holds runs, without this checkout; .ci/run installs it where nothing else is."""
    zipfile.ZipFile(wheel).extractall(folder / "site")
    command = (
        "import sys, zmoe; assert zmoe.__file__.startswith(sys.argv.pop(1)), zmoe.__file__; "
        "from zmoe.cli.run import main; sys.exit(main())"
    )
    run = subprocess.run(
        [sys.executable, "-c", command, str(folder / "site"), "--nodes", "2", "-m", "4", "ROMEO:"],
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_what_is_shipped(tmp_path: Path) -> None:
    """One test: with pytest-xdist several could each build what they share."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
    check_runs(wheel, tmp_path)
