"""Executed experts: exact values, against enumeration."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.perf.routing import (
    MOST_EXPERTS,
    distinct_experts,
    expected_largest,
    mean_distinct,
    probability_within,
)
from zmoe.placement.spread import proportional


def one_row(experts: int, top_k: int, nodes: int) -> float:
    drawn = distinct_experts(experts, top_k, 1)
    return expected_largest(proportional(experts, [1] * nodes), drawn)


@pytest.mark.parametrize(
    ("experts", "top_k", "nodes", "expected"),
    [  # FIELD.md, section 1: exact, of the paper's performance model
        (16, 4, 2, 2.6462),
        (16, 4, 4, 1.9692),
        (8, 2, 2, 1.4286),
        (64, 8, 2, 5.0225),
        (128, 8, 4, 3.4859),
    ],
)
def test_the_papers_executed_experts(experts: int, top_k: int, nodes: int, expected: float) -> None:
    assert one_row(experts, top_k, nodes) == pytest.approx(expected, abs=5e-5)


def node_of(local: tuple[int, ...]) -> list[int]:
    return [node for node, count in enumerate(local) for _ in range(count)]


def enumerated(local: tuple[int, ...], top_k: int, rows: int) -> float:
    """Mean largest count over every routing of `rows` rows."""
    home = node_of(local)
    choices = list(combinations(range(len(home)), top_k))
    total = 0
    for routing in product(choices, repeat=rows):
        counts = [0] * len(local)
        for expert in set().union(*routing):
            counts[home[expert]] += 1
        total += max(counts)
    return total / len(choices) ** rows


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_equals_enumeration(data: st.DataObject) -> None:
    local = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    top_k = data.draw(st.integers(1, min(3, sum(local))))
    rows = data.draw(st.integers(1, 3 if comb(sum(local), top_k) <= 20 else 1))
    drawn = distinct_experts(sum(local), top_k, rows)
    assert expected_largest(local, drawn) == pytest.approx(enumerated(local, top_k, rows))


@given(st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=40)
def test_distinct_experts_is_a_distribution_with_the_known_mean(
    experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, min(16, experts)))
    rows = data.draw(st.integers(1, 600))
    drawn = distinct_experts(experts, top_k, rows)
    assert sum(drawn) == pytest.approx(1)
    mean = sum(u * p for u, p in enumerate(drawn))
    assert mean == pytest.approx(mean_distinct(experts, top_k, rows))


@given(st.integers(2, 64), st.data())
@settings(deadline=None, max_examples=60)
def test_bounds_and_monotonicity(experts: int, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, min(8, experts)))
    top_k = data.draw(st.integers(1, experts - 1))
    largest = one_row(experts, top_k, nodes)
    assert max(top_k / nodes, 1) - 1e-9 <= largest <= min(top_k, -(-experts // nodes)) + 1e-9
    assert largest <= one_row(experts, top_k + 1, nodes) + 1e-9
    even, drawn = proportional(experts, [1] * nodes), distinct_experts(experts, top_k, 2)
    more_rows = expected_largest(even, drawn)
    assert largest <= more_rows + 1e-9


def test_many_experts_stay_in_a_floats_range() -> None:
    assert one_row(MOST_EXPERTS, 16, 8) == pytest.approx(one_row(1000, 16, 8), rel=0.01)
    half = distinct_experts(MOST_EXPERTS, 512, 1)
    assert 64 <= expected_largest(proportional(MOST_EXPERTS, [1] * 8), half) < 128


def test_no_node_can_get_fewer_than_none() -> None:
    assert probability_within((2, 2), (-1, 2), distinct_experts(4, 1, 1)) == 0.0
