"""zmoe-node: a worker that waits for its leader."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import Any

from zmoe.cli.common import Parser, memory_limit, run_command, warn_unencrypted
from zmoe.errors import InputError, ZmoeError

PROG = "zmoe-node"
TOKEN_S, LONGEST_TOKEN = 60.0, 200
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
    add("--cores", help="comma separated cores to stay on (Linux)")
    add(
        "--tied",
        action="store_true",
        help="read a token, by which the leader knows us, from the first line of standard input; "
        "end when it closes",
    )
    add("--once", action="store_true", help="end after one run, or after a minute without leader")
    return parser


def _check_leader(leader: str) -> None:
    host, _, port = leader.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--leader {leader}: expected HOST:PORT")


def _pin(cores: str) -> None:
    try:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    except (ValueError, OSError, AttributeError) as error:
        raise InputError(f"--cores {cores}: cannot be set: {error}") from error


def _read_token() -> str:
    """The first line of standard input. What follows is left there."""
    token, deadline = b"", time.monotonic() + TOKEN_S
    while not token.endswith(b"\n"):
        left = deadline - time.monotonic()
        byte = os.read(0, 1) if select.select([0], [], [], max(0.0, left))[0] else b""
        if not byte or len(token) > LONGEST_TOKEN:
            raise InputError("--tied: no line with a token came on standard input")
        token += byte
    return token.decode("ascii", "replace").strip()


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
    token = ""
    if options.tied:
        token = _read_token()
        threading.Thread(target=_end_with_input, daemon=True).start()
    from zmoe.cluster.hosts import check_address

    check_address(options.bind, "--bind")
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
        token,
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
