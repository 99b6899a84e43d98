"""What a zmoe-node does between its runs, and what it says."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zmoe.cli import node
from zmoe.cluster import worker
from zmoe.errors import InputError, PeerError, ZmoeError

LEADER = "127.0.0.1:9"
SERVE = ["--leader", LEADER, "--rank", "1"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make workers' runs end with the errors given, the last one by Ctrl-C."""
    monkeypatch.setattr(node, "PAUSE_S", 0.0)

    def arrange(*errors: BaseException | None) -> None:
        left: Iterator[BaseException | None] = itertools.chain(errors, [KeyboardInterrupt()])

        class Worker:
            def __init__(self, *_: Any) -> None:
                pass

            def run(self) -> None:
                if (error := next(left)) is not None:
                    raise error

        monkeypatch.setattr(worker, "Worker", Worker)

    return arrange


def serve(*arguments: str) -> None:
    node._serve(node._parser().parse_args([*SERVE, *arguments]))


def test_no_error_of_a_run_ends_a_serving_worker(
    runs: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = (OverflowError, KeyError, RuntimeError, OSError, MemoryError, ZmoeError, TypeError)
    runs(None, *(kind("\x1b[2J of\na run") for kind in kinds), None)
    with pytest.raises(KeyboardInterrupt):
        serve()
    lines = capsys.readouterr().err.splitlines()
    waiting = f"waiting for a leader at {LEADER}"
    assert lines[:2] == [f"zmoe-node[1]: {waiting}", f"zmoe-node[1]: the run is over; {waiting}"]
    for kind, line in zip(kinds, lines[2:-1], strict=True):
        assert "[2J of" in line and line.isprintable() and line.endswith(waiting)
        assert kind is ZmoeError or kind.__name__ in line


def test_what_happens_again_and_again_is_said_once(
    runs: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    runs(*(ZmoeError("rank 1 is taken") for _ in range(9)))
    with pytest.raises(KeyboardInterrupt):
        serve()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_worker_for_one_run_raises_what_ended_it(
    runs: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    runs(PeerError(2, None, 7, "was lost"))
    with pytest.raises(PeerError):
        serve("--once")
    runs(None)
    serve("--once", "--join-timeout", "900")
    with pytest.raises(InputError, match="--join-timeout is for --once"):
        serve("--join-timeout", "900")
    with pytest.raises(InputError, match="bind is 192.0.2.1: this machine does not have"):
        serve("--bind", "192.0.2.1")


def test_the_time_out_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float | None] = []

    class Worker:
        def __init__(self, spec: worker.WorkerSpec, *_: Any) -> None:
            given.append(spec.join_timeout)

        def run(self) -> None:
            pass

    monkeypatch.setattr(worker, "Worker", Worker)
    serve("--once")
    serve("--once", "--join-timeout", "900")
    assert given == [60.0, 900.0]


def test_the_environment_says_what_no_flag_does(
    runs: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZMOE_LEADER", LEADER)
    monkeypatch.setenv("ZMOE_RANK", "7")
    monkeypatch.setenv("SLURM_PROCID", "3")

    def rank(*arguments: str) -> int:
        return node._spec(node._parser().parse_args(arguments)).rank

    assert rank() == 7
    assert rank("--rank-env", "SLURM_PROCID") == 3
    assert rank("--rank", "2") == 2
    runs(None)
    mine, theirs = os.pipe()
    assert node.main(["--once", "--ready-fd", str(theirs)]) == 0
    assert os.read(mine, 99) == b"ready\n"
    assert os.read(mine, 99) == b""
    os.close(mine)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"zmoe-node[7]: waiting for a leader at {LEADER}",
        "zmoe-node[7]: the run is over",
    ]


def test_the_unit_of_systemd_runs_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ZMOE_RANK", "7")
    assert node.main(["--leader", LEADER, "--key", 'a b$c%d"', "--print-unit"]) == 0
    unit = capsys.readouterr().out
    command = '-m zmoe.cli.node --leader 127.0.0.1:9 --key "a b$$c%%d\\""'
    assert f"ExecStart={sys.executable} {command}\n" in unit
    assert "Environment=ZMOE_RANK=7\n" in unit
    if shutil.which("systemd-analyze") is not None:
        (tmp_path / "zmoe-node.service").write_text(unit)
        verify = ["systemd-analyze", "verify", str(tmp_path / "zmoe-node.service")]
        done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "zmoe-node" not in done.stderr, done.stderr
