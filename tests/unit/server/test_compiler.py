"""Requests wait for their grammars apart from the engine's loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from zmoe.config import Sampling
from zmoe.errors import InputError, QueueFullError, QueueTimeoutError
from zmoe.server import compiler
from zmoe.server.compiler import Compiler
from zmoe.server.messages import Submit


class SlowGrammars:
    """Grammars of which "slow" is not ready until it is told, and "wrong" cannot be compiled."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def start(self, grammar: str, after: tuple[int, ...]) -> str:
        if grammar == "slow":
            assert self.go_on.wait(60)
        if grammar == "wrong":
            raise InputError("no grammar")
        return f"constraint of {grammar} behind {after}"


def request(number: int, grammar: str) -> Submit:
    return Submit(number, (1,), Sampling(), (), b"", grammar, (7,), None)


def taken(waiting: Compiler, count: int) -> dict[int, Any]:
    """The next `count` requests, by number."""
    found: dict[int, Any] = {}
    until = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < until
        found |= {request.number: result for request, result in waiting.take()}
    return found


@pytest.fixture
def grammars() -> Iterator[SlowGrammars]:
    found = SlowGrammars()
    yield found
    found.go_on.set()  # or the thread would never end


def test_a_slow_grammar_holds_up_nobody(grammars: SlowGrammars) -> None:
    waiting = Compiler(grammars, most=3)  # type: ignore[arg-type]
    for number, grammar in enumerate(("slow", "simple", "wrong")):
        waiting.add(request(number, grammar))
    found = taken(waiting, 2)
    assert found[1] == "constraint of simple behind (7,)"
    assert isinstance(found[2], InputError)
    assert waiting and waiting.take() == []
    grammars.go_on.set()
    assert taken(waiting, 1) == {0: "constraint of slow behind (7,)"}
    assert not waiting
    waiting.close()


def test_no_more_wait_than_may(grammars: SlowGrammars) -> None:
    waiting = Compiler(grammars, most=1)  # type: ignore[arg-type]
    waiting.add(request(0, "slow"))
    with pytest.raises(QueueFullError):
        waiting.add(request(1, "simple"))
    waiting.drop(0)
    assert not waiting
    waiting.add(request(2, "simple"))
    assert 2 in taken(waiting, 1)
    waiting.drop(2)  # which has left
    waiting.close()


def test_none_waits_for_ever(grammars: SlowGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMPILE_S", 0.01)
    waiting = Compiler(grammars, most=9)  # type: ignore[arg-type]
    for number in range(3):  # the last one's thread is never free
        waiting.add(request(number, "slow"))
    assert all(isinstance(each, QueueTimeoutError) for each in taken(waiting, 3).values())
    waiting.close()
