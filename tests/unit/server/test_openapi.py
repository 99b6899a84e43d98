"""The description of the API, from routes and bodies."""

from __future__ import annotations

from typing import Literal

import openapi_spec_validator
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zmoe.server.http import Body
from zmoe.server.openapi import description_of, operation


class Inner(Body):
    value: int


class Asked(Body):
    items: list[Inner]
    kind: Literal["a", "b"] = "a"
    stream: bool = False


@operation("Do it", Asked)
async def do(_: Request) -> Response:
    raise NotImplementedError


@operation("See it", produces="text/plain")
async def see(_: Request) -> Response:
    raise NotImplementedError


async def hidden(_: Request) -> Response:
    raise NotImplementedError


ROUTES = [
    Route("/do", do, methods=["POST"]),
    Route("/see/{name:path}", see),
    Route("/hidden", hidden),
]


def test_routes_and_bodies_are_described() -> None:
    found = description_of(ROUTES, needs_key=False)
    assert found["openapi"] == "3.1.0"
    assert list(found["paths"]) == ["/do", "/see/{name}"]
    assert list(found["paths"]["/do"]) == ["post"]  # and no HEAD for the other
    assert list(found["paths"]["/see/{name}"]) == ["get"]
    posted = found["paths"]["/do"]["post"]
    assert posted["summary"] == "Do it"
    reference = posted["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schemas = found["components"]["schemas"]
    schema = schemas[reference.removeprefix("#/components/schemas/")]
    assert schema["required"] == ["items"] and schema["additionalProperties"] is False
    assert schema["properties"]["kind"]["enum"] == ["a", "b"]
    assert "Inner" in schemas
    assert set(posted["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    seen = found["paths"]["/see/{name}"]["get"]
    assert [parameter["name"] for parameter in seen["parameters"]] == ["name"]
    assert set(seen["responses"]["200"]["content"]) == {"text/plain"}


def test_keys_are_described_where_they_are_needed() -> None:
    without, needed = (description_of(ROUTES, needs_key=needs) for needs in (False, True))
    assert "security" not in without
    (scheme,) = needed["security"][0]
    assert needed["components"]["securitySchemes"][scheme]["scheme"] == "bearer"


def test_it_is_valid() -> None:
    openapi_spec_validator.validate(description_of(ROUTES, needs_key=True))
