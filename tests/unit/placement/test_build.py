"""Placements of every kind: each expert owned in full, memory never exceeded, balanced."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.conftest import described
from zmoe.errors import PlacementError
from zmoe.placement.build import (
    place_by_speed,
    place_evenly,
    place_replicas,
    place_slices,
    resident,
)
from zmoe.placement.check import check_placement

SPEEDS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(st.integers(1, 96), st.integers(1, 12), st.data())
def test_evenly_is_once_and_differs_by_one(experts: int, layers: int, data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, experts))
    shape = described(experts, layers).shape
    placement = place_evenly(shape, nodes)
    check_placement(placement, shape)
    for owned in placement.owned:
        assert sum(map(len, owned)) == experts
        counts = [len(mine) for mine in owned]
        assert max(counts) - min(counts) <= 1
        assert all(mine == tuple(range(mine[0], mine[-1] + 1)) for mine in owned)


@given(st.integers(2, 40), st.integers(2, 8))
def test_what_does_not_divide_evens_out_over_the_layers(experts: int, nodes: int) -> None:
    nodes = min(nodes, experts)
    placement = place_evenly(described(experts, nodes).shape, nodes)
    assert len(set(resident(placement, 256))) == 1


def test_digest_tells_placements_apart() -> None:
    shape = described().shape
    digests = {place_evenly(shape, nodes).digest for nodes in range(1, 17)}
    assert len(digests) == 16
    assert place_evenly(shape, 3).digest == place_evenly(shape, 3).digest


def test_more_nodes_than_experts_are_refused() -> None:
    with pytest.raises(PlacementError, match="5 nodes.*4 experts.*some/model.*at most 4"):
        place_evenly(described(4).shape, 5)


@given(st.integers(1, 20), st.integers(1, 5), SPEEDS, st.data())
@settings(deadline=None)
def test_whole_experts_go_to_the_fast_and_stay_within_memory(
    experts: int, layers: int, speeds: list[int], data: st.DataObject
) -> None:
    shape = described(experts, layers).shape
    sizes = st.integers(0, experts * layers)
    slots = data.draw(st.lists(sizes, min_size=len(speeds), max_size=len(speeds)))
    if sum(slots) < experts * layers:
        with pytest.raises(PlacementError):
            place_by_speed(shape, speeds, slots)
        return
    placement = place_by_speed(shape, speeds, slots)
    check_placement(placement, shape)
    totals = resident(placement, shape.expert_hidden)
    assert sum(totals) == experts * layers
    assert all(total <= most for total, most in zip(totals, slots))
    for node, total in enumerate(totals):  # more for the faster, where there is room
        for other, less in enumerate(totals):
            if speeds[node] > speeds[other] and total < less:
                assert total == slots[node]


@given(st.integers(1, 16), st.integers(1, 4), SPEEDS, st.data())
@settings(deadline=None)
def test_replicas_stay_within_memory(
    experts: int, layers: int, speeds: list[int], data: st.DataObject
) -> None:
    shape = described(experts, layers).shape
    sizes = st.integers(0, experts * layers)
    slots = data.draw(st.lists(sizes, min_size=len(speeds), max_size=len(speeds)))
    counts = st.lists(st.integers(0, 9), min_size=experts, max_size=experts)
    usage = data.draw(st.none() | st.lists(counts, min_size=layers, max_size=layers))
    if sum(slots) < experts * layers:
        with pytest.raises(PlacementError):
            place_replicas(shape, speeds, slots, usage)
        return
    placement = place_replicas(shape, speeds, slots, usage)
    check_placement(placement, shape)
    assert placement == place_replicas(shape, speeds, slots, usage)
    assert (placement.speeds == ()) == (len(set(speeds)) == 1)
    for speed, assigned in zip(speeds, placement.speeds):
        assert all(assigned >= b for a, b in zip(speeds, placement.speeds) if a < speed)
    totals = resident(placement, shape.expert_hidden)
    assert all(most - layers < total <= most for total, most in zip(totals, slots))
    for layer, owned in enumerate(placement.owned):
        copies = [sum(e in mine for mine in owned) for e in range(experts)]
        for one in range(experts):
            for another in range(experts):
                if usage and usage[layer][one] > usage[layer][another]:
                    assert copies[one] >= copies[another]


@given(st.integers(1, 12), SPEEDS, st.sampled_from((32, 64)), st.data())
@settings(deadline=None)
def test_slices_tile_in_proportion_to_speed(
    units: int, speeds: list[int], slice_alignment: int, data: st.DataObject
) -> None:
    hidden = units * slice_alignment + data.draw(st.integers(0, slice_alignment - 1))
    shape = described(hidden=hidden, slice_alignment=slice_alignment).shape
    roomy = [16 * 4] * len(speeds)
    if units < len(speeds):
        with pytest.raises(PlacementError, match=f"{units} slices at most, not {len(speeds)}"):
            place_slices(shape, speeds, roomy)
        return
    placement = place_slices(shape, speeds, roomy)
    check_placement(placement, shape)
    assert sum(resident(placement, hidden)) == pytest.approx(16 * 4)
    sizes = [(end - start) // slice_alignment for start, end in placement.slices]
    for speed, size in zip(speeds, sizes):
        assert all(size >= other for less, other in zip(speeds, sizes) if less < speed)


def test_slices_stay_within_memory() -> None:
    shape = described(hidden=512).shape
    tight = place_slices(shape, [1, 1], [16, 64])  # a quarter of all on the first
    assert tight.slices == ((0, 128), (128, 512))
    with pytest.raises(PlacementError, match="do not fit the nodes' memory: .* are missing"):
        place_slices(shape, [1, 1], [16, 40])
    with pytest.raises(PlacementError, match="cannot be sliced: their widths differ"):
        place_slices(described(slice_alignment=0).shape, [1, 1], [64, 64])


def test_what_nodes_do_besides_shifts_experts_to_the_fast() -> None:
    shape, roomy = described(12, 1, hidden=12 * 64).shape, [12, 12]
    assert resident(place_by_speed(shape, [2, 1], roomy), 768) == (8, 4)
    assert resident(place_by_speed(shape, [2, 1], roomy, beside=0.5), 768) == (10, 2)
    assert place_slices(shape, [2, 1], roomy, beside=0.5).slices == ((0, 640), (640, 768))
    assert place_replicas(shape, [2, 1], roomy).speeds == (67, 33)
    assert place_replicas(shape, [2, 1], roomy, beside=0.5).speeds == (21, 4)
    for place in (place_by_speed, place_slices):
        assert place(shape, [1, 1], roomy, beside=9.0) == place(shape, [1, 1], roomy)
