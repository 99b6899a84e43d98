"""Tokens per second of a model over node counts, by way of zmoe-run --json."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from common import environment, finish, list_of, main, parser, positive, run_json, short_name

PROMPT = (
    "Two households, both alike in dignity, in fair Verona, where we lay our scene, "
    "from ancient grudge break to new mutiny, where civil blood makes civil hands unclean. "
    "From forth the fatal loins of these two foes a pair of star-cross'd lovers take their life."
)
BREAKDOWN = ("experts_ms", "exchange_ms", "other_ms")


def arguments() -> argparse.Namespace:
    made = parser("Measure prefill and decode tokens/s of a model over node counts.")
    made.add_argument("model", nargs="?", default="zmoe-tiny", help="folder or name")
    made.add_argument("--nodes", type=list_of(positive), default=[1, 2, 4], help="default 1,2,4")
    made.add_argument("-m", "--max-tokens", type=positive, default=64, help="default 64")
    made.add_argument("--prompt", default=PROMPT, help="default: a sonnet's beginning")
    made.add_argument("--runs", type=positive, default=3, help="of each node count; default 3")
    made.add_argument("--deadline", type=positive, default=1800, help="seconds for one run")
    return made.parse_args()


def generate(options: argparse.Namespace, nodes: int) -> dict[str, Any]:
    """What one zmoe-run tells of itself."""
    command = [sys.executable, "-m", "zmoe.cli.run", "--json", "--temp", "0", "--nodes", str(nodes)]
    command += ["--model", options.model, "-m", str(options.max_tokens), options.prompt]
    return run_json(command, options.deadline)


def row(model: str, nodes: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over `runs`; memory is the largest that any node ever took, in bytes."""
    made: dict[str, Any] = {"model": model, "nodes": nodes}
    for name in ("prompt_tokens", "generation_tokens"):
        made[name] = runs[0][name]
    for name in ("prompt_tps", "generation_tps"):
        made[name] = round(statistics.median(run[name] for run in runs), 2)
    for name in BREAKDOWN:
        made[name] = round(statistics.median(run["breakdown"][name] for run in runs), 3)
    made["peak_memory"] = max(max(run["peak_memory"]) for run in runs)
    return made


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a node count, the runs interleaved."""
    runs: dict[int, list[dict[str, Any]]] = {nodes: [] for nodes in options.nodes}
    for turn in range(options.runs):
        for nodes, done in runs.items():
            print(f"run {turn + 1}, {nodes} nodes", file=sys.stderr)
            done.append(generate(options, nodes))
    return [row(short_name(options.model), nodes, done) for nodes, done in runs.items()]


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("nodes", "prefill tokens/s", "decode tokens/s", "ms/token: experts")
    for title in ("exchange", "other", "peak MiB of a node"):
        table.add_column(title)
    for each in report["results"]:
        tests = ("prompt_tps", "prompt_tokens", "pp"), ("generation_tps", "generation_tokens", "tg")
        rates = (f"{each[rate]:.1f} ({kind}{each[count]})" for rate, count, kind in tests)
        parts = (f"{each[name]:.2f}" for name in BREAKDOWN)
        table.add_row(str(each["nodes"]), *rates, *parts, f"{each['peak_memory'] / 2**20:.0f}")
    Console().print(table)


def benchmark() -> int:
    options = arguments()
    block = environment()
    finish(options, {"environment": block, "results": measure(options)}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
