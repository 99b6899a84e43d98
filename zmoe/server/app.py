"""The web application: its routes, and what holds for all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route

from zmoe.server import (
    anthropic,
    chat,
    completions,
    metrics,
    models,
    openapi,
    page,
    responses,
    status,
    tokens,
)
from zmoe.server.errors import ApiError
from zmoe.server.front import Front
from zmoe.server.http import error_answer


def make_app(front: Front) -> Starlette:
    """The application that serves `front`'s model."""
    routes: list[Route] = [
        *models.routes(front),
        *tokens.routes(front),
        *chat.routes(front),
        *completions.routes(front),
        *responses.routes(front),
        *anthropic.routes(front),
        *status.routes(front),
        *metrics.routes(front),
        *page.routes(),
    ]
    return Starlette(
        routes=[*routes, *openapi.routes(front, routes)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            RecursionError: _too_deep,
            ClientDisconnect: _gone,
            Exception: _internal_error,
        },
    )


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_answer(request.url.path, error)


def _too_deep(request: Request, _: Exception) -> Response:
    error = ApiError(400, "the body is nested too deeply", code="invalid_value")
    return error_answer(request.url.path, error)


def _gone(request: Request, _: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _internal_error(request: Request, error: Exception) -> Response:
    reason = f"internal error: {type(error).__name__}"
    return error_answer(request.url.path, ApiError(500, reason, code="internal_error"))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    found = ApiError(error.status_code, f"{where}: {error.detail}", code="not_found")
    answer = error_answer(request.url.path, found)
    answer.headers.update(error.headers or {})
    if error.status_code == 405:  # Starlette tells the methods of the path's first route alone
        fitting = (r for r in request.app.routes if r.matches(request.scope)[0] is not Match.NONE)
        answer.headers["Allow"] = ", ".join(sorted({m for r in fitting for m in r.methods}))
    return answer
