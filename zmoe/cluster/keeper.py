"""Workers' processes that outlive their leader.

The leader's parent has a Keeper, which owns the processes and lends them to one leader after the
other, each through a pipe of its own. So they end with that parent, however it ends, and the next
leader finds those that the last one has left, at the same port and with the same secrets.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from zmoe.cluster.launch import NodeProcess, OnLine, end_all
from zmoe.errors import LaunchError, ZmoeError
from zmoe.exchange.keys import Pinned

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """How workers reach their leader, and what they show it.

    `port` 0: any. `tokens`: of the workers that it starts. `lines`: the first ones of their
    standard inputs, with their keys where links are encrypted.
    """

    port: int
    tokens: dict[int, str] = field(repr=False)
    keys: Pinned | None
    lines: dict[int, str] = field(repr=False)


class Keeper:
    """Owns the workers of leaders that come one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._access: Access | None = None
        # By rank, with the command and the line that each was started with.
        self._started: dict[int, tuple[object, NodeProcess]] = {}

    def lend(self) -> Connection:
        """The end of a pipe for the next leader's Lender; to be closed here once it has it."""
        ours, theirs = multiprocessing.Pipe()
        threading.Thread(target=self._serve, args=(ours,), daemon=True).start()
        return theirs

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._closed = True
            end_all([process for _, process in self._started.values()])

    def _serve(self, pipe: Connection) -> None:
        """Do what a leader asks for, until it closes the pipe, or ends."""
        with pipe, suppress(EOFError, OSError):
            while True:
                name, arguments = pipe.recv()
                answer: object
                try:
                    answer = getattr(self, f"_do_{name}")(*arguments)
                except ZmoeError as error:
                    answer = error
                pipe.send(answer)

    def _do_access(self) -> Access | None:
        return self._access

    def _do_remember(self, access: Access) -> None:
        self._access = access

    def _do_start(
        self, rank: int, name: str, command: Sequence[str], env: dict[str, str], line: str
    ) -> tuple[int, bool]:
        with self._lock:
            if self._closed:
                raise LaunchError(f"cannot start node {rank}: the server is closing")
            how, process = self._started.get(rank, (None, None))
            if process is not None and process.exit_code() is None and how == (command, line):
                return process.pid, True
            if process is not None:
                end_all([process])
            process = NodeProcess(rank, name, command, env, line)
            self._started[rank] = (command, line), process
            return process.pid, False

    def _do_call(self, rank: int, method: str, *arguments: object) -> object:
        """What a method of the process of `rank` returns."""
        return getattr(self._started[rank][1], method)(*arguments)


class Lender:
    """A leader's side of a Keeper. Once that is gone, nothing more is known of the workers."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    @property
    def access(self) -> Access | None:
        """That of the leader before, None for the first one."""
        first: Access | None = None
        return self.ask(first, "access")

    def remember(self, access: Access) -> None:
        """Tell the next leader."""
        self.ask(None, "remember", access)

    def start(
        self,
        rank: int,
        name: str,
        command: Sequence[str],
        env: dict[str, str],
        line: str,
        on_line: OnLine | None = None,
    ) -> LentProcess:
        """As NodeProcess, unless the leader before has left a process that was started so.

        There is no `on_line`. Raises LaunchError.
        """
        assert on_line is None
        pid, is_left = self.ask((0, False), "start", rank, name, command, env, line)
        return LentProcess(self, rank, name, pid, is_left)

    def ask(self, gone: T, name: str, *arguments: object) -> T:
        """What the Keeper answers; `gone` if there is none. Raises the ZmoeError that it raises."""
        with self._lock:
            try:
                self._pipe.send((name, arguments))
                answer: Any = self._pipe.recv()
            except (EOFError, OSError):
                return gone
            except BaseException:  # its answer would be taken for that to the next question
                self._pipe.close()
                raise
        if isinstance(answer, ZmoeError):
            raise answer
        found: T = answer
        return found


@dataclass(frozen=True)
class LentProcess:
    """A NodeProcess of the Keeper's. `is_left`: the leader before has left it."""

    lender: Lender
    rank: int
    name: str
    pid: int
    is_left: bool

    def exit_code(self) -> int | None:
        """See NodeProcess, as all methods."""
        runs: int | None = None
        return self._call(runs, "exit_code")

    def ending(self) -> str:
        return self._call("has ended", "ending")

    def kill(self) -> None:
        self._call(None, "kill")

    def terminate(self) -> None:
        self._call(None, "terminate")

    def wait(self, deadline: float) -> bool:
        return self._call(True, "wait", deadline)

    def close(self) -> None:
        self._call(None, "close")

    def _call(self, gone: T, method: str, *arguments: object) -> T:
        return self.lender.ask(gone, "call", self.rank, method, *arguments)


Process = NodeProcess | LentProcess  # of a worker, as its leader has it
