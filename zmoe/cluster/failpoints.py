"""Faults on purpose, for tests: the variable ZMOE_FAIL has nodes die, fail or stall at some sites.

It holds faults with commas between them, each RANK.SITE[:STEP]=ACTION[:SECONDS][@FILE]. A fault
with a step, which only `before-step` and `after-step` can have, acts in that step alone. One with
a file acts only if that is there, and removes it: once, and from when a test makes the file. For
example, `1.adopt=kill` kills node 1 where it adopts a share, and `2.before-step=sleep:0.1` makes
node 2 slow.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zmoe.errors import InputError, ZmoeError

VARIABLE = "ZMOE_FAIL"
# Loading a share, connecting (at first, and in every view), steps, entering a view, adopting.
SITES = ("load", "connect", "before-step", "after-step", "open", "adopt")
_FAULT = re.compile(r"(\d+)\.([a-z-]+)(?::(\d+))?=([a-z]+)(?::(\d+(?:\.\d+)?))?(?:@([^@]+))?")
_EXPECTED = "expected RANK.SITE[:STEP]=ACTION[:SECONDS][@FILE]"


class Reach(Protocol):
    """What a node calls at each site; `step` is that of before-step and after-step."""

    def __call__(self, site: str, step: int = 0) -> None: ...


def failpoints(rank: int) -> Reach:
    """The faults of node `rank`. Raises InputError for a ZMOE_FAIL that holds something else."""
    faults = defaultdict[str, list[_Fault]](list)
    for text in filter(None, os.environ.get(VARIABLE, "").split(",")):
        fault = _parsed(text)
        if fault.rank == rank:
            faults[fault.site].append(fault)
    if not faults:
        return _nothing

    def reach(site: str, step: int = 0) -> None:
        for fault in faults[site]:
            if fault.step in (None, step) and fault.is_armed():
                _ACTIONS[fault.action](fault)

    return reach


def _nothing(site: str, step: int = 0) -> None:
    """Of a node without faults."""


@dataclass(frozen=True)
class _Fault:
    rank: int
    site: str
    step: int | None
    action: str
    seconds: float
    file: str | None

    def is_armed(self) -> bool:
        if self.file is None:
            return True
        try:
            Path(self.file).unlink()
        except FileNotFoundError:
            return False
        return True


def _parsed(text: str) -> _Fault:
    found = _FAULT.fullmatch(text)
    if found is None:
        raise InputError(f"{VARIABLE}: {text}: {_EXPECTED}")
    rank, site, step, action, seconds, file = found.groups()
    if site not in SITES:
        raise InputError(f"{VARIABLE}: {text}: the site is none of {', '.join(SITES)}")
    if action not in _ACTIONS:
        raise InputError(f"{VARIABLE}: {text}: the action is none of {', '.join(_ACTIONS)}")
    if step is not None and not site.endswith("-step"):
        raise InputError(f"{VARIABLE}: {text}: {site} is in no step")
    if (seconds is not None) != (action == "sleep"):
        raise InputError(f"{VARIABLE}: {text}: sleep needs seconds, and nothing else has them")
    at = None if step is None else int(step)
    return _Fault(int(rank), site, at, action, float(seconds or 0), file)


def _kill(fault: _Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(fault: _Fault) -> None:
    os._exit(1)


def _raise(fault: _Fault) -> None:
    raise ZmoeError(f"{VARIABLE} has node {fault.rank} fail: {fault.site}")


def _sleep(fault: _Fault) -> None:
    time.sleep(fault.seconds)


_ACTIONS: dict[str, Callable[[_Fault], None]] = {
    "kill": _kill,
    "exit": _exit,
    "raise": _raise,
    "sleep": _sleep,
}
