"""A transport's processes as bench/exchange.py drives them; protocol in peers/worker.py."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from common import BenchError, Children

from zmoe.topology.cores import divide_cores

START_SECONDS = 60.0
RUN_SECONDS = 150.0  # above the workers' own limit
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Launch:
    """One process to start: its command and what it needs in its environment."""

    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)


class Group:
    """The running ranks of one transport; a context manager that ends them all."""

    def __init__(self, name: str, nodes: int, launches: Callable[[str], list[Launch]]) -> None:
        """Start what `launches(control_path)` names and wait until all ranks are ready.

        Raises BenchError when a process ends, or is not ready within START_SECONDS.
        """
        self.name, self.nodes = name, nodes
        self._stack = ExitStack()
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
            self._log = self._stack.enter_context((folder / "stderr").open("w+b"))
            listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            self._children = self._stack.enter_context(Children())
            listener.bind(str(folder / "control"))
            listener.listen(nodes)
            todo = launches(str(folder / "control"))
            # One share of the cores a rank, as zmoe-run deals them to local nodes.
            shares = divide_cores(nodes) if len(todo) == nodes else None
            for rank, launch in enumerate(todo):
                child = self._children.start(launch.command, stderr=self._log, env=launch.env)
                if shares is not None:
                    os.sched_setaffinity(child.pid, shares[rank])
            self._links: list[socket.socket | None] = [None] * nodes
            self._buffers = [b""] * nodes
            self._greet(listener, time.monotonic() + START_SECONDS)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exc: object) -> None:
        for link in self._links:
            if link is not None:
                link.close()  # the end of the file tells the worker to leave
        self._stack.close()

    def run(self, size: int, iterations: int, warmup: int) -> list[int]:
        """Rank 0's time of each of `iterations` all-reduces of `size` bytes, in ns."""
        self._tell(f"run {size} {iterations} {warmup}\n")
        until = time.monotonic() + RUN_SECONDS
        answers = [self._line(rank, until).split() for rank in range(self.nodes)]
        if any(answer[0] != "done" or len(answer) != 1 + iterations for answer in answers):
            raise self._error("gave a malformed answer")
        return [int(word) for word in answers[0][1:]]

    def _greet(self, listener: socket.socket, until: float) -> None:
        addresses = [""] * self.nodes
        for _ in range(self.nodes):
            link = self._accept(listener, until)
            link.settimeout(POLL_SECONDS)
            words = _read_line(link, self._check(until))[0].split()
            if len(words) != 3 or words[0] != "hello":
                raise self._error("gave a malformed greeting")
            self._links[int(words[1])] = link
            addresses[int(words[1])] = words[2]
        self._tell(f"peers {' '.join(addresses)}\n")
        for rank in range(self.nodes):
            if self._line(rank, until) != "ready":
                raise self._error("is not ready")

    def _accept(self, listener: socket.socket, until: float) -> socket.socket:
        listener.settimeout(POLL_SECONDS)
        check = self._check(until)
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                check()

    def _check(self, until: float) -> Callable[[], None]:
        """What a wait calls now and then: raises when waiting on is vain."""

        def check() -> None:
            if not self._children.alive():
                raise self._error("ended")
            if time.monotonic() > until:
                raise self._error("did not answer in time")

        return check

    def _tell(self, line: str) -> None:
        try:
            for link in self._links:
                assert link is not None
                link.sendall(line.encode())
        except OSError:
            raise self._error("ended") from None

    def _line(self, rank: int, until: float) -> str:
        link = self._links[rank]
        assert link is not None
        line, self._buffers[rank] = _read_line(link, self._check(until), self._buffers[rank])
        if not line:
            raise self._error("ended")
        return line

    def _error(self, what: str) -> BenchError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
        return BenchError(f"a process of {self.name} with {self.nodes} nodes {what}{said}")


def _read_line(
    link: socket.socket, check: Callable[[], None], buffered: bytes = b""
) -> tuple[str, bytes]:
    """The next line ("" at the end of the file) and what came after it."""
    while b"\n" not in buffered:
        try:
            received = link.recv(1 << 16)
        except TimeoutError:
            check()
            continue
        except ConnectionResetError:
            received = b""
        if not received:
            return "", b""
        buffered += received
    line, _, rest = buffered.partition(b"\n")
    return line.decode(), rest
