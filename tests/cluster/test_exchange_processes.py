"""The exchange among real processes: sums, and every way in which a process can go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("exchange_worker.py")
PATIENCE_S = 90.0


class Rank:
    """A worker process and the JSON lines that it prints."""

    def __init__(
        self, worker: Path, rank: int, nodes: int, scenario: str, deadline_s: float
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(nodes), str(deadline_s), scenario],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # A worker that hangs is ended, so that reading its output ends too.
        self._watchdog = threading.Timer(PATIENCE_S, self.process.kill)
        self._watchdog.start()

    def read(self, key: str) -> dict[str, Any]:
        """The next line that has `key`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said: dict[str, Any] = json.loads(line)
            if key in said:
                return said
        raise AssertionError(f"ended ({self.process.wait()}) without saying {key}")

    def tell(self, what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.communicate()


class Ranks:
    """The ranks of one test, which run the script `worker`, and where rank 0 listens."""

    def __init__(self, worker: Path) -> None:
        self._worker = worker
        self.all: list[Rank] = []
        self.ports: list[tuple[int, int]] = []

    def start(self, nodes: int, scenario: str, deadline_s: float = 60.0) -> list[Rank]:
        self.all = [Rank(self._worker, rank, nodes, scenario, deadline_s) for rank in range(nodes)]
        for rank in self.all:
            said = rank.read("data")
            self.ports.append((said["data"], said["control"]))
        for rank in self.all:
            rank.tell(self.ports)
        return self.all


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    started = Ranks(WORKER)
    yield started
    for rank in started.all:
        rank.end()


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_all_ranks_hold_the_same_bits(ranks: Ranks, nodes: int) -> None:
    results = [rank.read("digest") for rank in ranks.start(nodes, "sums")]
    assert len({result["digest"] for result in results}) == 1
    for result in results:
        assert result["stats"]["exchanges"] == 100
    assert all(rank.process.wait(PATIENCE_S) == 0 for rank in ranks.all)


def test_a_killed_process_is_named_by_all_others(ranks: Ranks) -> None:
    first, victim, third = ranks.start(3, "forever")
    for rank in ranks.all:
        rank.read("running")
    victim.process.kill()
    for rank in (first, third):
        said = rank.read("error")
        assert said["rank"] == 1
        assert said["step"] >= 0 and said["layer"] in (0, 1)
        assert "rank 1 was lost at layer" in said["error"]
        assert rank.process.wait(PATIENCE_S) == 1


def test_a_stopped_process_misses_the_deadline(ranks: Ranks) -> None:
    first, victim = ranks.start(2, "forever", deadline_s=0.5)
    for rank in ranks.all:
        rank.read("running")
    os.kill(victim.process.pid, signal.SIGSTOP)
    assert "rank 1 sent nothing within 0.5 s" in first.read("error")["error"]


def test_a_stopped_process_is_noticed_by_heartbeats(ranks: Ranks) -> None:
    """As when a host hangs: its connections stand, but nothing answers."""
    first, victim = ranks.start(2, "forever")
    for rank in ranks.all:
        rank.read("running")
    os.kill(victim.process.pid, signal.SIGSTOP)
    assert "rank 1 was lost" in first.read("error")["error"]


def test_ctrl_c_ends_a_blocked_exchange(ranks: Ranks) -> None:
    first, silent = ranks.start(2, "silent")
    silent.read("running")
    first.process.send_signal(signal.SIGINT)
    assert first.read("error")["error"] == "interrupted"
    assert first.process.wait(PATIENCE_S) == 130


def test_garbage_at_the_ports_does_no_harm(ranks: Ranks) -> None:
    nodes = ranks.start(2, "forever")
    for rank in nodes:
        rank.read("running")
    greeting = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL".ljust(66, b"\0")
    for port in ranks.ports[0]:
        for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), greeting, greeting * 50, b""):
            with socket.create_connection(("127.0.0.1", port), 10) as stranger:
                stranger.sendall(data)
    nodes[1].process.kill()  # what ends the run is this, not the garbage
    assert "rank 1 was lost" in nodes[0].read("error")["error"]
