"""Compaction of a routing to the local pairs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import owning
from zmoe.placement.pairs import routing_digest


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


@given(data=st.data())
def test_pairs_are_exactly_the_owned_ones_in_order_of_rows(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    owned = sorted(data.draw(st.sets(st.integers(0, experts - 1))))
    k = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(0, experts + 2), min_size=k, max_size=k)
    routing = ids(*data.draw(st.lists(row, min_size=1, max_size=6)))
    pairs = owning(experts, owned).pairs(routing)
    want = [
        (r, s, owned.index(e))
        for r, chosen in enumerate(routing.tolist())
        for s, e in enumerate(chosen)
        if e in owned
    ]
    got = zip(pairs.rows.tolist(), pairs.slots.tolist(), pairs.experts.tolist(), strict=True)
    assert list(got) == want


def test_negative_ids_are_nobodys() -> None:
    pairs = owning(4, [0, 3]).pairs(ids([-1, 3], [-4, 0]))
    assert pairs.rows.tolist() == [0, 1] and pairs.experts.tolist() == [1, 0]


def test_the_digest_tells_routings_apart() -> None:
    one = routing_digest(ids([0, 1], [2, 3]))
    assert one == routing_digest(ids([0, 1], [2, 3]))
    others = [ids([0, 1], [2, 4]), ids([2, 3], [0, 1]), ids([0, 1])]
    assert len({one, *map(routing_digest, others)}) == 4
    # A view with strides is digested as what it shows.
    wide = ids([0, 9, 1, 9], [2, 9, 3, 9])
    assert routing_digest(wide[:, ::2]) == one
