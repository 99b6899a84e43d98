"""Answers of /v1/responses that later requests may go on from, in memory."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from zmoe.server.errors import ApiError
from zmoe.server.security import SALT

MOST_RESPONSES = 1000
MOST_BYTES = 64 << 20
KEPT_S = 6 * 3600.0  # since it was last used


class ResponseStore:
    """Keeps responses by id, each with the items of its conversation, for whoever made them.

    The one that was not used for longest goes first.
    """

    def __init__(
        self,
        most: int = MOST_RESPONSES,
        most_bytes: int = MOST_BYTES,
        kept: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._most_bytes, self._kept, self._clock = most, most_bytes, kept, clock
        self._entries: OrderedDict[tuple[bytes, str], tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def put(self, response: dict[str, Any], items: list[Any]) -> None:
        """Keep a response, unless it alone is larger than all may be."""
        entry = json.dumps([response, items], ensure_ascii=False).encode()
        if len(entry) > self._most_bytes:
            return
        self._entries[SALT.get(), response["id"]] = self._clock(), entry
        self._bytes += len(entry)
        self._expire()

    def get(self, id: str, param: str | None = None) -> tuple[dict[str, Any], list[Any]]:
        """A response and its items. Raises ApiError, for the field `param`."""
        self._expire()
        key = SALT.get(), id
        if key not in self._entries:
            raise ApiError(
                404 if param is None else 400,
                f"the response {id[:100]!r} is not here: it was not stored, or not lately used",
                param,
                "response_not_found" if param is None else "previous_response_not_found",
            )
        _, entry = self._entries[key]
        self._entries[key] = self._clock(), entry
        self._entries.move_to_end(key)
        response, items = json.loads(entry)
        return response, items

    def delete(self, id: str) -> None:
        """Forget a response. Raises ApiError."""
        self.get(id)
        self._drop((SALT.get(), id))

    def _drop(self, key: tuple[bytes, str]) -> None:
        self._bytes -= len(self._entries.pop(key)[1])

    def _expire(self) -> None:
        while self._entries:
            key, (used, _) = next(iter(self._entries.items()))
            is_old = self._clock() - used > self._kept
            if not (is_old or len(self._entries) > self._most or self._bytes > self._most_bytes):
                return
            self._drop(key)
