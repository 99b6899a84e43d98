"""The planner against measurement on this machine: tokens/s predicted and measured.

A profile of the machine is measured first (zmoe-plan --calibrate), or read. Each
configuration is then predicted from it and run by real nodes, processes of their
own that are started anew in each round; the configurations take turns. Figures
are medians over the rounds.

What memory gives may change from minute to minute where a machine is shared with
others. With --beside the matmuls of the model's format are measured again right
before and after each run, and a second prediction has these in the profile's place.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from common import (
    BenchError,
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
from decode import BREAKDOWN
from engines import script

from zmoe.calibration.matmuls import FILE_BYTES, Matmuls
from zmoe.calibration.scratch import scratch
from zmoe.calibration.weights import FORMATS
from zmoe.checkpoint.hub import resolve_model
from zmoe.cli.plan.names import find_model
from zmoe.config import POLICIES, SCHEDULES
from zmoe.errors import ZmoeError
from zmoe.perf.profile import Profile, read_profile
from zmoe.placement.predict import Prediction, Setup, Workload, predict

PLACEMENT = "experts"
CALIBRATION_S = 600.0
ROUNDS = 2  # of matmuls, before a run and after it
TERMS = ("load", "compute", "latency", "transfer", "overhead")


def arguments() -> argparse.Namespace:
    made = parser("Compare the planner's predictions with real runs on this machine.")
    add = made.add_argument
    add("models", nargs="+", help="folders or names, two or more for a claim")
    add("--profile", type=Path, help="of this machine (default: measure one first)")
    add("--nodes", type=list_of(positive), default=[1, 2, 3, 4], help="default 1,2,3,4")
    add("--schedules", type=list_of(one_of(SCHEDULES)), default=list(SCHEDULES))
    add("--policies", type=list_of(one_of(POLICIES)), default=list(POLICIES))
    add("-p", "--prompt-tokens", type=positive, default=64, help="random ones; default 64")
    add("-m", "--max-tokens", type=positive, default=24, help="default 24")
    add("--repetitions", type=positive, default=2, help="in each round's processes; default 2")
    add("--runs", type=positive, default=1, help="rounds; default 1")
    add("--deadline", type=positive, default=600, help="seconds for one run")
    add("--beside", action="store_true", help="also predict from matmuls measured beside each run")
    table_flags(made)
    options = made.parse_args()
    if options.max_tokens < 2:
        made.error("--max-tokens: the first token is the prompt's, so at least 2")
    check_table_flags(made, options)
    if options.kept and options.profile:
        made.error("--kept and --profile exclude each other")
    return options


@dataclass
class Configuration:
    """What is predicted and run, and what its runs told."""

    model: str
    nodes: int
    schedule: str
    policy: str
    setup: Setup
    runs: list[dict[str, Any]] = field(default_factory=list)
    beside: list[Prediction] = field(default_factory=list)  # from what was measured beside a run

    def row(self) -> dict[str, Any]:
        """`error`: of a prediction, as a share of what was measured."""
        measured = statistics.median(run["generation_tps"] for run in self.runs)
        prediction = predict(self.setup, self.nodes)
        predicted = prediction.tokens_per_second
        terms = {f"{term}_ms": 1e3 * getattr(prediction.decode, term) for term in TERMS}
        made = {
            "model": short_name(self.model),
            "nodes": self.nodes,
            "schedule": self.schedule,
            "policy": self.policy,
            "measured_tps": round(measured, 2),
            "measured_runs": [run for each in self.runs for run in each["generation_runs"]],
            "predicted_tps": round(predicted, 2),
            "error": round(predicted / measured - 1, 4),
            "executed_experts": round(prediction.busiest.count, 4),
            "predicted": {name: round(value, 3) for name, value in terms.items()},
            "measured": {
                name: round(statistics.median(run["breakdown"][name] for run in self.runs), 3)
                for name in BREAKDOWN
            },
        }
        if self.beside:
            predicted = statistics.median(each.tokens_per_second for each in self.beside)
            made["beside_tps"] = round(predicted, 2)
            made["beside_error"] = round(predicted / measured - 1, 4)
        return made


def configurations(options: argparse.Namespace, profile: Profile) -> list[Configuration]:
    """All combinations that differ: a node alone exchanges nothing, and pads nothing."""
    found = []
    for model in options.models:
        shape = find_model(str(resolve_model(model)), None, None)
        for nodes, schedule, policy in product(options.nodes, options.schedules, options.policies):
            if nodes == 1 and (schedule != options.schedules[0] or policy == "router-aided"):
                continue
            work = Workload(context=options.prompt_tokens + options.max_tokens // 2)
            setup = Setup(
                shape=shape,
                machines=(profile.machine,),
                link=profile.link,
                workload=work,
                schedule=schedule,
                policy=policy,
                placement=PLACEMENT,
                one_machine=True,
            )
            found.append(Configuration(model, nodes, schedule, policy, setup))
            predict(setup, nodes)  # which refuses what can't be
    return found


def measure(options: argparse.Namespace, each: Configuration, matmuls: Matmuls | None) -> None:
    """One run, between two measurements by `matmuls` of those that it consists of."""
    words = ["-p", str(options.prompt_tokens), "-n", str(options.max_tokens)]
    words += ["-r", str(options.repetitions), "--nodes", str(each.nodes)]
    words += [f"--schedule={each.schedule}", f"--policy={each.policy}", f"--placement={PLACEMENT}"]
    command = script("zmoe_cluster.py", each.model, None, *words)
    if matmuls is None:
        each.runs.append(run_json(command, options.deadline))
        return
    (machine,), shape = each.setup.machines, each.setup.shape
    formats = {shape.dense_format.name, shape.expert_format.name} & set(FORMATS)
    for _ in range(ROUNDS):
        matmuls.measure(formats)
    each.runs.append(run_json(command, options.deadline))
    for _ in range(ROUNDS):
        matmuls.measure(formats)
    others = [rate for rate in machine.rates if rate.format not in formats]
    machine = replace(machine, rates=(*others, *matmuls.rates(formats, 2 * ROUNDS)))
    each.beside.append(predict(replace(each.setup, machines=(machine,)), each.nodes))


def calibrated() -> Profile:
    """A profile of this machine, measured now."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        path = Path(folder) / "profile.json"
        command = [
            sys.executable,
            "-m",
            "zmoe.cli.plan.command",
            "--json",
            "--calibrate",
            str(path),
        ]
        run_json(command, CALIBRATION_S)
        return read_profile(path)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    block = environment()
    try:
        for model in options.models:
            resolve_model(model)
        profile = read_profile(options.profile) if options.profile else calibrated()
        todo = configurations(options, profile)
    except ZmoeError as error:
        raise BenchError(str(error)) from None
    with ExitStack() as stack:
        matmuls = None
        if options.beside:
            matmuls = stack.enter_context(Matmuls(stack.enter_context(scratch(FILE_BYTES))))
        for turn, each in product(range(options.runs), todo):
            name = f"{short_name(each.model)}, {each.nodes} nodes, {each.schedule}, {each.policy}"
            print(f"run {turn + 1}, {name}", file=sys.stderr)
            measure(options, each, matmuls)
    block["load_average_after"] = environment()["load_average"]
    rows = [each.row() for each in todo]
    report = {"environment": block, "results": rows, "errors": errors(rows, "error")}
    if options.beside:
        report["beside_errors"] = errors(rows, "beside_error")
    return report


