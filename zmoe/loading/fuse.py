"""Whole layers of a loaded model on the kernels, for the families whose layers run in C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from zmoe.families.decoders import (
    ROUTERS,
    LayerParts,
    final_norm_of,
    mlp_of,
    parts_of,
    shared_of,
)
from zmoe.families.sites import Site, key_of, replace_module
from zmoe.kernels.attention import NativeNorm
from zmoe.kernels.decoder import BufferPool, MlxFeedForward, NativeLayer, NativeMoE, PagedLayers
from zmoe.kernels.experts import NativeExperts
from zmoe.kernels.mlp import MlpMemory, MlpParts, NativeMlp
from zmoe.kernels.paged import PagedStep
from zmoe.kernels.residual import ResidualBuffer, RopeTables
from zmoe.kernels.threads import ThreadPool
from zmoe.moe.block import ExpertParallelMoE, Layer


@dataclass(frozen=True)
class _Shared:
    """What the layers of one model have in common."""

    pool: ThreadPool
    dtype: mx.Dtype
    residual: ResidualBuffer
    buffers: BufferPool
    mlp_memory: MlpMemory
    rope_tables: list[RopeTables]

    def mlp(self, norm: Any, parts: MlpParts | None) -> NativeMlp | None:
        return None if parts is None else NativeMlp(norm, parts, self.mlp_memory, self.pool)

    def tables_of(self, rope: Any, head_dim: int) -> RopeTables:
        """One for all layers with the same RoPE, so that its tables are made once per step."""
        for known in self.rope_tables:
            if _same(known.rope, rope):
                return known
        self.rope_tables.append(RopeTables(rope, head_dim))
        return self.rope_tables[-1]


def _same(a: Module, b: Module) -> bool:
    """Whether two rotary embeddings have the same settings and frequencies."""
    ours, theirs = vars(a) | dict(a), vars(b) | dict(b)
    if type(a) is not type(b) or ours.keys() != theirs.keys():
        return False
    return all(
        bool(mx.array_equal(value, theirs[name]).item())
        if isinstance(value, mx.array)
        else value == theirs[name]
        for name, value in ours.items()
    )


def fuse_layers(
    model: Any,
    sites: Sequence[Site],
    layers: Sequence[Layer],
    experts: dict[str, NativeExperts],
    pool: ThreadPool,
    dtype: mx.Dtype,
) -> PagedLayers | None:
    """Replace all decoder layers by NativeLayers if each of them is known; returns their caches.

    The model's linear layers are native and its MoE blocks expert-parallel by
    now; `sites` and `layers` are those of the blocks, in the same order, and
    `experts` the native experts by `Site.path`.
    """
    parts = parts_of(model)
    if parts is None:
        return None
    width = parts[0].attention.output._matmul.weight.out_features
    padding = max(layer.ownership.most_padding for layer in layers)
    buffers = BufferPool(dtype, padding)
    shared = _Shared(pool, dtype, ResidualBuffer(width), buffers, MlpMemory(width, dtype), [])
    by_layer = {site.layer: (site, layer) for site, layer in zip(sites, layers)}
    paths = {id(module): path for path, module in model.named_modules()}
    first, *_ = originals = list(model.layers)
    step, attentions = PagedStep(), []
    for index, (layer, part) in enumerate(zip(originals, parts)):
        rope_tables = shared.tables_of(part.attention.rope, part.attention.rope_width)
        attention = part.attention.make(rope_tables, step, pool, dtype)
        attentions.append(attention)
        feed_forward = _feed_forward(layer, part, by_layer.get(index), experts, shared)
        native = NativeLayer(layer, attention, feed_forward, shared.residual)
        replace_module(model, paths[id(layer)], native)
    holder = dict(model.named_modules())[paths[id(first)].rpartition(".")[0].rpartition(".")[0]]
    norm = final_norm_of(holder)
    replace_module(model, paths[id(norm)], NativeNorm(norm, pool, dtype))
    return PagedLayers(attentions, step)


def _feed_forward(
    layer: Any,
    part: LayerParts,
    moe: tuple[Site, Layer] | None,
    experts: dict[str, NativeExperts],
    shared: _Shared,
) -> NativeMoE | NativeMlp | MlxFeedForward:
    module = layer[part.feed_forward]
    if moe is None or not isinstance(module, ExpertParallelMoE):
        dense = shared.mlp(part.norm, mlp_of(module))
        return dense or MlxFeedForward(part.norm, module, shared.dtype)
    site, place = moe
    router = ROUTERS.get(key_of(site.block))
    own = experts.get(site.path)
    if own is None or not own.is_fused or router is None:
        return MlxFeedForward(part.norm, module, shared.dtype)
    if site.adapter is None or not site.adapter.only_adds:
        return MlxFeedForward(part.norm, module, shared.dtype)
    return NativeMoE(
        part.norm,
        router(site.block),
        site.block,
        site.adapter,
        own,
        place,
        shared.pool,
        shared.buffers,
        shared.mlp(part.norm, shared_of(site.block)),
    )
