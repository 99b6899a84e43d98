"""Steps by example: who runs, in how many rows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest

from zmoe.batch.plan import BLOCK, PREVIOUS, Fork, Plan, Span
from zmoe.batch.scheduler import FLOOR, Scheduler
from zmoe.batch.sequence import Request, Sequence
from zmoe.errors import InputError, QueueFullError


def scheduler(**settings: Any) -> Scheduler:
    return Scheduler(**{"blocks": 64, "max_rows": 128, **settings})


def submit(one: Scheduler, tokens: Items[int] | int, count: int = 100, **rest: Any) -> Sequence:
    if isinstance(tokens, int):  # that many, found nowhere else
        tokens = [10**6 + len(one._sequences) * 10**5 + i for i in range(tokens)]
    return one.submit(Request(tokens, count, **rest), 0.0)


def step(one: Scheduler, token: int = 5, now: float = 0.0) -> Plan:
    """Plan and advance with `token` for every span."""
    plan = one.plan(now)
    assert plan is not None
    one.advance(plan, [[token] * span.logits for span in plan.spans])
    return plan


def rows(plan: Plan) -> dict[int, int]:
    return {span.sequence: span.rows for span in plan.spans}


def test_one_sequence_from_prompt_to_limit() -> None:
    one = scheduler(max_rows=40)
    assert one.plan(0.0) is None
    sequence = submit(one, range(100), 3)
    plans = [step(one) for _ in range(5)]
    number = sequence.id
    assert [plan.spans for plan in plans] == [
        (Span(number, 0, 40, 0),),
        (Span(number, 40, 40, 0),),
        (Span(number, 80, 20, 1),),
        (Span(number, 100, 1, 1),),
        (Span(number, 101, 1, 1),),
    ]
    assert plans[1].tokens == tuple(range(40, 80)) and plans[3].tokens == (5,)
    assert [plan.blocks for plan in plans] == [(0,), (1,), (), (), ()]
    assert [plan.step for plan in plans] == list(range(1, 6))
    assert sequence.tokens[100:] == [5, 5, 5]
    assert one.plan(0.0) is None
    other = submit(one, 10)
    assert step(one).free == (number,)
    one.end(other.id)


def test_a_second_prompt_begins_behind_what_both_have_in_common() -> None:
    one = scheduler()
    submit(one, range(200), 1)
    step(one), step(one)
    second = submit(one, [*range(150), 7])
    plan = step(one)
    assert plan.spans == (Span(second.id, 128, 23, 1),)
    assert plan.blocks[:2] == (0, 1) and len(plan.blocks) == 3
    assert second.cached == 128


def test_a_step_ahead_holds_placeholders_and_ends_one_row_late() -> None:
    one = scheduler()
    sequence = submit(one, 10, 3)
    first, second = one.plan(0.0), one.plan(0.0)
    assert first and second and second.tokens == (PREVIOUS,)
    assert second.spans == (Span(sequence.id, 10, 1, 1),)
    assert one.advance(first, [[1]]) == []
    third = one.plan(0.0)
    assert third and third.tokens == (PREVIOUS,)
    assert one.plan(0.0) is None  # three tokens are on their way
    one.advance(second, [[2]])
    assert one.advance(third, [[3]]) == [sequence]
    other = submit(one, 10, 5)
    plans = [one.plan(0.0), one.plan(0.0)]
    one.advance(plans[0], [[1]])  # type: ignore[arg-type]
    one.end(other.id)
    assert one.advance(plans[1], [[2]]) == []  # type: ignore[arg-type]
    assert one.available == 64


def test_chunks_fit_the_time_of_a_step_while_others_decode() -> None:
    one = scheduler(max_rows=512, step_seconds=0.25)
    submit(one, 10)
    step(one)
    for measured in ((1, 0.02), (16, 0.075), (512, 2.9)):
        one.rates.took(*measured)
    long = submit(one, 2000)
    plan = step(one)
    predicted = one.rates.seconds(len(plan.tokens))
    assert predicted is not None and predicted <= 0.25 and rows(plan)[long.id] > 30
    for _ in range(20):
        one.rates.took(16, 0.5)
    assert rows(step(one))[long.id] == FLOOR
    one.end(0)
    assert rows(step(one))[long.id] == 512


# Seconds of a step by its rows: as measured with experts of 4 bits, in proportion, and on a node
# that takes long for any step.
STEPS = {
    "experts": lambda rows: float(np.interp(rows, (1, 16, 128, 512), (0.02, 0.075, 0.7, 2.9))),
    "proportional": lambda rows: 0.005 * rows,
    "slow": lambda rows: 0.15 + 0.002 * rows,
}


@pytest.mark.parametrize("seconds", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("before", [1, 400], ids=["unmeasured", "measured"])
def test_nobody_waits_long_beside_a_prompt_of_4000_tokens(
    seconds: Callable[[int], float], before: int
) -> None:
    one = scheduler(blocks=200, max_rows=512, step_seconds=0.25)

    def timed_step() -> Plan:
        plan = step(one)
        one.rates.took(len(plan.tokens), seconds(len(plan.tokens)))
        return plan

    submit(one, before, 1)
    timed_step()
    others = [submit(one, 10, 10**4).id for _ in range(8)]
    timed_step()
    long = submit(one, 4000)
    steps = 0
    while long.position < 4000:
        plan, steps = timed_step(), steps + 1
        assert seconds(len(plan.tokens)) <= 2 * 0.25
        assert set(others) <= set(rows(plan))  # a row in every step
    assert steps <= 4000 // FLOOR


def test_one_long_prompt_at_a_time_and_short_ones_beside_it() -> None:
    one = scheduler()
    first, second, short = submit(one, 300), submit(one, 300), submit(one, 60)
    assert rows(step(one)) == {first.id: 68, short.id: 60}
    assert rows(step(one)) == {short.id: 1, first.id: 127} or one.rates.seconds(1) is None
    while first in one._prefilling.values():
        assert second.id not in rows(step(one))
    step(one)
    assert second.queued is not None


def test_a_long_prompt_that_is_cached_is_short() -> None:
    one = scheduler(max_rows=128)
    submit(one, range(256), 1)
    step(one), step(one)
    submit(one, 600)
    step(one)
    cached = submit(one, range(200))
    assert rows(step(one))[cached.id] == 200 - 192 and cached.cached == 192


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    one = scheduler(blocks=4)
    old, new = submit(one, 120), submit(one, 60)
    step(one), step(one)
    waits = submit(one, 60)
    while not new.preemptions:
        step(one)
    assert list(one._waiting) == [new.id, waits.id]
    assert old.preemptions == 0
    tokens = len(new.tokens)
    one.end(old.id)
    plan = step(one)
    assert plan.spans[0].sequence == new.id
    assert set(plan.free) == {old.id}
    assert len(new.tokens) == tokens + 1


def test_a_sequence_ends_where_the_cache_does() -> None:
    one = scheduler(blocks=2, max_rows=256)
    sequence = submit(one, 2 * BLOCK - 1, 10**6)
    step(one)
    step(one)
    assert len(sequence.tokens) == 2 * BLOCK + 1 and one.plan(0.0) is None


def test_what_can_never_run_is_refused() -> None:
    one = scheduler(blocks=2)
    with pytest.raises(InputError, match="128 tokens.* 128 positions"):
        submit(one, 128)
    with pytest.raises(InputError, match="0 tokens of prompt"):
        submit(one, [])
    with pytest.raises(InputError, match="0 to generate"):
        submit(one, 5, 0)
    with pytest.raises(InputError, match="9 sequences in steps of 8 rows"):
        scheduler(max_rows=8, parallel=9)
    with pytest.raises(InputError, match="0 blocks"):
        scheduler(blocks=0)


def test_the_queue_has_a_limit_and_patience_too() -> None:
    one = scheduler(parallel=1, max_queue=2, queue_seconds=10.0)
    first = submit(one, 10)
    step(one)
    second = submit(one, 10)
    submit(one, 10)
    with pytest.raises(QueueFullError, match="2 requests wait"):
        submit(one, 10)
    assert one.expire(10.0) == []
    assert second in one.expire(10.1)
    assert one.waiting == 0 and one.running == 1 and first.queued == 0.0


def test_drafts_are_rows_that_go_back_when_wrong() -> None:
    one = scheduler(drafts=3)
    sequence = submit(one, [1, 2, 3, 4] * 5)
    first = one.plan(0.0)
    assert first
    one.advance(first, [[1]])
    plan = one.plan(0.0)
    assert plan and plan.tokens == (1, 2, 3, 4) and plan.spans == (Span(sequence.id, 20, 4, 4),)
    assert one.plan(0.0) is None
    one.advance(plan, [[2, 9]])
    assert sequence.tokens[20:] == [1, 2, 9]
    after = one.plan(0.0)
    assert after and after.spans[0].position == 22 and after.tokens[0] == 9


def test_no_drafts_beside_a_prompt_or_beside_others_on_mlx() -> None:
    for settings in ({}, {"paged": False}):
        one = scheduler(drafts=3, **settings)
        submit(one, [1, 2, 3, 4] * 5)
        step(one, 1)
        other = submit(one, [1, 2, 3, 4] * 3)
        assert rows(step(one, 2))[0] == 1
        plan = step(one, 3)
        assert rows(plan)[0] == (4 if not settings else 1)
        one.end(other.id)


def test_snapshots_of_exact_caches_are_taken_at_borders() -> None:
    one = scheduler(paged=False, exact=True)
    first = submit(one, range(100), 2, borders=(70,))
    plans = [step(one) for _ in range(4)]
    assert [rows(plan)[first.id] for plan in plans] == [70, 29, 1, 1]
    assert plans[1].forks == (Fork(1, first.id, 70),)
    assert plans[2].forks == (Fork(2, first.id, 99),)
    same, other = submit(one, range(100), 2), submit(one, [*range(70), *range(500, 520)], 2)
    plan = step(one)
    assert plan.forks == (Fork(same.id, 2, 99), Fork(other.id, 1, 70))
    assert (same.cached, other.cached) == (99, 70)


@pytest.mark.parametrize("exact", [False, True])
def test_a_text_from_elsewhere_is_a_snapshot_if_there_is_room(exact: bool) -> None:
    one, filled = scheduler(paged=False, exact=exact, blocks=4), list[list[int]]()
    assert one.adopt(range(100), filled.append) == 100
    assert one.adopt(range(100), filled.append) == 100  # which it has
    assert one.adopt([7] * 300, filled.append) == 0
    ((number,),) = filled
    sequence = submit(one, [*range(100), 7], 1)
    assert step(one).forks == (Fork(sequence.id, number, 100),)
    assert one.known(range(100)).length == 100


def test_what_runs_is_known_too_unless_it_cannot_be_cut() -> None:
    for exact, known in ((False, 100), (True, 0)):
        one = scheduler(paged=False, exact=exact, max_rows=100)
        sequence = submit(one, range(120), borders=())
        while sequence.position < 100:
            step(one)
        found = one.known([*range(100), 7])
        assert found.length == known and found.snapshot == (sequence.id if known else None)


@pytest.mark.parametrize("exact", [False, True])
def test_snapshots_are_shared_under_one_salt_only(exact: bool) -> None:
    one = scheduler(paged=False, exact=exact)
    for _ in range(2):  # the second time each finds its own
        found = []
        for salt in (b"", b"key"):
            sequence = submit(one, range(100), 1, salt=salt)
            while sequence.id in one._sequences:
                step(one)
            found.append(sequence.cached)
    assert found == [99, 99]
    submit(one, [*range(99), 7], 1, salt=b"other")
    assert step(one).forks == ()


def test_snapshots_of_other_caches_are_cut() -> None:
    one = scheduler(paged=False)
    first = submit(one, range(100), 2)
    plans = [step(one), step(one)]
    assert plans[1].forks == (Fork(1, first.id, 100),)
    other = submit(one, [*range(80), 7, 7, 7], 2)
    plan = step(one)
    assert plan.forks == (Fork(other.id, first.id, 80),)  # what has ended covers its snapshot
    assert plan.free == (1,) and other.cached == 80


def test_on_mlx_a_step_counts_its_passes() -> None:
    one = scheduler(paged=False)
    submit(one, 5), submit(one, 6)
    assert step(one).step == 1
    submit(one, 7)
    assert step(one).step == 3  # two prompts were two passes
    assert step(one).step == 5  # a pass for those that decode, and one for the prompt


def test_those_that_cannot_be_batched_run_one_by_one() -> None:
    one = scheduler(paged=False, parallel=1)
    sequences = [submit(one, 10, 2) for _ in range(3)]
    order = [step(one).spans[0].sequence for _ in range(6)]
    assert order == [s.id for s in sequences for _ in range(2)]
