"""What /v1/chat/completions and /v1/completions share: the handler, and the head of an answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zmoe.server.errors import error_body
from zmoe.server.fields import CompletionFields
from zmoe.server.front import Front
from zmoe.server.http import event, event_stream, read_body, until_disconnect
from zmoe.server.openapi import operation

Fields = TypeVar("Fields", bound=CompletionFields)


class Answer(Protocol):
    """Choices that have been begun."""

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""

    async def whole(self) -> Response:
        """The answer in one piece."""


def endpoint(
    front: Front,
    path: str,
    summary: str,
    body_type: type[Fields],
    begin: Callable[[Fields], Awaitable[Answer]],
) -> Route:
    """The route of `path`, whose requests `begin` answers, in a stream or in one piece."""

    @operation(summary, body_type)
    async def answer(request: Request) -> Response:
        body = await read_body(request, body_type)
        front.check_model(body.model)
        front.check_ready()
        begun = await begin(body)
        if body.stream:
            return await event_stream(begun.chunks(), lambda error: event(error_body(error)))
        return await until_disconnect(request, begun.whole())

    return Route(path, answer, methods=["POST"])


def head_of(front: Front, prefix: str) -> dict[str, Any]:
    """The fields with which an answer begins, and each chunk of its stream."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": front.model,
        "system_fingerprint": front.fingerprint,
    }
