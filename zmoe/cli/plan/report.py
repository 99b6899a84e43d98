"""The JSON object, the table and the plot of zmoe-plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zmoe import __version__
from zmoe.cli.plan.advice import best, caveats, conclusions, purchases, what_to_buy
from zmoe.cli.plan.forms import Compared, gains
from zmoe.cli.plan.known_hardware import MACHINES
from zmoe.errors import InputError
from zmoe.perf.hardware import GIB
from zmoe.placement.predict import Prediction, Setup

if TYPE_CHECKING:
    from rich.table import Table

TERMS = ("load", "compute", "latency", "transfer", "overhead")


def report_of(
    setup: Setup,
    predictions: Sequence[Prediction],
    compared: Sequence[Compared],
    target: float | None,
) -> dict[str, Any]:
    """Return the object of `--json`: all parameters with sources, and one row per node count."""
    said = conclusions(predictions) + gains(compared)
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
        "link": asdict(setup.link) if setup.link is not None else None,
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
    speeds = [each.row() for each in compared] if compared else [None for _ in predictions]
    rows = [
        {**made.row(), "tokens_per_second_in_graph": row} for made, row in zip(predictions, speeds)
    ]
    return {"environment": environment, "results": rows}


def show(
    setup: Setup,
    predictions: Sequence[Prediction],
    compared: Sequence[Compared],
    said: Sequence[str],
) -> None:
    """Print the table of predictions, that of MLX's graph, and the sentences in `said`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(setup), box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    unit, bytes_per_unit = ("GiB", GIB) if _most_memory(predictions) >= GIB else ("MiB", 1 << 20)
    for name in ("nodes", "tok/s", *TERMS, "comm.", "TTFT", unit, "kUSD"):
        table.add_column(name, justify="right", no_wrap=True)
    table.caption = (
        f"load to overhead: milliseconds per decode step; TTFT: milliseconds from a prompt of "
        f"{setup.workload.prompt} tokens to the first token; {unit}: of the fullest node"
    )
    for prediction in predictions:
        table.add_row(*_cells(prediction, bytes_per_unit))
    console = Console()
    console.print(table)
    if compared:
        console.print(_forms(compared))
    for sentence in said:
        console.print(sentence, highlight=False)


def _forms(compared: Sequence[Compared]) -> Table:
    from rich import box
    from rich.table import Table

    title = "tokens/s with layers evaluated one by one, and with slices in MLX's graph"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in ("nodes", "evaluated", *compared[0].in_graph):
        table.add_column(name, justify="right", no_wrap=True)
    for each in compared:
        speeds = (each.evaluated.tokens_per_second if each.evaluated.fits else None,)
        cells = ("-" if s is None else _short(s) for s in (*speeds, *each.row().values()))
        table.add_row(str(each.evaluated.nodes), *cells)
    table.caption = (
        "one node in the graph is mlx-lm's model; sharded: attention is cut by heads, too"
    )
    return table


def _title(setup: Setup) -> str:
    shape = setup.shape
    machines = ", ".join(machine.name for machine in setup.machines)
    bits = f"{shape.expert_format.bits_per_weight:g} bits"
    over = f" over {setup.link.name}" if setup.link is not None else ""
    return f"{shape.name}, {bits}, on {machines}{over}"


def _most_memory(predictions: Sequence[Prediction]) -> int:
    return max(max(prediction.memory) for prediction in predictions)


def _cells(prediction: Prediction, bytes_per_unit: int) -> list[str]:
    price = prediction.price_usd
    memory = f"{max(prediction.memory) / bytes_per_unit:.1f}"
    money = "?" if price is None else f"{price / 1000:.1f}"
    if not prediction.fits:
        return [str(prediction.nodes), "no fit", *["-"] * (len(TERMS) + 2), memory, money]
    time = prediction.decode
    return [
        str(prediction.nodes),
        _short(prediction.tokens_per_second),
        *(f"{1e3 * getattr(time, term):.1f}" for term in TERMS),
        f"{time.communication_share:.0%}",
        _short(1e3 * prediction.prefill.total),
        memory,
        money,
    ]


def _short(number: float) -> str:
    """Write three significant digits, or all digits before the decimal point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def plotter(path: Path) -> Callable[[Sequence[Prediction]], None]:
    """Return a function that draws predictions into `path`.

    If no prediction fits, that function writes no file and says so on standard error.
    Raises InputError if drawing is impossible.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path}: expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: no such folder {path.parent}")
    try:
        figures = import_module("matplotlib.figure")
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'zmoe[plot]'") from None

    def plot(predictions: Sequence[Prediction]) -> None:
        fitting = [p for p in predictions if p.fits]
        if fitting:
            _draw(figures.Figure(figsize=(9, 4)), fitting, path)
        else:
            print(f"--plot {path}: nothing fits, so nothing is drawn", file=sys.stderr)

    return plot


def _draw(figure: Any, fitting: Sequence[Prediction], path: Path) -> None:
    """Draw milliseconds per decode step by term, and tokens/s, over node counts."""
    names = [str(p.nodes) for p in fitting]
    times, speeds = figure.subplots(1, 2)
    below = [0.0] * len(fitting)
    for term in TERMS:
        heights = [1e3 * getattr(p.decode, term) for p in fitting]
        times.bar(names, heights, bottom=below, label=term)
        below = [b + h for b, h in zip(below, heights)]
    times.set(xlabel="nodes", ylabel="milliseconds a step")
    times.set_ylim(0, 1.35 * max(below))  # room for the legend
    times.legend(ncols=3, loc="upper center", fontsize="small")
    speeds.plot(names, [p.tokens_per_second for p in fitting], marker="o")
    speeds.set(xlabel="nodes", ylabel="tokens/s")
    speeds.set_ylim(0, 1.1 * max(p.tokens_per_second for p in fitting))
    figure.suptitle(_title(fitting[0].setup))
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"--plot {path}: cannot be written: {error.strerror}") from None
