"""zmoe-node: a worker that waits for its leader."""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zmoe.cli.common import Parser, add_settings, given_settings, run_command, warn_unencrypted
from zmoe.cli.unit import unit
from zmoe.cluster.hosts import check_bind, check_leader
from zmoe.cluster.spec import WorkerSpec
from zmoe.config import Timing
from zmoe.errors import InputError, ZmoeError
from zmoe.exchange.keys import KeyPair, Pinned, is_key, is_loopback
from zmoe.topology.cores import parse_cpus

if TYPE_CHECKING:
    from zmoe.cluster.messages import Setup

PROG = "zmoe-node"
LONGEST_LINE = 1000  # characters
FIRST_LINE_S, LONGEST_FIRST_LINE = 60.0, 200
PAUSE_S = 1.0  # after a run that failed: the next may fail at once, and so on


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Hold a share of a model's experts for a zmoe-run on this or another machine. The node "
        "waits for its leader, works for it, and then waits for the next one, until it is stopped.",
    )
    add = parser.add_argument
    add_settings(add, WorkerSpec, "leader", "rank", required=False)
    add(
        "--rank-env",
        metavar="NAME",
        help="Environment variable with the rank of this node, such as SLURM_PROCID",
    )
    add_settings(add, WorkerSpec, "bind", "key", "insecure", "model", "memory_limit")
    add("--cores", metavar="CPUS", help="CPUs to run on, such as 0-3,8 (Linux)")
    add(
        "--tied",
        action="store_true",
        help="Read the token by which the leader recognises this node, and its keys, from the "
        "first line of standard input, and end when standard input closes",
    )
    add("--once", action="store_true", help="End after one run")
    add_settings(add, WorkerSpec, "join_timeout")
    add(
        "--ready-fd",
        type=int,
        metavar="N",
        help="File descriptor to write a line to, and to close, when the node waits for its leader",
    )
    add(
        "--print-unit",
        action="store_true",
        help="Print a service of systemd that runs this command, and end",
    )
    return parser


