"""Worker processes: how they are started, ended, and spoken of afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from zmoe.cluster import launch
from zmoe.cluster.hosts import Host
from zmoe.cluster.launch import NodeProcess, end_all
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import LaunchError

PATIENCE_S = 60.0
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', file=__import__('sys').stderr, flush=True); time.sleep(3600)"
)


def python(code: str) -> NodeProcess:
    return NodeProcess(3, "this machine", [sys.executable, "-c", code], dict(os.environ))


def ended(process: NodeProcess) -> NodeProcess:
    assert process.wait(time.monotonic() + PATIENCE_S)
    return process


@pytest.fixture
def stubborn() -> Iterator[NodeProcess]:
    """A process that SIGTERM does not end, and that says so."""
    process = python(STUBBORN)
    deadline = time.monotonic() + PATIENCE_S
    while not process._tail:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    os.kill(process.pid, signal.SIGKILL)
    ended(process).close()


def test_a_process_that_even_sigkill_does_not_end_is_named_and_left(
    stubborn: NodeProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one in an uninterruptible sleep is: here SIGKILL never comes."""
    monkeypatch.setattr(launch, "END_GRACE_S", 0.01)
    monkeypatch.setattr(launch, "KILL_GRACE_S", 0.01)
    monkeypatch.setattr(NodeProcess, "kill", lambda self: None)
    end_all([stubborn])
    assert f"node 3 on this machine (pid {stubborn.pid}) has not ended" in caplog.text


def test_how_a_process_ended_is_told() -> None:
    killed = python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    words = f"on this machine (pid {killed.pid}) was killed by SIGSEGV"
    assert ended(killed).ending() == words
    speaking = python("import sys; sys.exit('out of ideas')")
    assert ended(speaking).ending() == "on this machine ended: out of ideas"
    silent = python("import sys; sys.exit(7)")
    assert ended(silent).ending() == "on this machine ended: exit code 7"
    end_all([killed, speaking, silent])


def test_a_process_that_cannot_be_watched_is_not_left_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Watched(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(LaunchError, match="cannot start node 3 on this machine: can't start"):
        python("import time; time.sleep(3600)")
    (process,) = started
    assert process.returncode == -signal.SIGKILL


def test_a_worker_waits_longer_for_its_leader_than_the_leader_for_it() -> None:
    commands: list[Sequence[str]] = []

    def start(rank: int, name: str, command: Sequence[str], *told: Any) -> Any:
        commands.append(command)

    launch.start_local("127.0.0.1:1", 1, "127.0.0.1", None, 900.0, "t", start=start)
    host, remote = Host("b", "10.0.0.2"), RemoteOptions("python3")
    launch.start_over_ssh("10.0.0.1:1", 1, host, remote, 900.0, "t", start=start)
    local, ssh = (" ".join(command) for command in commands)
    assert "--join-timeout 930 " in local
    assert "--join-timeout 930 " in ssh
