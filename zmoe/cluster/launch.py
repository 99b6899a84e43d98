"""Starting and ending worker processes, here and over ssh."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from zmoe.cluster.hosts import Host
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import LaunchError

if TYPE_CHECKING:
    from zmoe.cluster.keeper import Process

END_GRACE_S = 2.0  # between TERM and KILL
KILL_GRACE_S = 5.0  # after KILL: a process in an uninterruptible sleep outlives even that
# A worker waits for its leader a little longer than the leader for it, which began to wait
# later and can say who is missing.
JOIN_SLACK_S = 30.0
# Like `python -m zmoe.cli.node`, but for the installed package: a checkout in the
# working directory would otherwise hide it.
_MAIN = (
    "import sys; sys.path = [p for p in sys.path if p]; "
    "from zmoe.cli.{} import main; sys.exit(main())"
)
_LOG = logging.getLogger(__name__)

OnLine = Callable[[int, str], None]  # rank, a line without its end


class NodeProcess:
    """One worker process; keeps the last lines of its standard error."""

    is_left = False  # by a leader before this one

    def __init__(
        self,
        rank: int,
        name: str,
        command: Sequence[str],
        env: dict[str, str],
        line: str | None = None,
        on_line: OnLine | None = None,
    ) -> None:
        """Start `command`; `line` is the first one of its standard input. `on_line` is given
        each line that it prints, from another thread.
        """
        self.rank, self.name, self._on_line = rank, name, on_line
        self._tail: deque[str] = deque(maxlen=20)
        try:
            # A session of its own: Ctrl-C reaches the leader alone, which then ends us.
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,  # closes when we end, however: the worker then ends too
                stdout=subprocess.DEVNULL if on_line is None else subprocess.PIPE,
                stderr=subprocess.PIPE if on_line is None else subprocess.STDOUT,
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start node {rank} on {name}: {command[0]}: {error.strerror}"
            ) from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            self._reader.start()
        except BaseException as error:  # no more threads, or Ctrl-C: nobody would know of it
            self._process.kill()
            self._process.wait(KILL_GRACE_S)
            if isinstance(error, RuntimeError):
                raise LaunchError(f"cannot start node {rank} on {name}: {error}") from error
            raise
        if line is not None:
            assert self._process.stdin is not None
            with suppress(OSError):  # it has ended, which is noticed elsewhere
                os.write(self._process.stdin.fileno(), line.encode() + b"\n")

    def _read(self) -> None:
        lines = self._process.stderr or self._process.stdout
        assert lines is not None
        for line in lines:
            if self._on_line is not None:
                self._on_line(self.rank, line.rstrip("\n"))
            if line.strip():
                self._tail.append(line.rstrip())

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def ending(self) -> str:
        """Where it ran, how it ended and what it said last; call after it ended."""
        code = self._process.returncode
        assert code is not None
        self._reader.join(timeout=1.0)
        words = self._tail[-1] if self._tail else ""
        if code < 0:
            killed = f"on {self.name} (pid {self.pid}) was killed by {_signal_name(-code)}"
            return f"{killed}, having said: {words}" if words else killed
        return f"on {self.name} ended: {words or f'exit code {code}'}"

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, deadline: float) -> bool:
        """Whether it has ended, at the latest at `deadline` (monotonic)."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Close its standard input, and stop listening to it; call after it ended."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._reader.join(timeout=1.0)


# Makes a process of the arguments that NodeProcess takes.
Start = Callable[[int, str, Sequence[str], dict[str, str], str, OnLine | None], "Process"]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_all(processes: Sequence[Process], patience: float = 0.0) -> None:
    """End every process: let them go by themselves for `patience` s, then TERM, then KILL.

    What outlives that by KILL_GRACE_S is named in a warning of this module's logger.
    """
    try:
        _wait(processes, patience)
        for process in processes:
            process.terminate()
        _wait(processes, END_GRACE_S)
    finally:  # a second Ctrl-C: no more patience
        for process in processes:
            process.kill()
    for process in _wait(processes, KILL_GRACE_S):
        _LOG.warning(
            "zmoe: node %d on %s (pid %d) has not ended within %g s of SIGKILL",
            process.rank,
            process.name,
            process.pid,
            KILL_GRACE_S,
        )
    for process in processes:
        process.close()


def _wait(processes: Sequence[Process], timeout: float) -> list[Process]:
    """Those of `processes` that have not ended within `timeout` s."""
    deadline = time.monotonic() + timeout
    return [process for process in processes if not process.wait(deadline)]


def _node_arguments(
    leader: str,
    rank: int,
    bind: str,
    join_timeout: float,
    program: Sequence[str],
    cores: Sequence[int] | None = None,
) -> list[str]:
    command = "launch" if program else "node"
    arguments = ["--tied", "--join-timeout", f"{join_timeout + JOIN_SLACK_S:g}"]
    if not program:
        arguments.insert(0, "--once")
    if cores is not None:
        arguments += ["--cores", ",".join(map(str, cores))]
    place = _place_arguments(leader, rank, bind)
    return ["-c", _MAIN.format(command), *arguments, *place, *program]


def _place_arguments(leader: str, rank: int, bind: str) -> list[str]:
    return ["--leader", leader, "--bind", bind, "--rank", str(rank)]


def ask_for_nodes(commands: Sequence[str]) -> str:
    """What to tell whoever is to start the nodes by hand."""
    return "\n".join(("waiting for nodes; start each on its machine:", *commands))


def command_by_hand(
    leader: str, rank: int, bind: str, more: Sequence[str], program: Sequence[str] = ()
) -> str:
    """What a user types to start node `rank`, which listens at `bind`, with `more` flags;
    `program` as in Crew.
    """
    command = "zmoe-launch" if program else "zmoe-node"
    return shlex.join([command, *_place_arguments(leader, rank, bind), *more, *program])


def start_local(
    leader: str,
    rank: int,
    bind: str,
    cores: Sequence[int] | None,
    join_timeout: float,
    line: str,
    program: Sequence[str] = (),
    on_line: OnLine | None = None,
    start: Start = NodeProcess,
) -> Process:
    """A worker on this machine, on the given cores when the system can pin.

    `join_timeout`: seconds that the leader at `leader` waits for it. `line`: the token by
    which the leader knows it, and where links are encrypted its secret key and the leader's
    public one; no argument holds them, since everybody can read those. `program`, `on_line`: as
    in Crew. `start`: what makes the process of its command.
    """
    arguments = _node_arguments(leader, rank, bind, join_timeout, program, cores)
    command = [sys.executable, *arguments]
    return start(rank, "this machine", command, dict(os.environ), line, on_line)


def start_over_ssh(
    leader: str,
    rank: int,
    host: Host,
    options: RemoteOptions,
    join_timeout: float,
    line: str,
    program: Sequence[str] = (),
    on_line: OnLine | None = None,
    start: Start = NodeProcess,
) -> Process:
    """A worker on `host`; the other arguments as in start_local."""
    arguments = _node_arguments(leader, rank, host.address, join_timeout, program)
    command = over_ssh(arguments, host, options)
    return start(rank, host.ssh, command, dict(os.environ), line, on_line)


def over_ssh(arguments: Sequence[str], host: Host, options: RemoteOptions) -> list[str]:
    """The command that runs Python with `arguments` on `host`, through the `ssh` on the PATH,
    asking nothing.
    """
    remote = shlex.join([options.python or sys.executable, *arguments])
    if options.env:
        remote = shlex.join(["env", *options.env]) + " " + remote
    if options.cwd:
        remote = f"cd {shlex.quote(options.cwd)} && {remote}"
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host.ssh, remote]
