"""The node that the others wait for, under each policy."""

from __future__ import annotations

import pytest

from zmoe.perf.busiest import Cost, all_local, router_aided, selected
from zmoe.perf.owners import Replicated, Whole
from zmoe.perf.routing import distinct_experts, expected_largest
from zmoe.placement.spread import proportional

DRAWN = distinct_experts(16, 4, 1)


def costs(local: tuple[int, ...], seconds: tuple[float, ...]) -> list[list[Cost]]:
    return [[Cost(load=n * each) for n in range(size + 1)] for size, each in zip(local, seconds)]


def test_equal_nodes_wait_for_the_largest_count() -> None:
    local = proportional(16, [1] * 4)
    busiest = selected(Whole(local, DRAWN), costs(local, (1.0,) * 4))
    assert busiest.count == pytest.approx(expected_largest(local, DRAWN))
    assert busiest.cost.load == pytest.approx(busiest.count)
    assert busiest.standard_error == 0


def test_a_slow_node_is_waited_for() -> None:
    """Two experts on two nodes, one of them ten times slower; one expert is drawn."""
    busiest = selected(Whole((1, 1), distinct_experts(2, 1, 1)), costs((1, 1), (1.0, 10.0)))
    assert busiest.cost.load == pytest.approx((1 + 10) / 2)


def test_a_replica_on_the_fast_node_spares_the_slow_one() -> None:
    owners = Replicated([(0,), (0, 1)], distinct_experts(2, 1, 1))
    assert selected(owners, costs((2, 1), (1.0, 10.0))).cost.load == pytest.approx(1)


def test_what_comes_before_the_experts_counts_on_every_node() -> None:
    before = [[Cost(load=5.0)], [Cost(load=1.0), Cost(load=2.0)]]
    assert selected(Whole((0, 1), (0.0, 1.0)), before).cost.load == 5.0


def test_router_aided_takes_as_long_as_selected_on_equal_nodes() -> None:
    local = proportional(16, [1] * 3)
    owners, equal = Whole(local, DRAWN), costs(local, (1.0,) * 3)
    assert router_aided(owners, equal).count == pytest.approx(selected(owners, equal).count)
    unequal = costs(local, (1.0, 1.0, 2.0))
    assert router_aided(owners, unequal).cost.load > selected(owners, unequal).cost.load


def test_busy_full_takes_all_local_experts() -> None:
    busiest = all_local(costs((6, 5, 5), (1.0, 1.0, 1.3)))
    assert busiest.count == 5
    assert busiest.cost.load == pytest.approx(6.5)
