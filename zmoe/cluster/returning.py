"""Workers that were lost and come back: greeted, checked and loaded while the others run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from zmoe.cluster.crew import check_protocol
from zmoe.cluster.hello import check_hello
from zmoe.cluster.messages import Enter, Hello, Join, Message, Ready, Setup
from zmoe.errors import LaunchError, ZmoeError
from zmoe.placement.types import Placement

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # before a worker is started again


class Restarts:
    """When to start the workers again that this leader has started, and that have ended."""

    def __init__(self, start: Callable[[int], None], on_notice: Callable[[str], None]) -> None:
        """`start(rank)` raises LaunchError where it cannot be done."""
        self._start, self._on_notice = start, on_notice
        self._due: dict[int, float] = {}
        self._pauses: dict[int, float] = {}

    def ended(self, rank: int) -> None:
        """Start this one after a while, which is longer each time."""
        pause = self._pauses.get(rank, _FIRST_PAUSE_S)
        self._pauses[rank] = min(2 * pause, _LONGEST_PAUSE_S)
        self._due[rank] = time.monotonic() + pause

    def entered(self, rank: int) -> None:
        """This one is all right."""
        self._pauses.pop(rank, None)

    def start(self) -> None:
        """Start those that are due."""
        now = time.monotonic()
        for rank in [rank for rank, due in self._due.items() if due <= now]:
            del self._due[rank]
            try:
                self._start(rank)
            except LaunchError as error:
                self._on_notice(str(error))
                self.ended(rank)


@dataclass(frozen=True)
class Terms:
    """What the run of the others is, to which a worker comes back; `hello` is the leader's.
    `divides`: the view that it enters says what it loads.
    """

    setup: Setup
    placement: Placement
    isa: str
    figures: tuple[float, ...]
    hello: Hello
    divides: bool


class Returns:
    """The workers on their way back, to a run with `blocks` blocks of keys and values."""

    def __init__(self, terms: Terms, blocks: int) -> None:
        self._terms = terms
        self._enter = Enter(terms.placement, terms.isa, blocks, terms.figures, terms.divides)
        self._hosts: dict[int, str] = {}

    def answer(self, rank: int, message: Message) -> Setup | Enter | None:
        """What to tell a worker that is out and has said this; None: once it has loaded.

        Raises MismatchError for one that cannot share the run, ZmoeError for what it cannot say.
        """
        terms = self._terms
        if isinstance(message, Join):
            self._hosts[rank] = message.host
            check_protocol(message)
            return terms.setup
        name = f"node {rank} ({self._hosts.get(rank, 'which never joined')})"
        if isinstance(message, Hello):
            check_hello(terms.hello, message, name, terms.setup.engine.schedule)
            return self._enter
        if isinstance(message, Ready) and message.placement == terms.placement.digest:
            return None
        raise ZmoeError(f"{name} sent an unexpected {type(message).__name__}")
