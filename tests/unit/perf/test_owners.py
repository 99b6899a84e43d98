"""Replicas: the best assignment, against trying all of them."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.errors import PlacementError
from zmoe.perf.owners import SAMPLES, Replicated, Whole
from zmoe.perf.routing import distinct_experts, expected_largest
from zmoe.placement.spread import proportional, spread_replicas


def mean_busiest(owners: Replicated | Whole) -> float:
    nodes = len(owners.local)
    return sum(1 - owners.within([limit] * nodes) for limit in range(max(owners.local)))


def tried(owners: list[tuple[int, ...]], top_k: int, limits: list[int]) -> float:
    """Share of the selections that some assignment keeps within the limits."""
    selections = list(combinations(owners, top_k))

    def fits(chosen: tuple[tuple[int, ...], ...]) -> bool:
        return any(
            all(assignment.count(node) <= limit for node, limit in enumerate(limits))
            for assignment in product(*chosen)
        )

    return sum(map(fits, selections)) / len(selections)


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_equals_trying_every_assignment(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 3))
    every = [c for size in range(1, nodes + 1) for c in combinations(range(nodes), size)]
    owners = data.draw(st.lists(st.sampled_from(every), min_size=2, max_size=6))
    owners[0] = tuple(range(nodes))  # so that every node owns something
    top_k = data.draw(st.integers(1, len(owners)))
    limits = data.draw(st.lists(st.integers(0, 4), min_size=nodes, max_size=nodes))
    replicated = Replicated(owners, distinct_experts(len(owners), top_k, 1))
    assert replicated.samples == 0
    assert replicated.within(limits) == pytest.approx(tried(owners, top_k, limits))


def test_half_of_the_experts_on_each_of_four_nodes() -> None:
    drawn = distinct_experts(16, 4, 1)
    owners = spread_replicas(16, [8] * 4)
    assert all(len(each) == 2 for each in owners)
    assert mean_busiest(Replicated(owners, drawn)) <= 1.25 * 4 / 4
    assert expected_largest(proportional(16, [1] * 4), drawn) > 1.9


def test_one_copy_is_the_same_as_whole_experts() -> None:
    drawn = distinct_experts(12, 3, 1)
    local = proportional(12, [1] * 3)
    single = [(node,) for node, count in enumerate(local) for _ in range(count)]
    assert mean_busiest(Replicated(single, drawn)) == pytest.approx(
        mean_busiest(Whole(local, drawn))
    )


def test_sampling_is_near_the_exact_value_and_repeats() -> None:
    drawn = distinct_experts(64, 8, 1)  # C(64, 8) selections are too many to list
    single = [(expert % 4,) for expert in range(64)]
    sampled = Replicated(single, drawn)
    assert sampled.samples == SAMPLES
    exact = Whole(proportional(64, [1] * 4), drawn)
    for limit in range(9):
        p = exact.within([limit] * 4)
        assert abs(sampled.within([limit] * 4) - p) <= 4 * (p * (1 - p) / SAMPLES) ** 0.5 + 1e-6
    assert Replicated(single, drawn).within([3] * 4) == sampled.within([3] * 4)


def test_too_many_nodes_for_subsets() -> None:
    with pytest.raises(PlacementError, match="replicas over 12 nodes"):
        Replicated([(node, 0) for node in range(12)], distinct_experts(12, 2, 1))
