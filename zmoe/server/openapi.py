"""GET /openapi.json: the API as its routes and the bodies of their requests describe it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from zmoe import __version__
from zmoe.server.front import Front
from zmoe.server.http import Body

Handler = TypeVar("Handler", bound=Callable[..., Any])
_COMPONENTS = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True)
class Operation:
    """What a handler does, the body that it takes, and the media type of its answers."""

    summary: str
    body: type[Body] | None
    produces: str


def operation(
    summary: str, body: type[Body] | None = None, produces: str = "application/json"
) -> Callable[[Handler], Handler]:
    """Describe the handler of a route, for /openapi.json."""

    def describe(handler: Handler) -> Handler:
        handler.operation = Operation(summary, body, produces)  # type: ignore[attr-defined]
        return handler

    return describe


def routes(front: Front, described: Sequence[BaseRoute]) -> list[Route]:
    """The endpoint, which describes the routes `described`."""
    found: dict[str, Any] = {}

    @operation("This description")
    async def openapi(_: Request) -> Response:
        if not found:
            found.update(description_of([*described, *own], bool(front.config.api_key_file)))
        return JSONResponse(found)

    own = [Route("/openapi.json", openapi)]
    return own


def description_of(described: Sequence[BaseRoute], needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 description of all routes whose handlers have an operation()."""
    operations = [
        (route, route.endpoint.operation)
        for route in described
        if isinstance(route, Route) and hasattr(route.endpoint, "operation")
    ]
    bodies = list(dict.fromkeys(each.body for _, each in operations if each.body is not None))
    references, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_COMPONENTS
    )
    by_body = {body: schema for (body, _), schema in references.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route, found in operations:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", route.path)
        for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
            described_as = _operation(route, found, by_body)
            paths.setdefault(path, {})[method.lower()] = described_as
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "zmoe", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "ErrorAnswer": _ERROR}},
    }
    if needs_key:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


def _operation(route: Route, found: Operation, by_body: dict[Any, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {found.produces: {}}
    described: dict[str, Any] = {"summary": found.summary}
    if names := re.findall(r"{(\w+)", route.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if found.body is not None:
        schema = by_body[found.body]
        content = {"application/json": {"schema": schema}}
        described["requestBody"] = {"required": True, "content": content}
        if "stream" in found.body.model_fields:
            answers["text/event-stream"] = {}
    error = {"schema": {"$ref": _COMPONENTS.format(model="ErrorAnswer")}}
    described["responses"] = {
        "200": {"description": "The answer", "content": answers},
        "default": {"description": "An error", "content": {"application/json": error}},
    }
    return described
