"""The digest of a plan."""

from __future__ import annotations

from dataclasses import fields, replace

from zmoe.batch.plan import PREVIOUS, Copy, Fork, Plan, Span

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
        names = [field.name for field in fields(value)] if not isinstance(value, int) else []
        others = [replace(value, **{name: getattr(value, name) + 1}) for name in names]  # type: ignore
        if isinstance(value, int):
            others = [value + 10]
        found += [(*values[:at], other, *values[at + 1 :]) for other in others]
    return found
