"""What every endpoint shares: bodies, errors, server-sent events, and ends on disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from zmoe.server.errors import ApiError, anthropic_error_body, error_body

KEEP_ALIVE_S = 10.0  # without an event, until something is sent
BODY_S = 60.0  # within which a request's body must come
KEEP_ALIVE = b": keep-alive\n\n"
MAX_BODY_BYTES = 8 << 20

Answer = TypeVar("Answer")
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A request's JSON object. Unknown fields are errors, and so are numbers in strings; a field
    that is null is one that is not given.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


async def read_body(request: Request, kind: type[B]) -> B:
    """The request's body. Raises ApiError that names the field at fault."""
    raw = await _bytes_of(request)
    try:
        text = raw.decode()
        found = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:  # that of bytes that are not UTF-8, too
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    if "\\ud" in text.lower():  # an escape of half a character outside of the first 65536
        _check_unicode(found)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise _refusal(error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_unicode(found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            param = ascii(name)[1:-1]
            problem = f"{param} holds half of a surrogate pair, which is no Unicode text"
            raise ApiError(400, problem, param, "invalid_value") from None


_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unsupported_parameter"}


def _refusal(error: ValidationError) -> ApiError:
    """The first problem that pydantic has found."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, param = first["type"], _path(first["loc"])
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "refused":
        problem = first["msg"]
    elif kind in _CODES:
        problem = "is missing" if kind == "missing" else "is not supported"
    else:
        problem = f"is wrong: {first['msg']}"
    return ApiError(400, f"{param or 'the body'} {problem}", param or None, code)


def _path(location: tuple[int | str, ...]) -> str:
    """messages[3].content, say."""
    parts = [part for part in location if not str(part).startswith("type=")]  # see type_tag()
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


async def _bytes_of(request: Request) -> bytes:
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                received += chunk
                if len(received) > MAX_BODY_BYTES:
                    limit = f"{MAX_BODY_BYTES >> 20} MiB"
                    raise ApiError(413, f"the body has more than {limit}", code="body_too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_S:g} s", code="timeout") from None
    return bytes(received)


def error_answer(path: str, error: ApiError) -> Response:
    """The answer to a request of `path`, in the form of its API."""
    is_anthropic = f"{path}/".startswith("/v1/messages/")
    body = anthropic_error_body(error) if is_anthropic else error_body(error)
    return JSONResponse(body, error.status, error.headers)


async def until_disconnect(request: Request, work: Awaitable[Answer]) -> Answer:
    """The result of `work`, which is cancelled when the client goes away.

    The body must have been read. Raises ClientDisconnect.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        gone.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


async def event_stream(
    events: AsyncGenerator[bytes, None],
    on_error: Callable[[ApiError], bytes],
    keep_alive: bytes = KEEP_ALIVE,
) -> Response:
    """A stream of `events`, and `keep_alive` while none comes. What is refused before the first
    one is an answer of its own (the ApiError is raised); after that `on_error` makes the last
    event of it.
    """
    waiting = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
        if waiting.done():
            waiting.result()
    except BaseException:
        waiting.cancel()
        await events.aclose()
        raise
    return StreamingResponse(
        _kept_alive(waiting, events, on_error, keep_alive),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _kept_alive(
    waiting: asyncio.Future[bytes],
    events: AsyncGenerator[bytes, None],
    on_error: Callable[[ApiError], bytes],
    keep_alive: bytes,
) -> AsyncIterator[bytes]:
    """The events, with `keep_alive` while none comes."""
    try:
        while True:
            await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
            if not waiting.done():
                yield keep_alive
                continue
            try:
                happened = waiting.result()
            except StopAsyncIteration:
                return
            except ApiError as error:
                yield on_error(error)
                return
            yield happened
            waiting = asyncio.ensure_future(anext(events))
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration, ApiError):
            await waiting
        await events.aclose()
