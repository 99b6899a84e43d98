"""What computing in MLX's graph (docs/graph.md) gains over evaluating every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zmoe.errors import PlacementError
from zmoe.perf.hardware import FAST_CROSSING_S
from zmoe.placement.predict import Prediction, Setup, predict
from zmoe.placement.remedy import counted

FAST = "fast synch"


@dataclass(frozen=True)
class Compared:
    """A number of nodes, by form; None where a form cannot be."""

    evaluated: Prediction
    in_graph: Mapping[str, Prediction | None]

    @property
    def best(self) -> Prediction | None:
        """The fastest in the graph that fits and needs no setting."""
        usual = [p for label, p in self.in_graph.items() if FAST not in label]
        fitting = [p for p in usual if p is not None and p.fits]
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
    usual = setup.schedule == "decentralized" and setup.policy == "selected"
    if refused or not usual or None in crossings:
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
    """Which number of nodes is fastest in the graph, and by how much."""
    found = [each for each in compared if each.best is not None]
    if not found:
        return []
    fastest = max(found, key=lambda each: _speed(each.best) or 0.0)
    best = fastest.best
    assert best is not None
    line = f"In MLX's graph: {counted(best.nodes)}, {best.tokens_per_second:.3g} tokens/s"
    if best.sharded:
        line += " with sharded attention"
    others = [_speed(each.evaluated) for each in compared]
    known = [speed for speed in others if speed is not None]
    if known:
        line += f", {best.tokens_per_second / max(known):.3g} times the fastest that evaluates"
    alone = found[0].best
    assert alone is not None
    if best.nodes > 1 and alone.nodes == 1:
        line += f" and {best.tokens_per_second / alone.tokens_per_second:.3g} times one node"
    return [line + "."]
