"""The paper's ladder of designs, measured rung by rung: tokens/s, and where a layer's time goes.

Every figure comes from processes of their own, started anew in each round; the
rungs take turns in each. All nodes are processes of this machine and share its
memory: what several nodes can gain where each has memory of its own, this does
not show. A row is the median over the rounds. Compare figures within one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import (
    BenchError,
    ChildError,
    check_table_flags,
    environment,
    finish,
    kept,
    list_of,
    main,
    one_of,
    parser,
    positive,
    run_json,
    short_name,
    table_flags,
)
from decode import BREAKDOWN
from engines import Engine, Layout, layout, script
from ladder_report import exchange_ratios, markdown, plot, show
from limits import exchange_us, read_gb_per_s
from rungs import RUNGS, Bytes, Rung, model_bytes

from zmoe.checkpoint.hub import resolve_model
from zmoe.errors import ZmoeError
from zmoe.placement.types import ModelInfo

REFUSED = (2, 3)  # exit statuses: bad input and absent, as bench/peers/process.py has them
WIRE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

Reads = Mapping[int, float]  # GB/s, by number of cores


def arguments() -> argparse.Namespace:
    made = parser("Measure the paper's ladder of designs on one model.")
    add = made.add_argument
    add("model", help="folder or name; bench/make_model.py --shape dbrx makes DBRX's layers")
    add(
        "--nodes",
        type=list_of(layout),
        default=[layout(text) for text in ("2", "3", "4")],
        help="N nodes on a core each, or NxC: on C cores each (default 2,3,4)",
    )
    rungs = list_of(one_of(tuple(RUNGS)))
    add("--rungs", type=rungs, default=list(RUNGS), help=f"default {','.join(RUNGS)}")
    add("-p", "--prompt-tokens", type=positive, default=32, help="random ones; default 32")
    add("-m", "--max-tokens", type=positive, default=32, help="default 32")
    add("--runs", type=positive, default=3, help="rounds; default 3")
    add("--deadline", type=positive, default=1800, help="seconds for one run")
    add("--plot", type=Path, metavar="FILE", help="also draw the layers' parts (png, svg, pdf)")
    table_flags(made)
    options = made.parse_args()
    if any(each.nodes < 2 for each in options.nodes):
        made.error("--nodes: a rung takes at least 2")
    if options.max_tokens < 2:
        made.error("--max-tokens: the first token is the prompt's, so at least 2")
    if options.plot is not None and find_spec("matplotlib") is None:
        made.error("--plot needs matplotlib: pip install '.[bench]'")
    check_table_flags(made, options)
    return options


@dataclass
class Turns:
    """One rung on one layout, and what its runs so far have told."""

    rung: Rung
    layout: Layout
    engine: Engine
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.rung.name}, {self.layout.nodes} nodes"


class Ladder:
    """The measurements of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.reads: defaultdict[int, list[float]] = defaultdict(list)  # GB/s, by cores
        self.absent: dict[str, str] = {}
        self.failed = False

    def measure(self) -> list[Turns]:
        """All rungs that can run; the rounds interleaved."""
        turns = [
            Turns(RUNGS[name], layout, self._engine(RUNGS[name], layout))
            for name in self.options.rungs
            for layout in self.options.nodes
        ]
        layouts = self.options.nodes
        cores = {node_cores(each) for each in layouts} | {each.cores or 1 for each in layouts}
        for number in range(self.options.runs):
            for count in sorted(cores):
                self.reads[count].append(read_gb_per_s(count))
            for turn in turns:
                if turn.name not in self.absent:
                    print(f"run {number + 1}, {turn.name}", file=sys.stderr)
                    self._run(turn)
        measured = [turn for turn in turns if turn.runs]
        if not measured:
            raise BenchError(f"no rung could be measured: {next(iter(self.absent.values()))}")
        return measured

    def _run(self, turn: Turns) -> None:
        try:
            turn.runs.append(run_json(turn.engine.command, self.options.deadline))
        except ChildError as error:
            refused = error.status in REFUSED
            self.absent[turn.name] = error.said if refused else f"failed: {error}"
            self.failed |= not refused
        except BenchError as error:
            self.absent[turn.name], self.failed = f"failed: {error}", True

    def _engine(self, rung: Rung, layout: Layout) -> Engine:
        options = self.options
        words = ["-p", str(options.prompt_tokens), "-n", str(options.max_tokens), "-r", "1"]
        words += ["--nodes", str(layout.nodes), "--record", *rung.flags()]
        command = script(rung.program, options.model, layout.cores, *words)
        return Engine(rung.name, layout.nodes, layout.cores, command)


