"""Choosing what runs the plans on a node."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from zmoe.config import EngineConfig
from zmoe.engine.base import Engine, Graph, LogitRows, SteppedReducer
from zmoe.engine.mlx_caches import MlxEngine
from zmoe.engine.paged import PagedEngine, PagedModel


def make_engine(
    model: Callable[..., mx.array],
    reducer: SteppedReducer,
    config: EngineConfig,
    head: LogitRows,
    paged: PagedModel | None,
    graph: Graph | None = None,
    plans_ahead: bool = False,
) -> Engine:
    """The engine of a loaded model; `paged` is what runs in its place if all of it is in C, `graph`
    has its exchanges if MLX's graph does. `plans_ahead`: see MlxEngine.
    """
    if paged is None:
        return MlxEngine(model, reducer, head, config.max_kv_size, graph, plans_ahead)
    paged.limit(config.max_kv_size)
    paged.quantize(config.kv_bits)
    return PagedEngine(paged, reducer)
