"""The web application: its routes, and what holds for all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server import chat, models
from zmoe.server.errors import ApiError
from zmoe.server.front import Front
from zmoe.server.http import error_body


def make_app(front: Front) -> Starlette:
    """The application that serves `front`'s model."""
    routes: list[Route] = [*models.routes(front), *chat.routes(front)]
    return Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error_body(error), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    found = ApiError(error.status_code, f"{where}: {error.detail}", code="not_found")
    return JSONResponse(error_body(found), error.status_code, dict(error.headers or {}))
