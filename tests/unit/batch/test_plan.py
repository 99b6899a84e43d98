"""The digest of a plan, and what is no plan."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from zmoe.batch.plan import PREVIOUS, Copy, Fork, Plan, Span, check
from zmoe.errors import ZmoeError

PLAN = Plan(
    step=7,
    spans=(Span(3, 100, 1, 1), Span(5, 64, 3, 0)),
    tokens=(PREVIOUS, 1, 2, 3),
    blocks=(9, 8),
    free=(1, 2),
    forks=(Fork(6, 5, 64),),
    copies=(Copy(9, 4),),
)


def test_equal_plans_have_one_digest() -> None:
    """A fixed one: it must not depend on the machine or on the process."""
    assert replace(PLAN).digest == PLAN.digest == 0xB002A8F56C37AA1
    assert 0 < PLAN.digest < 2**64


def test_whatever_differs_changes_it() -> None:
    others = [replace(PLAN, step=8)]
    for field in fields(PLAN)[1:]:
        values = getattr(PLAN, field.name)
        others += [replace(PLAN, **{field.name: changed}) for changed in changes(values)]
    # The same numbers, on the other side of a border.
    others += [replace(PLAN, tokens=(PREVIOUS, 1, 2), blocks=(3, 9, 8))]
    others += [
        replace(PLAN, blocks=(9,), free=(8, 1, 2)),
        replace(PLAN, blocks=(9, 8, 1, 2), free=()),
    ]
    digests = {PLAN.digest, *(other.digest for other in others)}
    assert len(digests) == 1 + len(others) > 20


def changes(values: tuple[object, ...]) -> list[tuple[object, ...]]:
    """All that differ in a number, in length or in order."""
    found = [values[1:], (*values, values[0])]
    if len(values) > 1:
        found.append(values[::-1])
    for at, value in enumerate(values):
        others: list[object] = [value + 10] if isinstance(value, int) else []
        if isinstance(value, (Span, Fork, Copy)):
            others = [value._replace(**{name: part + 1}) for name, part in value._asdict().items()]
        found += [(*values[:at], other, *values[at + 1 :]) for other in others]
    return found


ROW = Plan(7, (Span(0, 20, 1, 1),), (1,))
BAD = {
    "step 7 has 1 rows and 2 tokens: expected as many, from 1 to 4": replace(ROW, tokens=(1, 1)),
    "step 7 has 0 rows": replace(ROW, spans=(), tokens=()),
    "step 7 has 5 rows and 5 tokens": replace(ROW, spans=(Span(0, 0, 5, 1),), tokens=(1,) * 5),
    "step 7 runs a sequence twice, or": replace(ROW, spans=ROW.spans * 2, tokens=(1, 1)),
    "runs a sequence twice, or a span of no rows": replace(ROW, spans=(Span(0, 20, 1, 2),)),
    "runs a sequence twice, or": replace(ROW, spans=(Span(0, 20, 1, -1),)),
    "a span of no rows or before": replace(ROW, spans=(*ROW.spans, Span(1, 5, 0, 0))),
    "before position 0": replace(ROW, spans=(Span(0, -1, 1, 1),)),
    "step 7 has a token outside of 0 to 95": replace(ROW, tokens=(96,)),
    "a token outside of 0 to 95": replace(ROW, tokens=(-2,)),
    "step 7 refers to sampled tokens, which this node never sees": replace(ROW, tokens=(PREVIOUS,)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_plan(message: str) -> None:
    check(ROW, 4, 96)
    with pytest.raises(ZmoeError, match=message):
        check(BAD[message], 4, 96)


def test_a_plan_ahead() -> None:
    ahead = replace(ROW, tokens=(PREVIOUS,))
    check(ahead, 4, 96, ahead=True)
    with pytest.raises(ZmoeError, match="a token outside of 0 to 95"):
        check(replace(ROW, tokens=(-2,)), 4, 96, ahead=True)