def errors(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of the predictions, whichever way they err."""
    each = [abs(row[name]) for row in rows]
    return {"configurations": len(each), "median": statistics.median(each), "worst": max(each)}


def _sentence(report: Mapping[str, Any]) -> str:
    found, beside = report["errors"], report.get("beside_errors")
    text = (
        f"{found['configurations']} configurations: median error {found['median']:.1%}, "
        f"worst {found['worst']:.1%}."
    )
    if beside:
        text += f" From matmuls measured beside: {beside['median']:.1%}, {beside['worst']:.1%}."
    return text


TITLES = ("model", "nodes", "schedule", "policy", "measured", "predicted", "error", "beside")


def _cells(row: Mapping[str, Any]) -> list[str]:
    named = [str(row[name]) for name in TITLES[:4]]
    speeds = (f"{row[f'{name}_tps']:.1f}" for name in TITLES[4:6])
    beside = f"{row['beside_error']:+.1%}" if "beside_error" in row else "-"
    return [*named, *speeds, f"{row['error']:+.1%}", beside]


def markdown(report: Mapping[str, Any]) -> None:
    markdown_table(TITLES, [_cells(row) for row in report["results"]])
    print(f"\n{_sentence(report)}")


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for title in (*TITLES, *TERMS, *(name.removesuffix("_ms") for name in BREAKDOWN)):
        text = title in ("model", "schedule", "policy")
        table.add_column(title, justify="left" if text else "right", no_wrap=True)
    for row in report["results"]:
        parts = [*row["predicted"].values(), *row["measured"].values()]
        table.add_row(*_cells(row), *(f"{part:.2f}" for part in parts))
    console = Console()
    console.print(table)
    console.print(
        f"{_sentence(report)} Tokens/s; beside: the error with matmuls measured beside the run. "
        "Behind it, ms/token: predicted by term, then measured by the leader.",
        highlight=False,
    )


def benchmark() -> int:
    options = arguments()
    of = " ".join(short_name(model) for model in options.models)
    report = kept(of) if options.kept else measured(options)
    finish(options, report, markdown if options.markdown else show, of=of)
    return 0


if __name__ == "__main__":
    main(benchmark)
