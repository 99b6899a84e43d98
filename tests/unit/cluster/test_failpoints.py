"""ZMOE_FAIL: what it has nodes do, and what it refuses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from zmoe.cluster.failpoints import failpoints
from zmoe.errors import InputError, ZmoeError


def test_faults_are_of_one_rank_site_and_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "armed"
    monkeypatch.setenv("ZMOE_FAIL", f"1.after-step:7=raise,2.load=raise,1.adopt=raise@{file}")
    reach = failpoints(1)
    reach("after-step", 6)
    reach("before-step", 7)
    reach("load")
    with pytest.raises(ZmoeError, match="ZMOE_FAIL has node 1 fail: after-step"):
        reach("after-step", 7)
    reach("adopt")
    file.touch()
    with pytest.raises(ZmoeError, match="adopt"):
        reach("adopt")
    reach("adopt")
    with pytest.raises(ZmoeError, match="node 2 fail: load"):
        failpoints(2)("load")
    failpoints(3)("load")


def test_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("ZMOE_FAIL", "0.before-step=sleep:0.25")
    failpoints(0)("before-step", 1)
    failpoints(0)("before-step", 2)
    assert slept == [0.25, 0.25]


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("adopt=kill", "expected RANK.SITE[:STEP]=ACTION[:SECONDS][@FILE]"),
        ("1.adopt", "expected RANK.SITE[:STEP]=ACTION[:SECONDS][@FILE]"),
        ("1.lunch=kill", "the site is none of load, connect, before-step, after-step, open, adopt"),
        ("1.adopt=eat", "the action is none of kill, exit, raise, sleep"),
        ("1.adopt:3=kill", "adopt is in no step"),
        ("1.adopt=kill:3", "sleep needs seconds, and nothing else has them"),
        ("1.adopt=sleep", "sleep needs seconds, and nothing else has them"),
    ],
)
def test_what_is_no_fault_is_refused(
    monkeypatch: pytest.MonkeyPatch, told: str, problem: str
) -> None:
    monkeypatch.setenv("ZMOE_FAIL", f"1.load=kill,{told}")
    with pytest.raises(InputError) as refused:
        failpoints(0)
    assert str(refused.value) == f"ZMOE_FAIL: {told}: {problem}"
