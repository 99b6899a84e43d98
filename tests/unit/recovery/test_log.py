"""The last two plans."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from zmoe.errors import ZmoeError
from zmoe.recovery.log import StepLog


@dataclass(frozen=True)
class Plan:
    step: int


def log() -> StepLog:
    """Of the steps 4, 6 (of two passes), 7 and 8, the last one of which is under way."""
    made = StepLog(3)
    for step in (4, 6, 7):
        made.add(Plan(step))
        made.finish(step)
    made.add(Plan(8))
    return made


def test_what_is_repeated() -> None:
    made = log()
    assert made.last == 8 and made.known == 7
    assert made.go_back({0: 7, 1: 6}) == 6
    assert made.after(6) == (Plan(7), Plan(8))
    made.finish(7)
    assert made.known == 7
    assert made.go_back({0: 7, 1: 6}) == 6  # lost again, in the first of them
    made.finish(7)
    made.finish(8)
    assert made.known == 8
    made.add(Plan(9))
    assert made.go_back({0: 8, 1: 8}) == 8
    assert made.after(8) == (Plan(9),)
    made.forget(9)
    assert made.last == made.known == 9 and made.after(0) == ()


def test_what_cannot_be() -> None:
    with pytest.raises(ZmoeError, match="node 1 has finished step 4: expected one of 6, 7, 8"):
        log().go_back({0: 7, 1: 4})
    with pytest.raises(ZmoeError, match="node 2 has finished step 8, node 1 only step 6: expected"):
        log().go_back({0: 7, 1: 6, 2: 8})
    with pytest.raises(ZmoeError, match="plan 9 comes before plan 8 is finished"):
        log().add(Plan(9))
    made = log()
    with pytest.raises(ZmoeError, match="step 9 is finished after step 7"):
        made.finish(9)
    made.finish(8)
    with pytest.raises(ZmoeError, match="plan 8 comes after plan 8"):
        made.add(Plan(8))
    with pytest.raises(ZmoeError, match="step 8 is finished after step 8"):
        made.finish(8)
