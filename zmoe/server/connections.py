"""Connections as strangers see them: how many there may be, and how long one may dawdle."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 2048
HEAD_S = 20.0  # in which the head of a request must have come
STALLED_S = 60.0  # that a client may leave what we write unread


class BoundedProtocol(H11Protocol):
    """Ends connections that are too many, send no whole request, or do not read."""

    _late: asyncio.TimerHandle | None = None  # ends the connection without a request
    _stalled: asyncio.TimerHandle | None = None  # ends the one that does not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._late = self.loop.call_later(HEAD_S, self._end_if_idle)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self._is_idle() and self._late is None:
            self._late = self.loop.call_later(HEAD_S, self._end_if_idle)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._stop(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        self._stop(self._late)
        self._stop(self._stalled)

    def _is_idle(self) -> bool:
        """Whether no request has come whole and waits for its answer."""
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete

    def _end_if_idle(self) -> None:
        self._late = None
        if self._is_idle():
            self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
