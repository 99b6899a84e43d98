"""What computing in MLX's graph (docs/graph.md) gains over evaluating every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zmoe.errors import PlacementError
from zmoe.perf.cost import may_be_in_graph
from zmoe.perf.hardware import FAST_CROSSING_S
from zmoe.placement.predict import Prediction, Setup, predict
from zmoe.placement.remedy import counted

FAST = "fast synch"


@dataclass(frozen=True)
class Compared:
    """A number of nodes, by form; None where a form cannot be."""

    evaluated: Prediction
    in_graph: Mapping[str, Prediction | None]

    def best(self, *, fast: bool = False) -> Prediction | None:
        """The fastest in the graph that fits; without `fast` synch, unless that is asked for."""
        asked = [p for label, p in self.in_graph.items() if fast or FAST not in label]
        fitting = [p for p in asked if p is not None and p.fits]
        return max(fitting, key=lambda p: p.tokens_per_second, default=None)

    def row(self) -> dict[str, Any]:
        """Tokens/s by form; null where it cannot be, or does not fit."""
        return {label: _speed(prediction) for label, prediction in self.in_graph.items()}


def _speed(prediction: Prediction | None) -> float | None:
    return prediction.tokens_per_second if prediction is not None and prediction.fits else None


def forms(setup: Setup) -> dict[str, Setup]:
    """`setup` in the graph, by label: as a run takes it, with attention cut by heads, and either
    with MLX_METAL_FAST_SYNCH=1. Empty where a run would evaluate every layer.
    """
    crossings = [machine.crossing_s for machine in setup.machines]
    refused = setup.one_machine or setup.given is not None or setup.placement == "replicas"
    if refused or not may_be_in_graph(setup.schedule, setup.policy) or None in crossings:
        return {}
    graph = replace(setup, in_graph=True, placement="slices")
    found = {"graph": graph, "sharded": replace(graph, sharded=True)}
    if any(crossing is not None and crossing > FAST_CROSSING_S for crossing in crossings):
        machines = tuple(
            replace(machine, crossing_s=min(FAST_CROSSING_S, machine.crossing_s or 0.0))
            for machine in setup.machines
        )
        quick = {label: replace(each, machines=machines) for label, each in found.items()}
        found |= {FAST: quick["graph"], f"{FAST}, sharded": quick["sharded"]}
    return found


def compare(setup: Setup, predictions: Sequence[Prediction]) -> list[Compared]:
    """Each of `predictions` beside the same number of nodes in the graph; empty without one."""
    asked = forms(setup)
    if not asked:
        return []
    return [
        Compared(made, {label: _predicted(each, made.nodes) for label, each in asked.items()})
        for made in predictions
    ]


def _predicted(setup: Setup, nodes: int) -> Prediction | None:
    if nodes == 1 and setup.sharded:
        return None
    try:
        return predict(setup, nodes)
    except PlacementError:  # slices or heads that do not divide
        return None


def gains(compared: Sequence[Compared]) -> list[str]:
    """Which number of nodes is fastest in the graph, and by how much; and with fast synch."""
    best = _best(compared, fast=False)
    if best is None:
        return []
    line = f"In MLX's graph: {_named(best)}"
    known = [s for s in (_speed(each.evaluated) for each in compared) if s is not None]
    if known:
        line += f", {best.tokens_per_second / max(known):.3g} times the fastest that evaluates"
    alone = compared[0].best()
    if best.nodes > 1 and alone is not None and alone.nodes == 1:
        line += f" and {best.tokens_per_second / alone.tokens_per_second:.3g} times one node"
    said, quick = [line + "."], _best(compared, fast=True)
    if quick is not None and quick.tokens_per_second > best.tokens_per_second:
        said.append(f"With MLX_METAL_FAST_SYNCH=1, under which GPUs may hang: {_named(quick)}.")
    return said


def _best(compared: Sequence[Compared], *, fast: bool) -> Prediction | None:
    found = [best for each in compared if (best := each.best(fast=fast)) is not None]
    return max(found, key=lambda p: (p.tokens_per_second, -p.nodes), default=None)


def _named(made: Prediction) -> str:
    how = " with sharded attention" if made.sharded else ""
    return f"{counted(made.nodes)}, {made.tokens_per_second:.3g} tokens/s{how}"