def pin(cores: str) -> None:
    """Keep this process on the CPUs of --cores. Raises InputError."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError(f"--cores {cores}: this system cannot keep a process on some CPUs")
    try:
        wanted = parse_cpus(cores)
    except InputError as error:
        raise InputError(f"--cores {cores}: {error}") from None
    with suppress(OSError):  # it has none of them
        os.sched_setaffinity(0, wanted)
    if beyond := set(wanted) - os.sched_getaffinity(0):
        raise InputError(f"--cores {cores}: this process may not run on CPU {min(beyond)}")


def _read_line() -> str:
    """Return the first line of standard input, and leave the rest unread. Raises InputError."""
    line, deadline = b"", time.monotonic() + FIRST_LINE_S
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        byte = os.read(0, 1) if select.select([0], [], [], max(0.0, left))[0] else b""
        if not byte or len(line) > LONGEST_FIRST_LINE:
            raise InputError("--tied: no line with a token came on standard input")
        line += byte
    return line.decode("ascii", "replace").strip()


def told_by_leader(spec: WorkerSpec) -> WorkerSpec:
    """Return `spec` with what the leader says on standard input: a token, this node's secret key
    and its own public one, or no keys where links are not encrypted. Raises InputError.
    """
    token, *keys = _read_line().split(" ")
    if not keys:
        return replace(spec, token=token, insecure=not is_loopback(spec.bind))
    if len(keys) != 2 or not all(map(is_key, keys)):
        raise InputError("--tied: expected a token, or a token and two keys on standard input")
    return replace(spec, token=token, keys=Pinned(KeyPair.of(keys[0]), (keys[1],)))


def end_with_input(fd: int = 0) -> None:
    """End this process when its starter, which holds standard input (`fd`) open, has ended."""
    while os.read(fd, 4096):
        pass
    os._exit(1)


class _Notices:
    """The messages of a worker that was started by hand, one line per change.

    They quote what a leader sent, so they are shortened and hold no control characters.
    """

    def __init__(self, prog: str, quiet: bool) -> None:
        self._prog, self._quiet, self._last = prog, quiet, ""

    def say(self, text: str) -> None:
        """Print `text` in one line, unless it equals the last line printed."""
        line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
        if line == self._last or self._quiet:
            return
        self._last = line
        with suppress(OSError, ValueError):  # nobody reads any more, which ends no worker
            print(f"{self._prog}: {line}", file=sys.stderr, flush=True)

    def begun(self, setup: Setup) -> None:
        """Report that a run has begun."""
        self.say(f"began a run of {setup.model} on {setup.nodes} nodes")


def _from_environment(asked: dict[str, Any], rank_env: str | None) -> None:
    """Add leader and rank to `asked` where no flag has said them. Raises InputError."""
    if "leader" not in asked:
        asked["leader"] = os.environ.get("ZMOE_LEADER")
        if not asked["leader"]:
            raise InputError("no leader: give --leader HOST:PORT, or set ZMOE_LEADER")
        check_leader(asked["leader"], "ZMOE_LEADER")
    if "rank" in asked:
        if rank_env is not None:
            raise InputError("--rank and --rank-env exclude each other")
        return
    name = rank_env or "ZMOE_RANK"
    rank = os.environ.get(name)
    if not rank:
        raise InputError(f"no rank: give --rank, or set {name}")
    if not re.fullmatch("[0-9]{1,2}", rank) or not 1 <= int(rank) <= 63:
        raise InputError(f"{name} is {rank!r}: expected a number from 1 to 63")
    asked["rank"] = int(rank)


def _say_ready(fd: int) -> None:
    """Tell whoever holds the other end of `fd`. Raises InputError."""
    try:
        os.write(fd, b"ready\n")
        os.close(fd)
    except OSError as error:
        raise InputError(f"--ready-fd {fd}: {error.strerror}") from None


def _spec(options: Any) -> WorkerSpec:
    """What the flags and the environment say. Raises InputError."""
    asked = given_settings(options, WorkerSpec)
    _from_environment(asked, options.rank_env)
    if options.once:
        asked.setdefault("join_timeout", Timing().join)
    elif "join_timeout" in asked:
        raise InputError("--join-timeout is for --once")
    return WorkerSpec(**asked)


def _in_words(error: Exception) -> str:
    if isinstance(error, ZmoeError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"


def _serve(options: Any, arguments: Sequence[str] = ()) -> None:
    spec = _spec(options)
    if options.print_unit:
        print(unit(spec, [word for word in arguments if word != "--print-unit"], options.rank_env))
        return
    if options.cores is not None:
        pin(options.cores)
    if options.tied:
        spec = told_by_leader(spec)
        threading.Thread(target=end_with_input, daemon=True).start()
    prog = f"{PROG}[{spec.rank}]"
    check_leader(spec.leader, "--leader")
    check_bind(spec.bind)
    spec.pinned()  # raises where there has to be a key
    warn_unencrypted(prog, spec.bind, spec.insecure)
    notices = _Notices(prog, quiet=options.tied)
    waiting = f"waiting for a leader at {spec.leader}"
    if options.ready_fd is not None:
        _say_ready(options.ready_fd)
    notices.say(waiting)
    from zmoe.cluster.worker import Worker
    from zmoe.exchange.sockets import Context

    context = Context()
    while True:
        pause = 0.0
        try:
            Worker(spec, context, notices.begun, notices.say).run()
            notices.say("the run is over" if options.once else f"the run is over; {waiting}")
        except Exception as error:  # whatever a leader caused is not our end
            if options.once:
                raise
            notices.say(f"{_in_words(error)}; {waiting}")
            pause = PAUSE_S
        if options.once:
            return
        time.sleep(pause)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(arguments)
    rank = getattr(options, "rank", None) or os.environ.get(options.rank_env or "ZMOE_RANK")
    prog = PROG if rank is None else f"{PROG}[{rank}]"
    return run_command(prog, options.debug, lambda: _serve(options, arguments))


if __name__ == "__main__":
    sys.exit(main())
