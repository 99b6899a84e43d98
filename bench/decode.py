"""Tokens per second of a model over node counts, beside those of other engines.

Every figure comes from processes of their own, started anew in each round; the
engines take turns in each, so that what else the machine does hits them alike.
A row is the median over the rounds, with their spread. Compare figures of one time only. With
--add the rounds of several calls make up one report.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import (
    BENCH,
    BenchError,
    Children,
    check_table_flags,
    environment,
    finish,
    kept,
    list_of,
    main,
    markdown_table,
    one_of,
    parser,
    positive,
    run_json,
    short_name,
    table_flags,
)
from engines import MAKERS, Engine, Peers, find_peers, layout, zmoe
from families import SCALED

from zmoe.config import ACTIVATIONS, COMPUTES, WIRE_DTYPES

BREAKDOWN = ("experts_ms", "exchange_ms", "other_ms")
RATES = ("prompt_tps", "generation_tps")
REFERENCE = "llama.cpp"  # on the fewest cores: what the ratios are to
WORKLOAD = ("model", "context", "prompt_tokens", "generation_tokens")
# What tells rows apart, and what is kept of each of their rounds.
IDENTITY = (*WORKLOAD, "engine", "nodes", "cores")
ROUND = (*RATES, "breakdown", "spans_ms", "peak_memory")
BLOCK = 64  # positions that zmoe's prefix cache keeps together
MADE = ("--bits", "4")  # beside its shape, of a model that --families makes

Case = tuple[argparse.Namespace, Engine]  # whose options say the model and the context
Runs = list[tuple[Case, list[dict[str, Any]]]]


def arguments() -> argparse.Namespace:
    made = parser("Measure prefill and decode tokens/s of a model over node counts.")
    add = made.add_argument
    add("models", nargs="*", metavar="model", help="folder or name; several with --kept only")
    add(
        "--nodes",
        type=list_of(layout),
        default=[layout(text) for text in ("1", "2")],
        help="N nodes on a core each, or NxC: on C cores each; such as 1,1x2,2 (default 1,2)",
    )
    add("-p", "--prompt-tokens", type=positive, default=128, help="random ones; default 128")
    add("-m", "--max-tokens", type=positive, default=64, help="default 64")
    add("--prompt", help="text in place of random tokens; for zmoe alone")
    add(
        "--contexts",
        type=list_of(context),
        default=[0],
        help=f"tokens held before the prompt, multiples of {BLOCK}, such as 0,4096; default 0",
    )
    add("--runs", type=positive, default=5, help="rounds; default 5")
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
    add(
        "--families",
        type=list_of(one_of(tuple(SCALED))),
        help=f"in place of a model, small ones of {','.join(SCALED)}, made for the run",
    )
    add("--gguf", type=Path, help="the model for llama.cpp (default: MODEL.gguf beside the folder)")
    add("--slow", action="store_true", help="mlx-lm in full on a CPU, too")
    add("--deadline", type=positive, default=1800, help="seconds for one run")
    add("--add", action="store_true", help="as --save, and keep earlier rounds of this commit")
    table_flags(made)
    options = made.parse_args()
    options.models = options.models or ["zmoe-tiny"]
    if len(options.models) > 1 and not options.kept:
        made.error(f"{options.models[1]}: one model at a time is measured")
    options.save |= options.add
    check_table_flags(made, options)
    if options.prompt is not None and options.peers:
        made.error("--prompt: the peers take --prompt-tokens only")
    if options.prompt is not None and options.contexts != [0]:
        made.error("--prompt: --contexts are held before random tokens only")
    if options.families and options.gguf:
        made.error("--families: each has a file of its own, not that of --gguf")
    return options


def context(text: str) -> int:
    """An argparse type: a number of tokens that the prefix cache can hold, or 0."""
    if not text.isdecimal() or int(text) % BLOCK:
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of {BLOCK} tokens")
    return int(text)


def make_family(family: str, folder: Path, context: int, with_gguf: bool) -> str:
    """A small model of `family` in `folder`, and beside it, where it can be converted, llama.cpp's
    file; where it lies.
    """
    made = str(folder / family)
    command = ["make_model.py", made, "--shape", family, *MADE, "--context", str(context)]
    converter = ["peers/gguf_model.py", made, f"{made}.gguf"]
    with Children() as children:
        if children.start([sys.executable, str(BENCH / command[0]), *command[1:]]).wait() != 0:
            raise BenchError(f"make_model.py cannot make a {family}")
        if with_gguf:  # what cannot be converted has no file, and so no peer
            children.start([sys.executable, str(BENCH / converter[0]), *converter[1:]]).wait()
    return made


def cases(options: argparse.Namespace, models: Sequence[str]) -> tuple[list[Case], Peers]:
    """All engines on all models and contexts; the peers by name, model and context."""
    found, everyone = list[Case](), Peers()
    for model in models:
        for before in options.contexts:
            own = copy.copy(options)
            own.model, own.context = model, before
            others = find_peers(own, {name: MAKERS[name] for name in options.peers})
            found += [(own, engine) for engine in (*zmoe(own), *others.engines)]
            everyone.builds |= others.builds
            everyone.failed |= others.failed
            everyone.absent |= {key(own, name): why for name, why in others.absent.items()}
    return found, everyone


def key(options: argparse.Namespace, name: str) -> str:
    """What a peer is called in `absent`: with the model and the context where there are several."""
    several = [short_name(options.model)] if options.families else []
    several += [f"after {options.context}"] if len(options.contexts) > 1 else []
    return ", ".join([name, *several])


def measure(
    options: argparse.Namespace,
    found: list[Case],
    others: Peers,
    earlier: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row an engine, model and context; the rounds interleaved, and those of `earlier` rows."""
    runs: Runs = [(case, []) for case in found]
    for turn in range(options.runs):
        for (own, engine), done in runs:
            if key(own, engine.name) in others.absent or turn >= (engine.rounds or options.runs):
                continue
            where = "" if engine.cores is None else f" on {engine.cores} cores"
            what = f"{short_name(own.model)} after {own.context}, {engine.name}"
            print(f"run {turn + 1}, {what}, {engine.nodes} nodes{where}", file=sys.stderr)
            try:
                done.append(run_json(engine.command, options.deadline))
            except BenchError as error:
                if engine.name == "zmoe":
                    raise
                others.fail(key(own, engine.name), error)
    rows = {identity(each): each for each in earlier}
    for (own, engine), done in runs:
        if done:
            made = row(short_name(own.model), own.context, engine, done)
            before = rows.get(identity(made), {"rounds": []})["rounds"]
            rows[identity(made)] = {**made, **medians([*before, *made["rounds"]])}
    return list(rows.values())


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


