"""GET /v1/cluster: the nodes, what each holds, and what the cluster does."""

from __future__ import annotations

import dataclasses
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe import __version__
from zmoe.batch.plan import BLOCK
from zmoe.server.front import Front
from zmoe.server.history import Interval
from zmoe.server.messages import Ready, Stats
from zmoe.server.openapi import operation


def routes(front: Front) -> list[Route]:
    """The endpoint."""

    @operation("The nodes of the cluster, what they hold and what they do")
    async def cluster(_: Request) -> Response:
        return JSONResponse(status_of(front))

    return [Route("/v1/cluster", cluster)]


def status_of(front: Front) -> dict[str, Any]:
    """All that is known; while the model loads that is little."""
    link = front.link
    engine = link.spec.engine
    found: dict[str, Any] = {
        "object": "cluster",
        "version": __version__,
        "status": front.status,
        "reason": link.reason or None,
        "restarts": link.restarts,
        "schedule": engine.schedule,
        "policy": engine.policy,
        "encrypted": link.spec.encrypted,
        "model": {"id": front.model},
        "nodes": [],
    }
    if link.ready is not None:
        found |= _of_ready(link.ready, front.model)
        found["wire_dtype"] = link.ready.dtype if engine.wire_dtype == "auto" else engine.wire_dtype
        found["nodes"] = _nodes(link.ready, link.stats)
    if link.stats is not None and link.ready is not None:
        counts, layers = link.stats.counts, link.ready.layers
        found["queue"] = {
            "running": counts.running,
            "waiting": counts.waiting,
            "parallel": engine.parallel,
        }
        found["cache"] = {
            "blocks": counts.blocks,
            "used": counts.blocks - counts.blocks_available,
            "tokens_per_block": BLOCK,
        }
        found["recent"] = _of_interval(link.history.recent(layers))
        found["total"] = _of_interval(link.history.total(layers))
        found["counts"] = dataclasses.asdict(counts)
    return found


def _of_ready(ready: Ready, model: str) -> dict[str, Any]:
    return {
        "model": {
            "id": model,
            "type": ready.model_type,
            "dtype": ready.dtype,
            "quantization": ready.quantization,
            "layers": ready.layers,
            "moe_layers": ready.moe_layers,
            "experts": ready.experts,
            "top_k": ready.top_k,
            "vocabulary": ready.vocabulary,
            "context": ready.context or None,
        },
        "placement": {"name": ready.placement, "reason": ready.placement_reason},
        "compute": ready.compute,
        "load_seconds": round(ready.load_seconds, 3),
    }


def _nodes(ready: Ready, stats: Stats | None) -> list[dict[str, Any]]:
    """By rank. The leader sees its own links only: `link` is None for itself. `computed_by` is the
    node that computes its share, another one while it is lost, or None for all others together.
    `compute_ms` is what it computes in a step, without its waits for others, and `slow` says so if
    that is much more than theirs.
    """
    compute_s = stats.step_seconds if stats is not None else {}
    return [
        {
            "rank": rank,
            "role": "worker" if rank else "leader",
            "host": node.host,
            "listens": list(node.ports),
            "machine": node.machine,
            "experts": node.experts,
            "expert_share": node.expert_share,
            "memory": node.memory,
            "peak_memory": stats.peak_memory[rank] if stats is not None else node.peak_memory,
            "memory_gb_per_s": node.speed or None,
            "link": _link(rank, stats),
            "computed_by": stats.hosts[rank] if stats is not None else rank,
            "compute_ms": round(1e3 * compute_s[rank], 3) if rank in compute_s else None,
            "slow": stats.slow.get(rank) if stats is not None else None,
        }
        for rank, node in enumerate(ready.nodes)
    ]


def _link(rank: int, stats: Stats | None) -> str | None:
    if rank == 0 or stats is None:
        return None
    if rank in stats.lost:
        return "lost"
    return "up" if rank in stats.links else "down"


def _of_interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    seconds = interval.seconds or 1.0
    return {
        "seconds": round(interval.seconds, 3),
        "steps": interval.steps,
        "generated_tokens_per_second": round(interval.generated_tokens / seconds, 2),
        "prompt_tokens_per_second": round(interval.prompt_tokens / seconds, 2),
        "cached_tokens": interval.cached_tokens,
        "layer_us": {part: round(1e6 * s, 2) for part, s in interval.layer_seconds.items()},
    }
