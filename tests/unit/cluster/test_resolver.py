"""From what the user asks of the placement to the one that a run takes."""

from __future__ import annotations

import pytest

from tests.unit.placement.conftest import described
from zmoe.cluster.resolver import PlacementResolver
from zmoe.cluster.spec import PlacementRequest
from zmoe.config import EngineConfig
from zmoe.errors import PlacementError
from zmoe.perf.memory import PROGRAM_BYTES
from zmoe.placement.choose import Choice
from zmoe.placement.estimate import NodeResources

MODEL = described(dense_bytes=400 << 20)
EXPERTS = 16 * 4 * MODEL.expert_bytes
LEADER = NodeResources("a", 1 << 40, None, 25)
WORKER = NodeResources(
    "b", 1 << 40, PROGRAM_BYTES + EXPERTS, 25
)  # for all experts, and nothing else


def test_the_schedule_and_the_policy_reach_the_choice() -> None:
    """A centralised run's workers load no dense weights, so that the experts alone must fit."""
    chosen: list[Choice] = []

    def choose(**engine: str) -> None:
        config = EngineConfig(**engine)  # type: ignore[arg-type]
        PlacementResolver(PlacementRequest(), MODEL, 2, config, chosen.append).resolve(
            [LEADER, WORKER]
        )

    with pytest.raises(PlacementError, match="does not fit 2 nodes"):
        choose()
    choose(schedule="centralized")
    choose(schedule="centralized", policy="busy-full")
    assert all(choice.assumed.startswith("centralized, ") for choice in chosen)
    counts = [choice.considered[0].prediction for choice in chosen]
    assert counts[0] and counts[0].busiest.count < 4
    assert counts[1] and counts[1].busiest.count == 8  # all that a node has


def test_what_is_wrong_whatever_the_nodes_have() -> None:
    for way, words in (("slices", "slices at most"), ("experts", "use at most 16")):
        with pytest.raises(PlacementError, match=words):
            PlacementResolver(PlacementRequest(way), MODEL, 17, EngineConfig())


def test_those_that_are_left_divide_the_experts() -> None:
    """In room for half of the experts a node takes half of each, and alone it lacks the rest."""
    resolver = PlacementResolver(PlacementRequest("experts"), MODEL, 3, EngineConfig(compute="mlx"))
    half = NodeResources("a", 1 << 40, PROGRAM_BYTES + MODEL.dense_bytes + EXPERTS // 2, 25)
    assert resolver.divide([LEADER]).slices == ()
    slices = resolver.divide([half, half]).slices
    assert [stop - start for start, stop in slices] == [MODEL.moe_intermediate_size // 2] * 2
    with pytest.raises(PlacementError, match="does not fit 1 node: .* are missing per node"):
        resolver.divide([half])
