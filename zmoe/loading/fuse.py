"""Whole layers of a loaded model on the kernels, for the families whose layers run in C."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from zmoe.families.decoders import (
    ROUTERS,
    LayerParts,
    ends_of,
    final_norm_of,
    mlp_of,
    parts_of,
    shared_of,
)
from zmoe.families.sites import Site, key_of, replace_module
from zmoe.kernels.attention import AttentionParts
from zmoe.kernels.chain import Chain, Sublayer
from zmoe.kernels.decoder import (
    BufferPool,
    FeedForward,
    MlxFeedForward,
    NativeMoE,
    NativeMoEBlock,
)
from zmoe.kernels.delta_net import DeltaParts, NativeDeltaNet
from zmoe.kernels.experts import NativeExperts
from zmoe.kernels.latent_attention import LatentParts
from zmoe.kernels.mlp import MlpParts, NativeMlp
from zmoe.kernels.paged import PagedStep
from zmoe.kernels.paged_model import Mixer, PagedModel, Run
from zmoe.kernels.rope import RopeTables
from zmoe.kernels.threads import ThreadPool
from zmoe.moe.block import ExpertParallelMoE, Layer
from zmoe.obs import Spans

_Layer = tuple[Mixer, FeedForward]


@dataclass(frozen=True)
class _Shared:
    """What the layers of one model have in common."""

    pool: ThreadPool
    dtype: mx.Dtype
    buffers: BufferPool
    rope_tables: list[RopeTables]

    def mlp(self, norm: Any, parts: MlpParts | None) -> NativeMlp | None:
        return None if parts is None else NativeMlp(norm, parts, self.pool, self.dtype)

    def mixer(self, parts: AttentionParts | LatentParts | DeltaParts) -> Mixer:
        if isinstance(parts, DeltaParts):
            return NativeDeltaNet(parts, self.pool, self.dtype)
        return parts.make(self.tables_of(parts.rope, parts.rope_width), self.pool, self.dtype)

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
) -> PagedModel | None:
    """The whole model on the kernels, if each of its decoder layers is known.

    Otherwise the layers stay on mlx-lm's caches, and MoE blocks are replaced that are known.

    The model's linear layers are native and its MoE blocks expert-parallel by
    now; `sites` and `layers` are those of the blocks, in the same order, and
    `experts` the native experts by `Site.path`.
    """
    padding = max(layer.ownership.most_padding for layer in layers)
    shared = _Shared(pool, dtype, BufferPool(dtype, padding), [])
    by_layer = {site.layer: (site, layer) for site, layer in zip(sites, layers)}

    originals = list(model.layers)
    parts, ends = parts_of(model), None
    if parts is not None:
        language_model, holder = _holders_of(model, originals[0])
        ends = ends_of(language_model, holder)
    if parts is not None and ends is not None:
        step = PagedStep(shared.rope_tables)
        made: list[_Layer] = []
        for index, part in enumerate(parts):
            beside = _feed_forward(originals[index], part, by_layer.get(index), experts, shared)
            made.append((shared.mixer(part.mixer), beside))
        runs = _runs(made, pool, step, layers[0].spans)
        embedding, head = ends
        norm = final_norm_of(holder)
        return PagedModel(embedding, norm, head, made, runs, step, pool, dtype)
    _replace_blocks(model, zip(sites, layers), experts, shared)
    return None


def _runs(layers: Sequence[_Layer], pool: ThreadPool, step: PagedStep, spans: Spans) -> list[Run]:
    """What runs all layers: each as many as C runs by itself, and a feed-forward network."""
    runs: list[Run] = []
    sublayers: list[Sublayer] = []
    for mixer, beside in layers:
        sublayers.append(mixer.sublayer)
        if isinstance(beside, NativeMlp) or (isinstance(beside, NativeMoE) and beside.is_whole):
            sublayers.append(beside.sublayer)
            continue
        beside.follow(sublayers, step)
        runs.append(beside)
        sublayers = []
    if sublayers:
        last = Chain(sublayers, pool, step, spans)
        runs.append(lambda h, memory: last(h, len(memory)))
    return runs


def _holders_of(model: Any, layer: Module) -> tuple[Any, Any]:
    """The module that has the list of the model's layers, of which `layer` is one; before it, the
    module that has that one.
    """
    modules = dict(model.named_modules())
    path = next(path for path, module in modules.items() if module is layer)
    holder = path.rpartition(".")[0].rpartition(".")[0]
    return modules[holder.rpartition(".")[0]], modules[holder]


def _feed_forward(
    layer: Any,
    part: LayerParts,
    moe: tuple[Site, Layer] | None,
    experts: dict[str, NativeExperts],
    shared: _Shared,
) -> FeedForward:
    module = layer[part.feed_forward]
    if moe is None or not isinstance(module, ExpertParallelMoE):
        dense = shared.mlp(part.norm, mlp_of(module))
        return dense or MlxFeedForward(part.norm, module, shared.pool, shared.dtype)
    native = _moe(part.norm, *moe, experts, shared)
    return native or MlxFeedForward(part.norm, module, shared.pool, shared.dtype)


def _moe(
    norm: Any, site: Site, layer: Layer, experts: dict[str, NativeExperts], shared: _Shared
) -> NativeMoE | None:
    """A block in C, `norm` included; None unless its router, experts and sum are known."""
    router, own, adapter = ROUTERS.get(key_of(site.block)), experts.get(site.path), site.adapter
    if router is None or own is None or not own.is_fused:
        return None
    if adapter is None or not adapter.only_adds:
        return None
    beside = shared.mlp(norm, shared_of(site.block))
    parts = router(site.block)
    return NativeMoE(
        norm, parts, site.block, adapter, own, layer, shared.pool, shared.buffers, beside
    )


def _replace_blocks(
    model: Any,
    blocks: Iterable[tuple[Site, Layer]],
    experts: dict[str, NativeExperts],
    shared: _Shared,
) -> None:
    modules = dict(model.named_modules())
    for site, layer in blocks:
        native = _moe(None, site, layer, experts, shared)
        if native is not None and isinstance(modules[site.path], ExpertParallelMoE):
            replace_module(model, site.path, NativeMoEBlock(site.block, native))