def node_cores(layout: Layout) -> int:
    """Cores of one node."""
    return max(1, (layout.cores or layout.nodes) // layout.nodes)


def row(turn: Turns, model: str, info: ModelInfo, sizes: Bytes) -> dict[str, Any]:
    """Medians over the runs; `layer_*` are of one layer of a decode step."""
    rung, nodes, runs = turn.rung, turn.layout.nodes, turn.runs
    made: dict[str, Any] = {
        "model": model,
        "rung": rung.name,
        "nodes": nodes,
        "cores": turn.layout.cores,
        "settings": dict(rung.settings),
        "messages_per_layer": rung.messages(info.top_k, nodes),
        "executed_experts": rung.executed(info, nodes),
        "busiest_node_bytes": sizes.of_busiest(rung, info, nodes),
        "all_nodes_bytes": sizes.of_all(rung, info, nodes),
        "peak_memory": max(max(run["peak_memory"]) for run in runs),
    }
    for name in ("prompt_tokens", "generation_tokens"):
        made[name] = runs[0][name]
    for name in ("prompt_tps", "generation_tps"):
        made[name] = round(statistics.median(run[name] for run in runs), 3)
        made[name.replace("tps", "runs")] = [round(run[name], 3) for run in runs]
    for name in BREAKDOWN:
        made[name] = round(statistics.median(run["breakdown"][name] for run in runs), 3)
    for name in ("experts_ms", "exchange_ms", "exchange_p50_ms"):
        made[f"layer_{name}"] = round(statistics.median(run["layer"][name] for run in runs), 4)
    layer_ms = sum(made[name] for name in BREAKDOWN) / len(info.moe_layers)
    parts = made["layer_experts_ms"] + made["layer_exchange_ms"]
    made["layer_ms"], made["layer_other_ms"] = round(layer_ms, 4), round(layer_ms - parts, 4)
    made["exchange_share"] = round(made["layer_exchange_ms"] / layer_ms, 4)
    return made


def compare(turns: Sequence[Turns], rows: Sequence[dict[str, Any]], reads: Reads) -> None:
    """Add to every row its rates as multiples of the rung's before, and what memory allows."""
    by_name = {(each["rung"], each["nodes"]): each for each in rows}
    for turn, each in zip(turns, rows, strict=True):
        before = by_name.get((turn.rung.before or "", each["nodes"]))
        for name in ("prompt", "generation"):
            if before is not None:
                ratio = each[f"{name}_tps"] / before[f"{name}_tps"]
                each[f"{name}_ratio"] = round(ratio, 3)
        if each["all_nodes_bytes"] is not None:
            # Of replicas nobody knows the busiest node's.
            alone = (each["busiest_node_bytes"] or 0) / reads[node_cores(turn.layout)]
            together = each["all_nodes_bytes"] / reads[turn.layout.cores or 1]
            each["limit_tps"] = round(1e9 / max(alone, together), 3)


def measured(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The report, and whether something failed."""
    block, ladder = environment(), Ladder(options)
    try:
        info, sizes = model_bytes(resolve_model(options.model))
    except ZmoeError as error:
        raise BenchError(str(error)) from None
    payload = info.hidden_size * WIRE_BYTES[info.dtype]
    counts = sorted({each.nodes for each in options.nodes})
    exchanges = exchange_us(counts, payload, options.runs)
    turns = ladder.measure()
    rows = [row(turn, short_name(options.model), info, sizes) for turn in turns]
    reads = {cores: statistics.median(speeds) for cores, speeds in sorted(ladder.reads.items())}
    compare(turns, rows, reads)
    block["load_average_after"] = environment()["load_average"]
    report = {
        "environment": block,
        "results": rows,
        "absent": ladder.absent,
        "layers": len(info.moe_layers),
        "exchange_ratios": exchange_ratios(rows),
        "limits": {"read_gb_per_s": reads, "exchange_us": exchanges},
    }
    return report, ladder.failed


def benchmark() -> int:
    options = arguments()
    of = short_name(options.model)
    report, failed = (kept(of), False) if options.kept else measured(options)
    finish(options, report, markdown if options.markdown else show, of=of)
    if options.plot is not None:
        plot(report, options.plot)
    return 1 if failed else 0


if __name__ == "__main__":
    main(benchmark)
