"""Who computes what: against an exhaustive search for the best assignment."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from zmoe.native import Owners
from zmoe.placement.assignment import Ownership, layer_owners
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
    assert sorted(part[1:] for part in computed(case)) == sorted(want)


@given(cases(), st.randoms(use_true_random=False))
def test_who_computes_a_row_depends_on_the_set_of_its_experts_alone(
    case: Case, random: object
) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    among_others = computed(case)
    for row, ids in enumerate(case.ids):
        alone = computed(Case(case.placement, rng.permuted(ids)[None]))
        assert {(rank, expert, each) for rank, _, expert, each in alone} == {
            (rank, expert, each) for rank, at, expert, each in among_others if at == row
        }


def test_an_expert_that_a_row_has_twice_goes_to_one_rank() -> None:
    owners = Owners(3, [[0, 1, 2], [0, 1, 2]])
    ranks = owners.assign(np.array([[2, 0, 2, 1], [1, 1, 1, 1]], np.int32))
    assert ranks.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1]]
    assert owners.counts.tolist() == [3, 1]  # expert 1 runs on both


# ---- how long the busiest node takes ----------------------------------------------


class Tasks(NamedTuple):
    owners: list[list[int]]  # of each task
    speeds: list[int]


def busiest(tasks: Tasks, ranks: tuple[int, ...]) -> Fraction:
    return max(Fraction(ranks.count(rank), speed) for rank, speed in enumerate(tasks.speeds))


def best(tasks: Tasks) -> Fraction:
    return min(busiest(tasks, ranks) for ranks in product(*tasks.owners))


def assigned(tasks: Tasks) -> Fraction:
    nodes, experts = len(tasks.speeds), len(tasks.owners)
    owned = [[e for e in range(experts) if rank in tasks.owners[e]] for rank in range(nodes)]
    owners = Owners(experts, owned, (), tasks.speeds)
    (masks,) = owners.assign(np.arange(experts, dtype=np.int32)[None]).tolist()
    ranks = tuple(mask.bit_length() - 1 for mask in masks)
    assert [1 << rank for rank in ranks] == masks
    assert owners.counts.tolist() == [ranks.count(rank) for rank in range(nodes)]
    return busiest(tasks, ranks)


@st.composite
def tasks(draw: st.DrawFn) -> Tasks:
    nodes, count = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    able = st.sets(st.integers(0, nodes - 1), min_size=1).map(sorted)
    speeds = st.lists(st.integers(1, 5), min_size=nodes, max_size=nodes)
    return Tasks(draw(st.lists(able, min_size=count, max_size=count)), draw(speeds))


@given(tasks())
def test_experts_are_shared_out_as_well_as_can_be(each: Tasks) -> None:
    assert assigned(each) == best(each)


def test_every_small_case() -> None:
    able = [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    for owners in product(able, repeat=4):
        for speeds in ([1, 1, 1], [1, 2, 3]):
            each = Tasks([*owners], speeds)
            assert assigned(each) == best(each), each


@given(cases())
def test_counts_are_the_experts_that_ranks_run_for_any_row(case: Case) -> None:
    owners = layer_owners(case.placement, 0)
    owners.assign(case.ids)
    run = {(rank, expert) for rank, _, expert, _ in computed(case)}
    counts = [sum(rank == r for rank, _ in run) for r in range(case.placement.nodes)]
    assert owners.counts.tolist() == counts
