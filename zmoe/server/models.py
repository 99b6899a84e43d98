"""Which model is served, whether it is ready, and its tokens."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server.front import Front
from zmoe.server.openapi import operation


def routes(front: Front) -> list[Route]:
    """Their endpoints."""

    @operation("The model that is served")
    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_description(front)]})

    @operation("The model of that name")
    async def model(request: Request) -> Response:
        front.check_model(request.path_params["name"])
        return JSONResponse(_description(front))

    @operation("Whether requests can run: status 200 or 503")
    async def health(_: Request) -> Response:
        status, reason, stats = front.status, front.link.reason, front.link.stats
        can_run = status == "ready"
        if can_run and stats is not None and stats.lost:
            status = "degraded"
            reason = "; ".join(_lost(rank, stats.hosts[rank]) for rank in stats.lost)
        found = {"status": status, "model": front.model, "reason": reason or None}
        return JSONResponse(found, 200 if can_run else 503)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
    ]


def _lost(rank: int, host: int | None) -> str:
    if host is None:
        return f"node {rank} is lost, and the others have divided its share"
    return f"node {rank} is lost, and node {host} computes its share"


def _description(front: Front) -> dict[str, object]:
    return {
        "id": front.model,
        "object": "model",
        "created": front.created,
        "owned_by": "zmoe",
        "max_model_len": front.context,
    }
