"""Who may ask: API keys, pages of other origins, names that are not ours; and for how long."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from contextvars import ContextVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zmoe.exchange.keys import is_loopback
from zmoe.server.errors import ApiError
from zmoe.server.http import error_answer

SALT: ContextVar[bytes] = ContextVar("SALT", default=b"")  # of the request that is handled
_OPEN_PATHS = ("/health", "/")  # and the page's files
_PAGE = "/page/"


class Guard:
    """Middleware that lets only those in who may ask, and ends what takes too long."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], host: str, timeout: float) -> None:
        """`keys`: one of them is needed, unless there are none. `host`: where the server listens.
        `timeout`: the longest that a request may take, in seconds.
        """
        self._app, self._timeout = app, timeout
        self._keys = [key.encode() for key in keys]
        # Without keys nothing but the name tells our page from one whose name was made to
        # lead here (DNS rebinding).
        self._local_names_only = not keys and is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def told(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
            async with asyncio.timeout(self._timeout):
                await self._app(scope, receive, told)
        except ApiError as error:
            await error_answer(scope["path"], error)(scope, receive, send)
        except TimeoutError:
            if begun:
                raise
            late = ApiError(504, f"the request took more than {self._timeout:g} s", code="timeout")
            await error_answer(scope["path"], late)(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for a request that is not let in."""
        host = headers.get("host", "")
        if self._local_names_only and not _is_local_name(host):
            raise ApiError(
                403, f"this server has no name but localhost: the request is for {host[:100]!r}"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, f"a page of another origin asks: {origin[:100]!r}")
        if self._keys and scope["path"] not in _OPEN_PATHS and not scope["path"].startswith(_PAGE):
            SALT.set(self._salt(headers))

    def _salt(self, headers: Headers) -> bytes:
        """What keeps a key's prompts apart from others'. Raises ApiError for a wrong key."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")
        sent = given.strip().encode("utf-8", "replace")
        if not sent:
            raise ApiError(
                401, "an API key is needed: Authorization: Bearer KEY", code="no_api_key"
            )
        if not any([hmac.compare_digest(sent, key) for key in self._keys]):
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
        return hashlib.blake2b(sent, digest_size=16).digest()


def _is_local_name(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    return is_loopback(name) or name.endswith(".localhost")
