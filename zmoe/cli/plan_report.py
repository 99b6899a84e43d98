"""What zmoe-plan shows: the JSON object, the table, the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from zmoe import __version__
from zmoe.errors import InputError
from zmoe.planner.advice import best, caveats, conclusions, purchases, what_to_buy
from zmoe.planner.hardware import GIB, MACHINES
from zmoe.planner.plan import Prediction, Setup

TERMS = ("load", "compute", "latency", "transfer", "overhead")


def report_of(
    setup: Setup, predictions: Sequence[Prediction], target: float | None
) -> dict[str, Any]:
    """The object that `--json` prints: every parameter with its source, and a row a node count."""
    said = conclusions(predictions)
    bought: list[dict[str, Any]] | None = None
    if target is not None:
        found = purchases(setup, target, MACHINES)
        bought = [asdict(purchase) for purchase in found]
        said += what_to_buy(setup, target, found)
    shape, fastest = setup.shape, best(predictions)
    environment = {
        "zmoe": __version__,
        "model": {
            **asdict(shape),
            "parameters": shape.parameters,
            "active_parameters": shape.active_parameters,
        },
        "hardware": [asdict(machine) for machine in setup.machines],
        "link": asdict(setup.link),
        "workload": asdict(setup.workload),
        "schedule": setup.schedule,
        "policy": setup.policy,
        "placement": setup.placement,
        "wire_bytes": setup.wire_bytes,
        "one_machine": setup.one_machine,
        "best_nodes": fastest.nodes if fastest else None,
        "target_tokens_per_second": target,
        "purchases": bought,
        "conclusions": said + caveats(setup, predictions),
    }
    return {"environment": environment, "results": [p.row() for p in predictions]}


def show(setup: Setup, predictions: Sequence[Prediction], said: Sequence[str]) -> None:
    """The table, and what follows from it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(setup), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("nodes", "tok/s", *TERMS, "comm.", "GiB", "kUSD"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = "load to overhead: milliseconds a step; GiB: of the fullest node"
    for prediction in predictions:
        table.add_row(*_cells(prediction))
    console = Console()
    console.print(table)
    for sentence in said:
        console.print(sentence, highlight=False)


def _title(setup: Setup) -> str:
    shape = setup.shape
    machines = ", ".join(machine.name for machine in setup.machines)
    bits = f"{shape.expert_format.bits_per_weight:g} bits"
    return f"{shape.name}, {bits}, on {machines} over {setup.link.name}"


def _cells(prediction: Prediction) -> list[str]:
    price = prediction.price_usd
    memory = f"{max(prediction.memory) / GIB:.1f}"
    money = "?" if price is None else f"{price / 1000:.1f}"
    if not prediction.fits:
        return [str(prediction.nodes), "no fit", *["-"] * (len(TERMS) + 1), memory, money]
    time = prediction.decode
    return [
        str(prediction.nodes),
        f"{prediction.tokens_per_second:.3g}",
        *(f"{1e3 * getattr(time, term):.1f}" for term in TERMS),
        f"{time.communication_share:.0%}",
        memory,
        money,
    ]


def plotter(path: Path) -> Callable[[Sequence[Prediction]], None]:
    """What draws predictions into `path`. Raises InputError when nothing can."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path}: expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: no such folder {path.parent}")
    try:
        figures = import_module("matplotlib.figure")
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'zmoe[plot]'") from None
    return lambda predictions: _draw(figures.Figure(figsize=(9, 4)), predictions, path)


def _draw(figure: Any, predictions: Sequence[Prediction], path: Path) -> None:
    """Milliseconds a step by cause, and tokens/s, over the numbers of nodes that fit."""
    fitting = [p for p in predictions if p.fits]
    names = [str(p.nodes) for p in fitting]
    times, speeds = figure.subplots(1, 2)
    below = [0.0] * len(fitting)
    for term in TERMS:
        heights = [1e3 * getattr(p.decode, term) for p in fitting]
        times.bar(names, heights, bottom=below, label=term)
        below = [b + h for b, h in zip(below, heights)]
    times.set(xlabel="nodes", ylabel="milliseconds a step")
    times.set_ylim(0, 1.35 * max(below, default=1.0))  # room for the legend
    times.legend(ncols=3, loc="upper center", fontsize="small")
    speeds.plot(names, [p.tokens_per_second for p in fitting], marker="o")
    speeds.set(xlabel="nodes", ylabel="tokens/s")
    speeds.set_ylim(0, 1.1 * max((p.tokens_per_second for p in fitting), default=1.0))
    if predictions:
        figure.suptitle(_title(predictions[0].setup))
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"--plot {path}: cannot be written: {error.strerror}") from None
