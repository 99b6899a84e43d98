"""zmoe-node: a worker that waits for its leader."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zmoe.cli.common import Parser, add_settings, given_settings, run_command, warn_unencrypted
from zmoe.cluster.hosts import check_bind, check_leader
from zmoe.cluster.spec import WorkerSpec
from zmoe.config import Timing
from zmoe.errors import InputError, SettingError, ZmoeError
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
    add_settings(add, WorkerSpec, "leader", "rank", "bind", "key", "insecure", "model")
    add_settings(add, WorkerSpec, "memory_limit")
    add("--cores", metavar="CPUS", help="CPUs to run on, such as 0-3,8 (Linux)")
    add(
        "--tied",
        action="store_true",
        help="Read the token by which the leader recognises this node, and its keys, from the "
        "first line of standard input, and end when standard input closes",
    )
    add("--once", action="store_true", help="End after one run")
    add_settings(add, WorkerSpec, "join_timeout")
    return parser


def _pin(cores: str) -> None:
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


def _told_by_leader(spec: WorkerSpec) -> WorkerSpec:
    """Return `spec` with what the leader says on standard input: a token, this node's secret key
    and its own public one, or no keys where links are not encrypted. Raises InputError.
    """
    token, *keys = _read_line().split(" ")
    if not keys:
        return replace(spec, token=token, insecure=True)
    if len(keys) != 2 or not all(map(is_key, keys)):
        raise InputError("--tied: expected a token, or a token and two keys on standard input")
    return replace(spec, token=token, keys=Pinned(KeyPair.of(keys[0]), (keys[1],)))


def _end_with_input() -> None:
    """End this process when its starter, which holds standard input open, has ended."""
    while os.read(0, 4096):
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


def _spec(options: Any) -> WorkerSpec:
    """What the flags say. Raises InputError."""
    asked = given_settings(options, WorkerSpec)
    if options.once:
        asked.setdefault("join_timeout", Timing().join)
    elif "join_timeout" in asked:
        raise InputError("--join-timeout is for --once")
    spec = WorkerSpec(**asked)
    if spec.insecure and (spec.key is not None or is_loopback(spec.bind)):
        reason = "with a key" if spec.key is not None else "on one machine"
        raise SettingError("insecure", f"has no use {reason}")
    return spec


def _in_words(error: Exception) -> str:
    if isinstance(error, ZmoeError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"


def _serve(options: Any) -> None:
    spec = _spec(options)
    if options.cores is not None:
        _pin(options.cores)
    if options.tied:
        spec = _told_by_leader(spec)
        threading.Thread(target=_end_with_input, daemon=True).start()
    prog = f"{PROG}[{spec.rank}]"
    check_leader(spec.leader, "--leader")
    check_bind(spec.bind)
    spec.pinned()  # raises where there has to be a key
    warn_unencrypted(prog, spec.bind, spec.insecure)
    notices = _Notices(prog, quiet=options.tied)
    waiting = f"waiting for a leader at {spec.leader}"
    notices.say(waiting)
    from zmoe.cluster.worker import Worker
    from zmoe.exchange.sockets import Context

    context = Context()
    while True:
        pause = 0.0
        try:
            Worker(spec, context, notices.begun).run()
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
    options = _parser().parse_args(argv)
    code = run_command(f"{PROG}[{options.rank}]", options.debug, lambda: _serve(options))
    return code


if __name__ == "__main__":
    sys.exit(main())
