"""Even placement: every expert once, balanced, the same everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmoe.cluster.placement import place_evenly
from zmoe.errors import PlacementError
from zmoe.types import ModelInfo


def info(experts: int, layers: int) -> ModelInfo:
    return ModelInfo(
        path="some/model",
        model_type="dbrx",
        fingerprint="f",
        dtype="float32",
        quantization="none",
        layers=layers,
        moe_layers=tuple(range(layers)),
        experts=experts,
        top_k=1,
        hidden_size=8,
        exchange_width=8,
        context_length=None,
    )


@given(st.integers(1, 96), st.integers(1, 12), st.data())
def test_each_expert_has_one_owner_and_counts_differ_by_one(
    experts: int, layers: int, data: st.DataObject
) -> None:
    nodes = data.draw(st.integers(1, experts))
    placement = place_evenly(info(experts, layers), nodes)
    assert len(placement.owned) == layers
    for owned in placement.owned:
        assert sorted(e for mine in owned for e in mine) == list(range(experts))
        counts = [len(mine) for mine in owned]
        assert max(counts) - min(counts) <= 1
        assert all(mine == tuple(range(mine[0], mine[-1] + 1)) for mine in owned)


@given(st.integers(2, 40), st.integers(2, 8))
def test_what_does_not_divide_evens_out_over_the_layers(experts: int, nodes: int) -> None:
    nodes = min(nodes, experts)
    placement = place_evenly(info(experts, nodes), nodes)
    totals = [sum(len(owned[rank]) for owned in placement.owned) for rank in range(nodes)]
    assert len(set(totals)) == 1


def test_digest_tells_placements_apart() -> None:
    digests = {place_evenly(info(16, 2), nodes).digest for nodes in range(1, 17)}
    assert len(digests) == 16
    assert place_evenly(info(16, 2), 3).digest == place_evenly(info(16, 2), 3).digest


def test_more_nodes_than_experts_are_refused() -> None:
    with pytest.raises(PlacementError, match="5 nodes.*4 experts.*some/model.*at most 4"):
        place_evenly(info(4, 2), 5)
