"""Tokens per second of a model over node counts, beside those of other engines.

Every figure comes from processes of their own, started anew in each round; the
engines take turns in each, so that what else the machine does hits them alike.
A row is the median over the rounds. Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    BenchError,
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
from engines import MAKERS, Engine, Peers, find_peers, layout, zmoe

from zmoe.config import ACTIVATIONS, COMPUTES, WIRE_DTYPES

BREAKDOWN = ("experts_ms", "exchange_ms", "other_ms")
RATES = ("prompt_tps", "generation_tps")
REFERENCE = "llama.cpp"  # on the fewest cores: what the ratios are to

Runs = list[tuple[Engine, list[dict[str, Any]]]]


def arguments() -> argparse.Namespace:
    made = parser("Measure prefill and decode tokens/s of a model over node counts.")
    add = made.add_argument
    add("model", nargs="?", default="zmoe-tiny", help="folder or name")
    add(
        "--nodes",
        type=list_of(layout),
        default=[layout(text) for text in ("1", "2")],
        help="N nodes on a core each, or NxC: on C cores each; such as 1,1x2,2 (default 1,2)",
    )
    add("-p", "--prompt-tokens", type=positive, default=128, help="random ones; default 128")
    add("-m", "--max-tokens", type=positive, default=64, help="default 64")
    add("--prompt", help="text in place of random tokens; for zmoe alone")
    add("--runs", type=positive, default=3, help="rounds; default 3")
    add("--repetitions", type=positive, default=1, help="in each round's process; default 1")
    add("--no-warm-up", dest="warm_up", action="store_false", help="time the first one as well")
    add("--compute", choices=COMPUTES, help="zmoe-run's")
    add("--activations", choices=ACTIVATIONS, help="zmoe-run's")
    add("--wire-dtype", choices=WIRE_DTYPES, help="zmoe-run's")
    add(
        "--peers",
        type=list_of(one_of(tuple(MAKERS))),
        default=[],
        help=f"also measure {','.join(MAKERS)}",
    )
    add("--gguf", type=Path, help="the model for llama.cpp (default: MODEL.gguf beside the folder)")
    add("--slow", action="store_true", help="mlx-lm in full on a CPU, too")
    add("--deadline", type=positive, default=1800, help="seconds for one run")
    options = made.parse_args()
    if options.prompt is not None and options.peers:
        made.error("--prompt: the peers take --prompt-tokens only")
    return options


def measure(options: argparse.Namespace, others: Peers) -> list[dict[str, Any]]:
    """One row an engine; the rounds interleaved."""
    runs: Runs = [(engine, []) for engine in (*zmoe(options), *others.engines)]
    for turn in range(options.runs):
        for engine, done in runs:
            if engine.name in others.absent or turn >= (engine.rounds or options.runs):
                continue
            where = "" if engine.cores is None else f" on {engine.cores} cores"
            print(f"run {turn + 1}, {engine.name}, {engine.nodes} nodes{where}", file=sys.stderr)
            try:
                done.append(run_json(engine.command, options.deadline))
            except BenchError as error:
                if engine.name == "zmoe":
                    raise
                others.fail(engine.name, error)
    return [row(short_name(options.model), engine, done) for engine, done in runs if done]


def row(model: str, engine: Engine, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over `runs`; memory is the largest that any process ever took, in bytes."""
    made: dict[str, Any] = {
        "model": model,
        "engine": engine.name,
        "nodes": engine.nodes,
        "cores": engine.cores,
    }
    for name in ("prompt_tokens", "generation_tokens"):
        made[name] = runs[0][name]
    for name in RATES:
        made[name] = round(statistics.median(run[name] for run in runs), 2)
        made[name.replace("tps", "runs")] = [round(run[name], 2) for run in runs]
    if "breakdown" in runs[0]:
        for name in BREAKDOWN:
            made[name] = round(statistics.median(run["breakdown"][name] for run in runs), 3)
        spans = {name for run in runs for name in run["spans_ms"]}
        made["spans_ms"] = {
            name: round(statistics.median(run["spans_ms"].get(name, 0.0) for run in runs), 3)
            for name in sorted(spans)
        }
    made["peak_memory"] = max(max(run["peak_memory"]) for run in runs)
    return made


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """To every row, its rates as multiples of the reference's, if that was measured."""
    references = [each for each in rows if each["engine"] == REFERENCE]
    if not references:
        return
    reference = min(references, key=lambda each: each["cores"] or 0)
    for each in rows:
        for name in RATES:
            ratio = each[name] / reference[name]
            each[name.replace("tps", "ratio")] = round(ratio, 3)


def cells(each: Mapping[str, Any], usual: tuple[int, int]) -> list[str]:
    """A row of the table; counts of tokens other than the `usual` stand behind the name."""
    counts = (each["prompt_tokens"], each["generation_tokens"])
    made = [each["engine"] if counts == usual else "{} ({},{})".format(each["engine"], *counts)]
    made.append(f"{each['nodes']}/{each['cores'] or '-'}")
    for name in RATES:
        ratio = each.get(name.replace("tps", "ratio"))
        made += [f"{each[name]:.1f}", "-" if ratio is None else f"{ratio:.2f}"]
    made += [f"{each[name]:.2f}" if name in each else "-" for name in BREAKDOWN]
    return [*made, f"{each['peak_memory'] / 2**20:.0f}"]


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    results, console = report["results"], Console()
    usual = (results[0]["prompt_tokens"], results[0]["generation_tokens"])
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True)
    table.add_column("n/c", no_wrap=True)
    for title in (
        f"pp{usual[0]}",
        "x",
        f"tg{usual[1]}",
        "x",
        "experts",
        "exchange",
        "other",
        "MiB",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for each in results:
        table.add_row(*cells(each, usual))
    console.print(table)
    for each in results:
        if each.get("spans_ms"):
            spans = ", ".join(f"{name} {taken:.3f}" for name, taken in each["spans_ms"].items())
            where = f"{each['engine']} {each['nodes']}/{each['cores'] or '-'}"
            console.print(f"{where}, ms/token by span: {spans}", highlight=False)
    for name, reason in report["absent"].items():
        console.print(f"absent: {name}: {reason}", highlight=False)
    console.print(
        "n/c: nodes and cores in all. pp, tg: tokens/s of prefill and decode; "
        f"x: as a multiple of {REFERENCE} on the fewest cores. "
        "experts, exchange, other: ms/token. MiB: peak of a process. "
        "Behind a name: its own (pp,tg).",
        highlight=False,
    )


def benchmark() -> int:
    options = arguments()
    block = environment()
    others = find_peers(options, {name: MAKERS[name] for name in options.peers})
    rows = measure(options, others)
    add_ratios(rows)
    block["builds"] = others.builds
    block["load_average_after"] = environment()["load_average"]
    report = {"environment": block, "results": rows, "absent": others.absent}
    finish(options, report, show, of=short_name(options.model))
    return 1 if others.failed else 0


if __name__ == "__main__":
    main(benchmark)
