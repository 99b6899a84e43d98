"""Grammars compiled beside the engine's loop, since that takes up to some seconds."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait

from zmoe.errors import InputError, QueueFullError, QueueTimeoutError, ZmoeError
from zmoe.server.grammar import GrammarConstraint, Grammars
from zmoe.server.messages import Submit

_THREADS = 2
_GLANCE_S = 0.002  # which a grammar that is simple, or known, does not exceed
COMPILE_S = 60.0  # within which a grammar must be ready


class Compiler:
    """Holds up to `most` requests back until their grammars are ready. All methods belong to one
    thread; llguidance compiles in others, without holding Python's lock.
    """

    def __init__(self, grammars: Grammars, most: int) -> None:
        self._grammars, self._most = grammars, most
        self._threads = ThreadPoolExecutor(_THREADS, "zmoe-grammars")
        self._waiting: dict[int, tuple[Submit, Future[GrammarConstraint], float]] = {}

    def __bool__(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._waiting)

    def add(self, request: Submit) -> None:
        """Compile the grammar of `request`. Raises QueueFullError where too many wait."""
        if len(self._waiting) >= self._most and request.generated is None:
            raise QueueFullError(len(self._waiting))
        until = time.monotonic() + COMPILE_S
        found = self._threads.submit(self._grammars.start, request.grammar, request.grammar_after)
        self._waiting[request.number] = (request, found, until)

    def drop(self, number: int) -> None:
        """Forget a request, if it waits here."""
        if number in self._waiting:
            self._waiting.pop(number)[1].cancel()

    def take(self) -> list[tuple[Submit, GrammarConstraint | ZmoeError]]:
        """The requests whose grammars are ready, or refused, since the last time."""
        if not self._waiting:
            return []
        futures = [found for _, found, _ in self._waiting.values()]
        wait(futures, _GLANCE_S, FIRST_COMPLETED)
        taken: list[tuple[Submit, GrammarConstraint | ZmoeError]] = []
        for number, (request, found, until) in list(self._waiting.items()):
            is_late = time.monotonic() >= until
            if not found.done() and not is_late:
                continue
            self.drop(number)
            try:
                taken.append((request, found.result(0)))
            except InputError as error:
                taken.append((request, error))
            except (TimeoutError, CancelledError):
                late = QueueTimeoutError(f"the grammar was not compiled within {COMPILE_S:g} s")
                taken.append((request, late))
        return taken

    def close(self) -> None:
        """Compile no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
