"""GET /: a page to chat with the model and to watch the cluster, with nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zmoe.server.openapi import operation

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[Route]:
    """A route for each file of the page."""
    served = [file for file in files(__name__).iterdir() if Path(file.name).suffix in _MEDIA_TYPES]
    return [_route(file) for file in sorted(served, key=lambda file: file.name)]


def _route(file: Traversable) -> Route:
    content, media_type = file.read_bytes(), _MEDIA_TYPES[Path(file.name).suffix]
    headers = {**_HEADERS, "Content-Type": media_type}

    @operation(f"The page: {file.name}", produces=media_type.split(";")[0])
    async def send(_: Request) -> Response:
        return Response(content, headers=headers)

    return Route("/" if file.name == "index.html" else f"/page/{file.name}", send)
