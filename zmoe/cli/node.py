"""zmoe-node: a worker that waits for its leader."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from zmoe.cli.common import Parser, memory_limit, run_command, warn_unencrypted
from zmoe.errors import InputError, ZmoeError
from zmoe.topology.cores import parse_cpus

PROG = "zmoe-node"
PAUSE_S = 1.0  # after a run that failed: the next may fail at once, and so on


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Hold a share of a model's experts for a zmoe-run that leads. Waits for its leader, "
        "works for it, and then waits for the next, until it is stopped.",
    )
    add = parser.add_argument
    add("--leader", required=True, metavar="HOST:PORT", help="where zmoe-run listens")
    add("--rank", type=int, required=True, help="which node this is, from 1 on")
    add("--bind", default="127.0.0.1", metavar="ADDRESS", help="address to listen on for peers")
    add("--model", help="checkpoint here, when it lies elsewhere than at the leader")
    add(
        "--memory-limit", type=float, metavar="GB", help="GiB to take (default: as the leader says)"
    )
    add("--cores", metavar="CPUS", help="CPUs to stay on, such as 0-3,8 (Linux)")
    add("--tied", action="store_true", help="end when standard input closes")
    add("--once", action="store_true", help="end after one run, or after a minute without leader")
    return parser


def _check_leader(leader: str) -> None:
    host, _, port = leader.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--leader {leader}: expected HOST:PORT")


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


def _end_with_input() -> None:
    """Whoever started us holds our standard input open for as long as it lives."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _serve(options: Any) -> None:
    _check_leader(options.leader)
    if not 1 <= options.rank < 64:
        raise InputError(f"--rank is {options.rank}: expected a number from 1 to 63")
    if options.cores is not None:
        _pin(options.cores)
    if options.tied:
        threading.Thread(target=_end_with_input, daemon=True).start()
    from zmoe.cluster.hosts import check_address

    check_address(options.bind, "bind")
    warn_unencrypted(f"{PROG}[{options.rank}]", options.bind)
    from zmoe.cluster.worker import Worker, WorkerSpec
    from zmoe.config import Timing
    from zmoe.moe.sockets import Context

    join_timeout = Timing().join if options.once else None
    spec = WorkerSpec(
        options.leader,
        options.rank,
        options.bind,
        options.model,
        memory_limit(options.memory_limit),
        join_timeout,
    )
    context = Context()
    while True:
        worker = Worker(spec, context)
        try:
            worker.run()
        except (ZmoeError, ValueError, TypeError) as error:  # a leader's fault is not our end
            if options.once:
                raise
            print(f"{PROG}[{options.rank}]: {type(error).__name__}: {error}", file=sys.stderr)
            time.sleep(PAUSE_S)
        if options.once:
            return


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    options = _parser().parse_args(argv)
    code = run_command(f"{PROG}[{options.rank}]", options.debug, lambda: _serve(options))
    return code


if __name__ == "__main__":
    sys.exit(main())
