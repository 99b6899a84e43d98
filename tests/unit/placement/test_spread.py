"""Experts dealt out as numbers: sums, limits, order; the best there is, by trying all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.errors import PlacementError
from zmoe.placement.spread import copies, over_layers, proportional, runs, spread_replicas

NODES = st.lists(st.integers(0, 45), min_size=1, max_size=6)


@given(st.integers(1, 64), st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.booleans())
def test_proportional(total: int, weights: list[float], nobody_without: bool) -> None:
    if nobody_without and total < len(weights):
        return
    counts = proportional(total, weights, least=int(nobody_without))
    assert sum(counts) == total and min(counts) >= int(nobody_without)
    for weight, count in zip(weights, counts):
        assert all(count >= other for less, other in zip(weights, counts) if less < weight)


def test_equal_weights_differ_by_one_at_most() -> None:
    assert proportional(16, [1] * 3) == (6, 5, 5)


@given(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
@settings(deadline=None)
def test_no_split_within_the_limits_ends_earlier(
    total: int, speeds: list[int], data: st.DataObject
) -> None:
    beside = data.draw(st.sampled_from((0, 3)))
    most = data.draw(st.lists(st.integers(0, 12), min_size=len(speeds), max_size=len(speeds)))
    if sum(most) < total:
        with pytest.raises(PlacementError, match=f"{total} experts do not fit {sum(most)} slots"):
            proportional(total, speeds, most)
        return
    counts = proportional(total, speeds, most, beside=beside)
    assert sum(counts) == total and all(c <= m for c, m in zip(counts, most))
    every = product(*(range(min(m, total) + 1) for m in most))

    def end(split: Sequence[int]) -> float:
        return max((beside + c) / s for c, s in zip(split, speeds) if c)

    assert end(counts) == min(end(split) for split in every if sum(split) == total)


@given(st.integers(1, 12), st.integers(1, 40), st.data())
def test_over_layers_keeps_sums_and_differs_by_one(
    layers: int, experts: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    totals = proportional(layers * experts, weights)
    spread = over_layers(totals, layers)
    assert [sum(counts) for counts in spread] == [experts] * layers
    assert tuple(map(sum, zip(*spread))) == totals
    for counts in zip(*spread):
        assert max(counts) - min(counts) <= 1


def test_runs() -> None:
    assert runs((2, 0, 3)) == ((0, 1), (), (2, 3, 4))


# ---- copies ----------------------------------------------------------------------


def can_be_placed(wanted: list[int], room: list[int]) -> bool:
    """By trying: each expert on so many distinct nodes."""
    if not wanted:
        return True
    free = [node for node, left in enumerate(room) if left]
    return any(
        can_be_placed(wanted[1:], [left - (n in on) for n, left in enumerate(room)])
        for on in combinations(free, wanted[0])
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.data())
@settings(deadline=None)
def test_copies_are_as_many_as_can_be_placed(room: list[int], data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 4))
    heat = data.draw(st.lists(st.integers(1, 5), min_size=experts, max_size=experts))
    if sum(min(r, experts) for r in room) < experts:
        return
    room = [min(r, experts) for r in room]
    wanted = copies(experts, room, heat)
    assert can_be_placed(wanted, room)
    for expert in range(experts):
        more = [count + (e == expert) for e, count in enumerate(wanted)]
        assert not can_be_placed(more, room), "room is left"


@given(st.integers(1, 40), NODES, st.data())
@settings(deadline=None)
def test_spread_replicas_fills_the_room_and_leaves_nobody_out(
    experts: int, slots: list[int], data: st.DataObject
) -> None:
    room = [min(slot, experts) for slot in slots]
    warm = st.lists(st.integers(0, 99), min_size=experts, max_size=experts)
    heat = data.draw(st.none() | warm)
    if sum(room) < experts:
        with pytest.raises(PlacementError, match=f"{experts} experts per layer do not fit"):
            spread_replicas(experts, slots, heat)
        return
    owners = spread_replicas(experts, slots, heat)
    assert owners == spread_replicas(experts, slots, heat)
    assert len(owners) == experts
    for each in owners:
        assert each and len(set(each)) == len(each)
    assert [sum(node in each for each in owners) for node in range(len(room))] == room
    for one, another in combinations(range(experts), 2):
        hotter = 0 if heat is None else heat[one] - heat[another]
        fewer = len(owners[one]) - len(owners[another])
        assert hotter * fewer >= 0 if hotter else abs(fewer) <= 1


def test_pairs_of_owners_are_spread() -> None:
    pairs = spread_replicas(16, [8] * 4)
    assert all(len(each) == 2 for each in pairs)
    counts = [pairs.count(pair) for pair in combinations(range(4), 2)]
    assert max(counts) - min(counts) <= 1


def test_the_hot_are_apart() -> None:
    owners = spread_replicas(8, [4, 4], [100, 100, 1, 1, 1, 1, 1, 1])
    assert owners[0] != owners[1]
    owners = spread_replicas(8, [6, 6], [100, 100, 1, 1, 1, 1, 1, 1])
    assert owners[0] == owners[1] == (0, 1)


def test_experts_that_nobody_chose_get_as_many_copies() -> None:
    assert sorted(map(len, spread_replicas(2, [1, 1, 2], [0, 0]))) == [2, 2]
