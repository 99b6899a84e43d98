"""What strangers at the ports of a run cost it: decoded tokens per second beside them.

Turns with each kind of strangers (bench/peers/strangers.py) and without any alternate; a ratio is
that of a turn's figure to that of the same round's without strangers.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from common import (
    BENCH,
    BenchError,
    Children,
    environment,
    finish,
    main,
    parser,
    positive,
    short_name,
)
from peers.whole import whole_cluster

from zmoe.cluster.cluster import Cluster
from zmoe.cluster.spec import ClusterSpec
from zmoe.errors import ZmoeError

KINDS = ("silent", "50", "200")  # of bench/peers/strangers.py
START_S = 2.0  # until strangers have come
SETTLE_S = 0.2  # until they have come again


def arguments() -> argparse.Namespace:
    made = parser("Time decoding while strangers come to the ports of all nodes.")
    made.add_argument("--model", default="zmoe-tiny", help="folder or name (default: zmoe-tiny)")
    made.add_argument("--nodes", type=positive, default=2, help="default 2")
    made.add_argument("--tokens", type=positive, default=100, help="of a turn; default 100")
    made.add_argument("--rounds", type=positive, default=40, help="default 40")
    return made.parse_args()


def speed(cluster: Cluster, tokens: int) -> float:
    """Decoded tokens per second."""
    begun = time.monotonic()
    count = len(list(cluster.generate("ROMEO:", max_tokens=tokens)))
    return count / (time.monotonic() - begun)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each kind of strangers."""
    found: dict[str, list[float]] = {kind: [] for kind in ("none", *KINDS)}
    spec = ClusterSpec(options.nodes)
    with whole_cluster(options.model, spec) as cluster, Children() as children:
        ports = [str(port) for _, each in cluster.listeners for port in each]
        script = str(BENCH / "peers" / "strangers.py")
        started = {k: children.start([sys.executable, script, k, *ports]) for k in KINDS}
        time.sleep(START_S)
        for process in started.values():
            process.send_signal(signal.SIGSTOP)
        speed(cluster, options.tokens)
        for _ in range(options.rounds):
            for kind, speeds in found.items():
                if kind in started:
                    started[kind].send_signal(signal.SIGCONT)
                    time.sleep(SETTLE_S)
                speeds.append(speed(cluster, options.tokens))
                if kind in started:
                    started[kind].send_signal(signal.SIGSTOP)
        for process in started.values():
            process.send_signal(signal.SIGCONT)  # to be ended
    return [
        {
            "model": short_name(options.model),
            "nodes": options.nodes,
            "strangers": kind,
            "tokens_per_s": round(statistics.median(speeds), 1),
            "ratios": [round(mine / calm, 3) for mine, calm in zip(speeds, found["none"])],
        }
        for kind, speeds in found.items()
    ]


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("strangers", "tokens/s (median)", "ratio (median)", "lower quartile", "upper")
    for row in report["results"]:
        lower, middle, upper = statistics.quantiles(row["ratios"], n=4)
        figures = (middle, lower, upper)
        table.add_row(
            row["strangers"], str(row["tokens_per_s"]), *(f"{each:.2f}" for each in figures)
        )
    Console().print(table)


def benchmark() -> int:
    options = arguments()
    if options.rounds < 2:
        raise BenchError("--rounds: at least 2")
    block = environment()
    try:
        results = measure(options)
    except ZmoeError as error:
        raise BenchError(str(error)) from None
    finish(options, {"environment": block, "results": results}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
