"""Who computes what: against an exhaustive search for the best assignment."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from zmoe.native import Owners, lib
from zmoe.placement.assignment import Ownership
from zmoe.placement.types import Placement

HIDDEN = 96


class Case(NamedTuple):
    placement: Placement
    ids: np.ndarray  # (rows, k)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Replicas, slices and speeds of every kind; some ids are nobody's."""
    cuts = draw(st.sampled_from([(0, HIDDEN), (0, 32, HIDDEN), (0, 16, 64, HIDDEN)]))
    ranges = [*pairwise(cuts)]
    more = draw(st.lists(st.sampled_from(ranges), max_size=3))
    slices = draw(st.permutations([*ranges, *more]))
    nodes, experts = len(slices), draw(st.integers(1, 7))
    held: list[set[int]] = [set() for _ in slices]
    for expert, each in product(range(experts), ranges):
        able = [rank for rank, own in enumerate(slices) if own == each]
        for rank in draw(st.sets(st.sampled_from(able), min_size=1)):
            held[rank].add(expert)
    speeds = draw(st.lists(st.integers(1, 5), min_size=nodes, max_size=nodes))
    k = draw(st.integers(1, 4))
    row = st.permutations(range(-2, experts + 2)).map(lambda chosen: chosen[:k])
    ids = np.array(draw(st.lists(row, min_size=1, max_size=5)), np.int32)
    owned = (tuple(tuple(sorted(own)) for own in held),)
    return Case(Placement(nodes, experts, owned, tuple(slices), tuple(speeds)), ids)


def computed(case: Case) -> list[tuple[int, int, int, tuple[int, int]]]:
    """What the ranks do, each by itself: rank, row, expert and slice."""
    found = []
    for rank in range(case.placement.nodes):
        pairs = Ownership(case.placement, 0, rank).pairs(case.ids)
        held = case.placement.owned[0][rank]
        for row, slot, own in zip(pairs.rows, pairs.slots, pairs.experts, strict=True):
            assert case.ids[row, slot] == held[own]
            found.append((rank, int(row), held[own], case.placement.slices[rank]))
    return found


@given(cases())
def test_everything_selected_is_computed_exactly_once(case: Case) -> None:
    """The ranks know nothing of one another, so this is that they agree, too."""
    want = [
        (row, expert, each)
        for row, chosen in enumerate(case.ids.tolist())
        for expert in chosen
        if 0 <= expert < case.placement.experts
        for each in set(case.placement.slices)
    ]
    work = computed(case)
    assert sorted(part[1:] for part in work) == sorted(want)
    doer = {}
    for rank, _, expert, each in work:  # all rows of an expert go to the same rank
        assert doer.setdefault((expert, each), rank) == rank


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_within_a_row_and_of_rows_is_nothing_to_it(case: Case, random: object) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    other = rng.permuted(rng.permutation(case.ids), axis=1)
    doers = [
        {(rank, expert, each) for rank, _, expert, each in computed(Case(case.placement, ids))}
        for ids in (case.ids, other)
    ]
    assert doers[0] == doers[1]


# ---- how long the busiest node takes ----------------------------------------------


class Tasks(NamedTuple):
    owners: list[list[int]]  # of each task
    rows: list[int]
    speeds: list[int]


def busiest(tasks: Tasks, ranks: tuple[int, ...]) -> Fraction:
    loads = [0] * len(tasks.speeds)
    for rows, rank in zip(tasks.rows, ranks, strict=True):
        loads[rank] += lib.ZMOE_LOAD_ROWS + rows
    return max(map(Fraction, loads, tasks.speeds))


def best(tasks: Tasks) -> Fraction:
    return min(busiest(tasks, ranks) for ranks in product(*tasks.owners))


def assigned(tasks: Tasks) -> Fraction:
    nodes, experts = len(tasks.speeds), len(tasks.rows)
    owned = [[e for e in range(experts) if rank in tasks.owners[e]] for rank in range(nodes)]
    owners = Owners(experts, owned, (), tasks.speeds)
    ids = [[expert] for expert, rows in enumerate(tasks.rows) for _ in range(rows)]
    owners.assign(np.array(ids, np.int32))
    (ranks,) = owners.ranks.tolist()
    assert owners.counts.tolist() == [ranks.count(rank) for rank in range(nodes)]
    return busiest(tasks, ranks)


@st.composite
def tasks(draw: st.DrawFn, most_rows: int) -> Tasks:
    nodes, count = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    able = st.sets(st.integers(0, nodes - 1), min_size=1).map(sorted)
    rows = st.lists(st.integers(1, most_rows), min_size=count, max_size=count)
    speeds = st.lists(st.integers(1, 5), min_size=nodes, max_size=nodes)
    return Tasks(draw(st.lists(able, min_size=count, max_size=count)), draw(rows), draw(speeds))


@given(tasks(most_rows=1))
def test_tasks_that_are_alike_are_shared_out_as_well_as_can_be(each: Tasks) -> None:
    assert assigned(each) == best(each)


def test_every_small_case_of_tasks_that_are_alike() -> None:
    able = [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    for owners in product(able, repeat=4):
        for speeds in ([1, 1, 1], [1, 2, 3]):
            each = Tasks([*owners], [1] * 4, speeds)
            assert assigned(each) == best(each), each


@given(tasks(most_rows=60))
def test_unlike_tasks_never_take_twice_as_long_as_they_must(each: Tasks) -> None:
    assert assigned(each) < 2 * best(each)


def test_every_small_case_of_unlike_tasks() -> None:
    """Three nodes, three tasks with 1, 8 or 40 rows: within a quarter."""
    able = [[0], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    for owners in product(able, repeat=3):
        for rows in product([1, 8, 40], repeat=3):
            each = Tasks([*owners], [*rows], [1, 1, 2])
            assert assigned(each) <= Fraction(5, 4) * best(each), each


def test_rows_count_beside_the_weights() -> None:
    """One expert of many rows alone; four of one row each on the other node."""
    everywhere = [[0, 1]] * 5
    each = Tasks(everywhere, [40, 1, 1, 1, 1], [1, 1])
    assert assigned(each) == 48
    assert assigned(each._replace(speeds=[1, 3])) == best(each._replace(speeds=[1, 3]))
