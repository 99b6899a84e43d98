"""Prompt lookup: what is proposed, and when it is left."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from zmoe.batch.drafts import LONGEST, MOST, REST, SHORTEST, TRIAL, Drafts
from zmoe.batch.rates import Rates


def rates(*seconds: tuple[int, float]) -> Rates:
    out = Rates()
    for rows, took in seconds:
        out.took(rows, took)
    return out


FLAT = ((1, 0.1), (16, 0.1))  # more rows for nothing, as where memory's bandwidth is the limit
STEEP = ((1, 0.1), (16, 1.6))


def test_what_followed_before_is_proposed() -> None:
    drafts = Drafts(3)
    assert drafts.propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 8, 1, rates()) == [4, 5, 6]


def test_the_longest_agreement_wins_and_the_latest_one() -> None:
    text = [1, 2, 3, 40, 9, 2, 3, 50, 9, 1, 2, 3]
    assert Drafts(1).propose(text, 8, 1, rates()) == [40]
    assert Drafts(1).propose([*text, 60, 1, 2, 3], 8, 1, rates()) == [60]
    assert Drafts(1).propose([2, 3, 40, 2, 3, 50, 9, 2, 3], 8, 1, rates()) == [50]


def test_a_repetition_goes_on() -> None:
    assert Drafts(5).propose([1, 2, 1, 2, 1], 8, 1, rates()) == [2, 1, 2, 1, 2]


def test_no_more_than_there_is_room_for() -> None:
    assert Drafts(5).propose([7] * 9, 2, 1, rates()) == [7, 7]
    assert Drafts(5).propose([7] * 9, 0, 1, rates()) == []


def test_what_is_computed_again_counts() -> None:
    """Where drafts are right, it is nothing; where half of them are, it does not pay."""
    cost, text = rates((1, 0.1), (3, 0.18), (16, 0.7)), [7] * 9
    for acceptance, pays in ((1.0, True), (0.5, False)):
        plain, again = Drafts(), Drafts(again=True)
        for drafts in (plain, again):
            drafts.verified(1, 1)
            drafts.acceptance = acceptance
        assert plain.propose(text, 8, 1, cost)
        assert bool(again.propose(text, 8, 1, cost)) == pays


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.data())
def test_the_index_finds_what_a_search_finds(text: list[int], data: st.DataObject) -> None:
    drafts = Drafts(1)
    for length in sorted(data.draw(st.sets(st.integers(2, len(text)))) | {len(text)}):
        proposed = drafts.propose(text[:length], 1, 1, rates())
    expected = []
    for n in range(SHORTEST, LONGEST + 1):
        for end in range(n, len(text)):
            if text[end - n : end] == text[-n:]:
                expected = [text[end]]
    assert proposed == expected


def test_first_a_trial_then_as_many_as_pay() -> None:
    drafts, text = Drafts(), [7] * 9
    assert len(drafts.propose(text, 99, 1, rates(*FLAT))) == TRIAL
    for _ in range(30):
        drafts.verified(TRIAL, TRIAL)
    assert len(drafts.propose(text, 99, 1, rates(*FLAT))) == MOST


def test_off_where_they_do_not_pay_and_tried_again() -> None:
    """Rows that cost as much as a step each, or drafts that are always wrong."""
    for cost, accepted in ((STEEP, TRIAL), (((1, 0.1), (16, 0.4)), 0)):
        drafts, text = Drafts(), [7] * 9
        drafts.propose(text, 99, 1, rates(*cost))
        for _ in range(30):
            drafts.verified(TRIAL, accepted)
        lengths = [len(drafts.propose(text, 99, 1, rates(*cost))) for _ in range(REST + 2)]
        assert lengths == [0] * (REST + 1) + [TRIAL]


def test_a_busy_step_takes_fewer() -> None:
    """The same drafts pay less where other sequences wait for their rows."""
    drafts, text = Drafts(), [7] * 9
    drafts.verified(1, 1)
    cost = rates((1, 0.1), (7, 0.13), (15, 0.3), (40, 1.0))
    few, many = (len(drafts.propose(text, 99, rows, cost)) for rows in (1, 30))
    assert few > many == 0


def test_acceptance_follows_the_verdicts() -> None:
    drafts, draw = Drafts(), random.Random(1)
    for _ in range(400):
        right = next((i for i in range(4) if draw.random() > 0.3), 4)
        drafts.verified(4, right)
    assert 0.1 < drafts.acceptance < 0.5
