"""What is no placement of a model is refused, and says which expert, layer and node."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.placement.conftest import described
from zmoe.errors import PlacementError
from zmoe.placement.check import check_placement
from zmoe.placement.types import Placement

ONE = ((0, 1), (2,))
ONE_LAYER, TWO_LAYERS = (described(3, n, hidden=128).shape for n in (1, 2))
UNSLICED = described(3, 1, hidden=128, slice_alignment=0).shape


def make(*layers: Any, **others: Any) -> Placement:
    return Placement(2, 3, layers, **others)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (make(ONE), "3 experts in 1 layers does not fit a model of 3 in 2"),
        (Placement(2, 4, (ONE, ONE)), "of 4 experts"),
        (make(ONE, ((0, 1), ())), "layer 1: no node owns expert 2"),
        (make(ONE, ((0, 1), (2, 3))), "layer 1, node 1: no expert 3 among the 3"),
        (make(ONE, ((-1, 0, 1), (2,))), "layer 1, node 0: no expert -1"),
        (make(ONE, ((1, 0), (2,))), "layer 1, node 0: expert 0 comes after 1"),
        (make(ONE, ((0, 0, 1), (2,))), "layer 1, node 0: expert 0 comes after 0"),
        (make(ONE, ((0, 1), (2,), ())), "layer 1: experts of 3 nodes, not of 2"),
        (make(ONE, ONE, slices=((0, 128),)), "1 slices for 2 nodes"),
        (make(ONE, ONE, slices=((0, 64), (64, 128))), "expert 0: no node owns .64, 128."),
        (make(ONE, ONE, slices=((0, 128), (64, 64))), "node 1 has the slice .64, 64."),
        (make(ONE, ONE, slices=((0, 129), (0, 128))), "node 0 has the slice .0, 129."),
        (make(ONE, ONE, slices=((-64, 128), (0, 128))), "node 0 has the slice .-64, 128."),
        (make(ONE, ONE, slices=((0, 100), (100, 128))), "node 0.*cut at multiples of 64"),
        (make(ONE, ONE, speeds=(1,)), "speed for each"),
        (make(ONE, ONE, speeds=(1, 0)), "positive speed"),
        (make(ONE, ONE, speeds=(1, 1 << 30)), "positive speed"),
    ],
)
def test_what_is_refused(placement: Placement, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        check_placement(placement, TWO_LAYERS)


def test_parts_that_overlap() -> None:
    all_of_it = ((0, 1, 2),) * 3
    overlapping = Placement(3, 3, (all_of_it,), ((0, 128), (0, 64), (64, 128)))
    with pytest.raises(PlacementError, match="layer 0, expert 0: several nodes own parts of"):
        check_placement(overlapping, ONE_LAYER)


def test_where_slices_cannot_be() -> None:
    both = (((0, 1, 2), (0, 1, 2)),)
    with pytest.raises(PlacementError, match="cannot be sliced"):
        check_placement(Placement(2, 3, both, ((0, 64), (64, 128))), UNSLICED)
    check_placement(Placement(2, 3, both, ((0, 128), (0, 128))), UNSLICED)


@given(st.data())
@settings(deadline=None)
def test_accepts_just_what_covers_every_unit_alike(data: st.DataObject) -> None:
    """Against counting, unit by unit, who computes it."""
    nodes, experts, units = 3, 2, 3
    cuts = st.tuples(st.integers(0, units), st.integers(0, units))
    slices = data.draw(st.lists(cuts.filter(lambda c: c[0] < c[1]), min_size=3, max_size=3))
    ids = st.lists(st.integers(0, experts - 1), unique=True).map(sorted)
    owned = data.draw(st.lists(ids, min_size=nodes, max_size=nodes))
    placement = Placement(
        nodes,
        experts,
        (tuple(map(tuple, owned)),),
        tuple((64 * a, 64 * b) for a, b in slices),
    )
    fine = True
    for expert in range(experts):
        parts = {slices[n] for n in range(nodes) if expert in owned[n]}
        fine &= all(sum(a <= unit < b for a, b in parts) == 1 for unit in range(units))
    try:
        check_placement(placement, described(experts, 1, hidden=64 * units).shape)
        accepted = True
    except PlacementError:
        accepted = False
    assert accepted == fine
