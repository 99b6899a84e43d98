"""How long a text waits when a node is lost: from the kill to the next token, and why.

Three nodes; one worker is killed in the middle of a text, and the model's files stay in the page
cache. `local`: on this machine, started by the leader. `remote`: in network namespaces, started
by hand, so that only the links tell. `silent`: the link of a namespace goes down. The latter two
need root and iproute2. `engine`: the engine of a zmoe-serve is killed in the middle of a stream,
and its workers end with it; `kept`: they stay, with their weights, for the next engine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from common import (
    BENCH,
    BenchError,
    Children,
    environment,
    finish,
    list_of,
    main,
    one_of,
    parser,
    positive,
    run_json,
    short_name,
)
from serving import Server, events, serving

sys.path.append(str(BENCH.parent))  # for the namespaces that the tests have, too

KINDS = ("local", "remote", "silent", "engine", "kept")
PARTS = ("detect", "quiesce", "connect", "adopt", "repeat")
TOKENS, STRUCK_AT, WARM = 300, 100, 20
STREAMED, STRUCK_STREAM_AT = 40, 20
PORT = 9700
DEADLINE_S = 90.0


def arguments() -> argparse.Namespace:
    made = parser("Time from the loss of a node to the next token.")
    made.add_argument("--model", default="zmoe-tiny", help="folder or name (default: zmoe-tiny)")
    kinds = list_of(one_of(KINDS))
    made.add_argument("--kinds", type=kinds, default=KINDS, help=f"default {','.join(KINDS)}")
    made.add_argument("--flags", type=str.split, default=[], help="of zmoe-serve: engine and kept")
    made.add_argument("--runs", type=positive, default=5, help="of each kind; default 5")
    made.add_argument("--inside", type=list_of(str), help=argparse.SUPPRESS)  # these namespaces
    return made.parse_args()


@contextmanager
def timeline() -> Iterator[list[tuple[str, float]]]:
    """What the leader does in recoveries, and when."""
    from zmoe.cluster.node import Node
    from zmoe.recovery.leader import LeaderRecovery

    found: list[tuple[str, float]] = []
    enter, connect = LeaderRecovery._enter, Node.connect

    def entered(self: LeaderRecovery, phase: Any, *given: Any) -> None:
        found.append((phase.name, time.monotonic()))
        enter(self, phase, *given)

    def connected(self: Node, *given: Any) -> None:
        connect(self, *given)
        found.append(("connected", time.monotonic()))

    with (
        mock.patch.object(LeaderRecovery, "_enter", entered),
        mock.patch.object(Node, "connect", connected),
    ):
        yield found


def texts(cluster: Any) -> Iterator[float]:
    """The time of each token of a text."""
    for _ in cluster.generate("ROMEO:", max_tokens=TOKENS, ignore_eos=True):
        yield time.monotonic()


def rate(times: list[float]) -> float:
    """Tokens per second."""
    return (len(times) - 1) / (times[-1] - times[0])


def strike(cluster: Any, hit: Callable[[], object], mend: Callable[[], object]) -> dict[str, float]:
    """Lose a node in the middle of a text, and wait until it is back."""
    tokens = texts(cluster)
    before = list(itertools.islice(tokens, STRUCK_AT))
    with timeline() as events:
        began = time.monotonic()
        hit()
        after = list(tokens)
    if not events:
        raise BenchError("no recovery: the node was not missed")
    last = dict(events)  # of what there was twice, where another node was lost meanwhile
    adopted = last.get("REPEAT", last["RUNNING"])
    token = next(each for each in after if each > adopted)
    borders = [began, events[0][1], last["OPEN"], last["connected"], adopted, token]
    mend()
    until = time.monotonic() + DEADLINE_S
    while cluster.hosts != (0, 1, 2):
        if time.monotonic() > until:
            raise BenchError(f"the node did not come back within {DEADLINE_S:g} s")
        cluster.step()
        time.sleep(0.02)
    again = list(texts(cluster))
    return {
        **{part: end - begin for part, begin, end in zip(PARTS, borders, borders[1:])},
        "total": token - began,
        "before": rate(before[WARM:]),
        "adopted": rate([each for each in after if each >= token][WARM:]),
        "returned": rate(again[WARM:]),
    }


def local(model: str, runs: int) -> list[dict[str, float]]:
    import zmoe

    with zmoe.Cluster(model, nodes=3, on_notice=lambda line: None) as cluster:
        return [
            strike(cluster, lambda: os.kill(cluster.worker_pids()[0], signal.SIGKILL), bool)
            for _ in range(runs)
        ]


def inside(names: list[str], model: str, runs: int, kind: str) -> list[dict[str, float]]:
    """In the first of these namespaces; the workers are in the others."""
    import zmoe
    from tests.namespaces import ADDRESSES, LINK, ip
    from zmoe.cluster.hosts import hosts_from_names

    spec = zmoe.ClusterSpec(
        nodes=3, hosts=hosts_from_names(",".join(ADDRESSES)), manual=True, port=PORT, insecure=True
    )
    with Children() as children:

        def start(rank: int) -> subprocess.Popen[bytes]:
            leader = f"{ADDRESSES[0]}:{PORT}"
            place = ["--leader", leader, "--rank", str(rank), "--bind", ADDRESSES[rank]]
            node = [sys.executable, "-m", "zmoe.cli.node", *place, "--insecure"]
            command = ["ip", "netns", "exec", names[rank], *node]
            return children.start(command, stderr=subprocess.DEVNULL)

        workers = {rank: start(rank) for rank in (1, 2)}
        link = ("-n", names[1], "link", "set", LINK)

        def mend() -> None:
            if kind == "silent":
                ip(*link, "up")
            else:
                workers[1] = start(1)

        def hit() -> None:
            if kind == "silent":
                ip(*link, "down")
            else:
                workers[1].kill()

        with zmoe.Cluster(model, spec=spec, on_notice=lambda line: None) as cluster:
            return [strike(cluster, hit, mend) for _ in range(runs)]


def served(options: argparse.Namespace, keep_alive: int) -> list[dict[str, float]]:
    def command(port: int) -> list[str]:
        serve = [sys.executable, "-m", "zmoe.cli.serve", "--port", str(port), "--nodes", "3"]
        return [*serve, "--model", options.model, "--keep-alive", str(keep_alive), *options.flags]

    with serving(command) as server:
        return [asyncio.run(restart(server)) for _ in range(options.runs)]


async def restart(server: Server) -> dict[str, float]:
    """Kill the engine in the middle of a stream."""
    body = {"prompt": "ROMEO:", "max_tokens": STREAMED, "temperature": 0, "ignore_eos": True}
    times: list[float] = []
    began = 0.0
    async for _ in events(server.port, body):
        times.append(time.monotonic())
        if len(times) == STRUCK_STREAM_AT:
            (engine,) = server.pids("spawn_main")
            began = time.monotonic()
            os.kill(engine, signal.SIGKILL)
    _, token = max(itertools.pairwise(times), key=lambda pair: pair[1] - pair[0])
    return {"total": token - began}


def measure(options: argparse.Namespace, kind: str) -> list[dict[str, float]]:
    if kind in ("engine", "kept"):
        return served(options, 600 if kind == "kept" else 0)
    if kind == "local":
        return local(options.model, options.runs)
    from tests.namespaces import Unavailable, namespaces

    try:
        with namespaces() as names:
            own = ["--inside", ",".join(names), "--kinds", kind, "--runs", str(options.runs)]
            command = ["ip", "netns", "exec", names[0], sys.executable, str(Path(__file__))]
            found = run_json([*command, "--model", options.model, *own], 600.0)
            return list(found["runs"])
    except Unavailable as why:
        raise BenchError(str(why)) from why


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    figures = (*PARTS, "total", "before", "adopted", "returned")
    table = Table("median (least to most)", *report["results"])
    for name in figures:
        cells = []
        for runs in report["results"].values():
            values = sorted(run[name] for run in runs if name in run)
            if not values:
                cells.append("")
                continue
            digits = 3 if name in (*PARTS, "total") else 0
            middle, least, most = statistics.median(values), values[0], values[-1]
            cells.append(f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})")
        table.add_row(f"{name}, {'s' if name in (*PARTS, 'total') else 'tokens/s'}", *cells)
    Console().print(table)


def benchmark() -> int:
    options = arguments()
    if options.inside:
        (kind,) = options.kinds
        print(json.dumps({"runs": inside(options.inside, options.model, options.runs, kind)}))
        return 0
    block = {**environment(), "model": short_name(options.model)}
    results = {kind: measure(options, kind) for kind in options.kinds}
    finish(options, {"environment": block, "results": results}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
