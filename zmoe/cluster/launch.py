"""Starting and ending worker processes, here and over ssh."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from zmoe.cluster.hosts import Host
from zmoe.errors import LaunchError

END_GRACE_S = 2.0
# Like `python -m zmoe.cli.node`, but for the installed package: a checkout in the
# working directory would otherwise hide it.
_NODE = (
    "import sys; sys.path = [p for p in sys.path if p]; "
    "from zmoe.cli.node import main; sys.exit(main())"
)


@dataclass(frozen=True)
class RemoteOptions:
    """What mlx.launch's `--python`, `--cwd` and `--env` say about the other machines."""

    python: str | None = None
    cwd: str | None = None
    env: tuple[str, ...] = ()


class NodeProcess:
    """One worker process; keeps the last lines of its standard error."""

    def __init__(
        self,
        rank: int,
        name: str,
        command: Sequence[str],
        env: dict[str, str],
        token: str | None = None,
    ) -> None:
        """Start `command`; `token` is the first line of its standard input."""
        self.rank, self.name = rank, name
        self._tail: deque[str] = deque(maxlen=20)
        try:
            # A session of its own: Ctrl-C reaches the leader alone, which then ends us.
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,  # closes when we end, however: the worker then ends too
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start node {rank} on {name}: {command[0]}: {error.strerror}"
            ) from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if token is not None:
            assert self._process.stdin is not None
            with suppress(OSError):  # it has ended, which is noticed elsewhere
                os.write(self._process.stdin.fileno(), token.encode() + b"\n")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._tail.append(line.rstrip())

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last line that it wrote on standard error; call after it ended."""
        self._reader.join(timeout=1.0)
        return self._tail[-1] if self._tail else ""

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, deadline: float) -> None:
        """Until it has ended, at the latest until `deadline` (monotonic), then kill it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._reader.join(timeout=1.0)


def end_all(processes: Sequence[NodeProcess], patience: float = 0.0) -> None:
    """End every process: let them go by themselves for `patience` s, then TERM, then KILL."""
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline and any(p.exit_code() is None for p in processes):
            time.sleep(0.01)
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + END_GRACE_S
        for process in processes:
            process.wait(deadline)
    finally:  # a second Ctrl-C: no more patience
        for process in processes:
            process.kill()


def _node_arguments(leader: str, rank: int, bind: str) -> list[str]:
    return [
        "-c",
        _NODE,
        "--once",
        "--tied",
        "--leader",
        leader,
        "--rank",
        str(rank),
        "--bind",
        bind,
    ]


def start_local(
    leader: str, rank: int, bind: str, cores: Sequence[int] | None, token: str
) -> NodeProcess:
    """A worker on this machine, on the given cores when the system can pin."""
    command = [sys.executable, *_node_arguments(leader, rank, bind)]
    if cores is not None:
        command += ["--cores", ",".join(map(str, cores))]
    return NodeProcess(rank, "this machine", command, dict(os.environ), token)


def start_over_ssh(
    leader: str, rank: int, host: Host, options: RemoteOptions, token: str
) -> NodeProcess:
    """A worker on `host`."""
    command = over_ssh(_node_arguments(leader, rank, host.address), host, options)
    return NodeProcess(rank, host.ssh, command, dict(os.environ), token)


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


def divide_cores(nodes: int) -> list[list[int]] | None:
    """This process's cores, dealt to `nodes` local nodes; None where the system can't pin.

    With fewer cores than nodes, several nodes share one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if nodes >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(nodes)]
    per_node = len(cores) // nodes
    return [cores[rank * per_node : (rank + 1) * per_node] for rank in range(nodes)]