def workload(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is computed in a row, by whichever engine and on whichever cores."""
    return tuple(row[name] for name in WORKLOAD)


def row(
    model: str, before: int, engine: Engine, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was measured, and the `medians` of its `runs`."""
    return {
        "model": model,
        "context": before,
        "engine": engine.name,
        "nodes": engine.nodes,
        "cores": engine.cores,
        **{name: runs[0][name] for name in ("prompt_tokens", "generation_tokens")},
        **medians([{name: run[name] for name in ROUND if name in run} for run in runs]),
    }


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over `runs`, and all of their spread over the median; memory is the largest that any
    process ever took, in bytes.
    """
    made: dict[str, Any] = {"rounds": list(runs)}
    for name in RATES:
        rates = [run[name] for run in runs]
        made[name] = round(statistics.median(rates), 2)
        made[name.replace("tps", "runs")] = [round(rate, 2) for rate in rates]
        spread = (max(rates) - min(rates)) / statistics.median(rates)
        made[name.replace("tps", "spread")] = round(spread, 3)
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
    """To every row, its rates as multiples of the reference's on the same workload, if that was
    measured.
    """
    for each in rows:
        references = [
            other
            for other in rows
            if other["engine"] == REFERENCE and workload(other) == workload(each)
        ]
        if not references:
            continue
        reference = min(references, key=lambda other: other["cores"] or 0)
        for name in RATES:
            ratio = each[name] / reference[name]
            each[name.replace("tps", "ratio")] = round(ratio, 3)


def cells(each: Mapping[str, Any], usual: tuple[int, int]) -> list[str]:
    """A row of the table; counts of tokens other than the `usual` stand behind the name."""
    counts = (each["prompt_tokens"], each["generation_tokens"])
    made = [each["engine"] if counts == usual else "{} ({},{})".format(each["engine"], *counts)]
    made.append(f"{each['nodes']}/{each['cores'] or '-'}")
    for name in RATES:
        ratio, spread = (each.get(name.replace("tps", word)) for word in ("ratio", "spread"))
        made += [f"{each[name]:.1f}", f"{spread:.0%}", "-" if ratio is None else f"{ratio:.2f}"]
    made += [f"{each[name]:.2f}" if name in each else "-" for name in BREAKDOWN]
    return [*made, f"{each['peak_memory'] / 2**20:.0f}"]


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    results, console = report["results"], Console()
    usual = (results[0]["prompt_tokens"], results[0]["generation_tokens"])
    several = len({(each["model"], each["context"]) for each in results}) > 1
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    if several:
        table.add_column("model")
        table.add_column("after", justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    table.add_column("n/c", no_wrap=True)
    for title in (
        f"pp{usual[0]}",
        "+-",
        "x",
        f"tg{usual[1]}",
        "+-",
        "x",
        "experts",
        "exchange",
        "other",
        "MiB",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for each in results:
        about = [each["model"], str(each["context"])] if several else []
        table.add_row(*about, *cells(each, usual))
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
        "+-: from the slowest to the fastest round, over the median; "
        f"x: as a multiple of {REFERENCE} on the fewest cores. "
        "after: tokens held before. "
        "experts, exchange, other: ms/token. MiB: peak of a process. "
        "Behind a name: its own (pp,tg).",
        highlight=False,
    )


def markdown(report: Mapping[str, Any]) -> None:
    """One line for each workload and layout of ours, llama.cpp on as many cores beside it."""
    where, results = report["environment"], report["results"]
    peers = {
        (*workload(each), each["cores"]): each for each in results if each["engine"] == REFERENCE
    }
    lines, counts, models = [], [], list(dict.fromkeys(each["model"] for each in results))
    ours = [each for each in results if each["engine"] == "zmoe"]
    ours.sort(
        key=lambda it: (models.index(it["model"]), *workload(it)[1:], it["cores"], it["nodes"])
    )
    for each in ours:
        peer = peers.get((*workload(each), each["cores"]))
        cells = [each["model"], f"{each['context']:,}", f"{each['prompt_tokens']:,}"]
        cells += [str(each["nodes"]), str(each["cores"])]
        for name in RATES:
            ratio = "-" if peer is None else f"{each[name] / peer[name]:.2f}"
            cells += [_rate(each, name), "-" if peer is None else _rate(peer, name), ratio]
        lines.append(cells)
        counts.append(len(each["prompt_runs"]))
    titles = ["model", "after", "prompt", "nodes", "cores", "prefill: zmoe", REFERENCE, "ratio"]
    markdown_table([*titles, "decode: zmoe", REFERENCE, "ratio"], lines)
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    print(
        f"\nTokens/s, medians of {rounds} rounds; in brackets the spread from the slowest to the "
        f"fastest round, over the median. {where['cpu']}, {where['cores']} cores, "
        f"zmoe {(where['commit'] or 'unknown')[:12]}."
    )


def _rate(row: Mapping[str, Any], name: str) -> str:
    rate = row[name]
    return f"{rate:.{1 if rate < 100 else 0}f} ({row[name.replace('tps', 'spread')]:.0%})"


def show_kept(options: argparse.Namespace) -> None:
    """What --save kept of all models, with the environment of the last."""
    reports = [kept(short_name(model)) for model in options.models]
    results = [row for report in reports for row in report["results"]]
    finish(options, {**reports[-1], "results": results}, markdown if options.markdown else show)


def rows_to_add_to(of: str, commit: str | None) -> list[dict[str, Any]]:
    """The rows that were kept, or none where they are of another version."""
    try:
        report = kept(of)
    except BenchError:
        return []
    if report["environment"]["commit"] == commit:
        return list(report["results"])
    print(f"begins anew: what was kept is of {report['environment']['commit']}", file=sys.stderr)
    return []


def benchmark() -> int:
    options = arguments()
    if options.kept:
        show_kept(options)
        return 0
    block = environment()
    of = "families" if options.families else short_name(options.models[0])
    earlier = rows_to_add_to(of, block["commit"]) if options.add else []
    with ExitStack() as stack:
        models = options.models
        if options.families:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with_gguf = any(name.startswith(REFERENCE) for name in options.peers)
            most = max(options.contexts) + options.prompt_tokens + options.max_tokens + 1
            models = [make_family(name, folder, most, with_gguf) for name in options.families]
        found, others = cases(options, models)
        rows = measure(options, found, others, earlier)
    add_ratios(rows)
    block["builds"] = others.builds
    block["load_average_after"] = environment()["load_average"]
    report = {"environment": block, "results": rows, "absent": others.absent}
    finish(options, report, markdown if options.markdown else show, of=of)
    return 1 if others.failed else 0


if __name__ == "__main__":
    main(benchmark)
