"""What strangers at the ports of a run cost it: decoded tokens per second beside them.

Turns with each kind of strangers (bench/peers/strangers.py), at the ports of the run or at as many
of another process, and without any alternate. On a machine without idle cores the strangers' own
work takes some from the run as well. So a ratio is that of a turn's figure to that of the same
round's with the same strangers elsewhere: it tells what they cost the run itself.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
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
    found: dict[tuple[str, str], list[float]] = {("none", ""): []}
    found |= {(kind, where): [] for kind in KINDS for where in ("elsewhere", "here")}
    spec = ClusterSpec(options.nodes)
    with whole_cluster(options.model, spec) as cluster, Children() as children:
        program = [sys.executable, str(BENCH / "peers" / "strangers.py")]
        ports = {"here": [str(port) for _, each in cluster.listeners for port in each]}
        count = len(ports["here"])
        other = children.start([*program, "listen", str(count)], stdout=subprocess.PIPE)
        assert other.stdout is not None
        ports["elsewhere"] = [other.stdout.readline().decode().strip() for _ in range(count)]
        started = {
            (kind, where): children.start([*program, kind, *ports[where]])
            for kind, where in found
            if where
        }
        time.sleep(START_S)
        for process in started.values():
            process.send_signal(signal.SIGSTOP)
        speed(cluster, options.tokens)
        for _ in range(options.rounds):
            for turn, speeds in found.items():
                if turn in started:
                    started[turn].send_signal(signal.SIGCONT)
                    time.sleep(SETTLE_S)
                speeds.append(speed(cluster, options.tokens))
                if turn in started:
                    started[turn].send_signal(signal.SIGSTOP)
        for process in started.values():
            process.send_signal(signal.SIGCONT)  # to be ended
    return [
        {
            "model": short_name(options.model),
            "nodes": options.nodes,
            "strangers": kind,
            "tokens_per_s": round(statistics.median(found[kind, "here"]), 1),
            "tokens_per_s_elsewhere": round(statistics.median(found[kind, "elsewhere"]), 1),
            "ratios": _ratios(found[kind, "here"], found[kind, "elsewhere"]),
            "ratios_to_none": _ratios(found[kind, "here"], found["none", ""]),
        }
        for kind in KINDS
    ]


def _ratios(mine: list[float], base: list[float]) -> list[float]:
    return [round(a / b, 3) for a, b in zip(mine, base)]


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = ("tokens/s (median)", "ratio (quartiles)", "ratio to none")
    table = Table("strangers", *titles)
    for row in report["results"]:
        both = (statistics.quantiles(row[name], n=4) for name in ("ratios", "ratios_to_none"))
        words = [f"{middle:.2f} ({lower:.2f} to {upper:.2f})" for lower, middle, upper in both]
        table.add_row(row["strangers"], str(row["tokens_per_s"]), *words)
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
