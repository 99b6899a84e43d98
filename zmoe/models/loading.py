"""Load a node's share of a checkpoint into a model that computes with its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from zmoe.errors import PlacementError
from zmoe.models.assembly import Feed, Sanitize, Weights, assemble
from zmoe.models.checkpoint import read_tensors
from zmoe.models.discover import Site, find_sites, projections, replace_module
from zmoe.models.share import Piece, Reader, placeholder, select
from zmoe.models.usage import unused_names
from zmoe.moe.block import ExpertParallelMoE, ExpertParallelSwitch, Layer
from zmoe.obs import Spans
from zmoe.types import ModelInfo, Placement, Reducer

Progress = Callable[[int, int], None]  # bytes read, bytes in all

_CACHE_BYTES = 16 << 20

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class LoadedShard:
    """A model with this node's experts, and what loading it took.

    `share_bytes` is what the model's arrays take, `largest_tensor_bytes` the
    largest of them, `bytes_read` what was read of the checkpoint for them.
    `notices` are lines for the user.
    """

    model: Module
    config: dict[str, Any]
    bytes_read: int
    share_bytes: int
    largest_tensor_bytes: int
    notices: tuple[str, ...]


def load_shard(
    info: ModelInfo,
    placement: Placement,
    reducer: Reducer,
    *,
    spans: Spans,
    progress: Progress | None = None,
) -> LoadedShard:
    """Load the dense weights and the experts that `placement` gives `reducer.rank`.

    Reads only these byte ranges, once all names and shapes are known to fit;
    never holds more than they take and one more tensor. Layers may own
    different numbers of experts, or none. The model runs in the thread that
    loads it. Raises ModelError naming what is damaged or missing,
    PlacementError for a placement of another model.
    """
    owned = _owned(info, placement, reducer.rank)
    count = max(1, *(len(ids) for ids in owned))
    pieces, unused = _plan(info, owned, count)
    with Reader() as reader:
        feed = _reading(pieces, unused, reader, progress)
        model, config = assemble(Path(info.path), feed, (info.experts, count))
    sites = find_sites(model)
    for site, ids in zip(sites, owned, strict=True):
        _trim(site, len(ids), count)
    arrays = _evaluate(model)
    for ordinal, (site, ids) in enumerate(zip(sites, owned, strict=True)):
        layer = Layer(ordinal, info.experts, ids, DTYPES[info.dtype], reducer, spans)
        _install(model, site, layer)
    return LoadedShard(
        model,
        config,
        reader.bytes_read,
        sum(array.nbytes for array in arrays),
        max(array.nbytes for array in arrays),
        _notices(sites),
    )


def _owned(info: ModelInfo, placement: Placement, rank: int) -> list[tuple[int, ...]]:
    """Expert ids of `rank` per MoE layer, once the placement fits the model."""
    layers = len(info.moe_layers)
    if placement.experts != info.experts or len(placement.owned) != layers:
        raise PlacementError(
            f"a placement of {placement.experts} experts in {len(placement.owned)} layers"
            f" does not fit {info.path}: {info.experts} in {layers}"
        )
    return [layer[rank] for layer in placement.owned]


def _plan(
    info: ModelInfo, owned: list[tuple[int, ...]], count: int
) -> tuple[list[Piece], set[str]]:
    """What to read, and the names of what the model has no use for.

    Found by putting it together without any weights, so faults show before
    anything is read.
    """
    path = Path(info.path)
    own = dict(zip(info.moe_layers, owned, strict=True))
    pieces = select(read_tensors(path), info.experts, own, count)
    unused: set[str] = set()

    def feed(sanitize: Sanitize, _: Weights) -> Weights:
        nothing = {piece.name: placeholder(piece) for piece in pieces}
        unused.update(unused_names(sanitize, nothing))
        return sanitize(nothing)

    assemble(path, feed, (info.experts, count))
    kept = (piece for piece in pieces if piece.name not in unused)
    return sorted(kept, key=lambda piece: (piece.source.file, piece.source.start)), unused


def _reading(
    pieces: list[Piece], unused: set[str], reader: Reader, progress: Progress | None
) -> Feed:
    """A feed of what the files hold; what is of no use stays unread."""
    total = sum(piece.nbytes for piece in pieces)

    def feed(sanitize: Sanitize, offered: Weights) -> Weights:
        weights = {name: offered[name] for name in unused if name in offered}
        for piece in pieces:
            weights[piece.name] = reader.read(piece)
            if progress is not None:
                progress(reader.bytes_read, total)
        return sanitize(weights)

    return feed


def _trim(site: Site, own: int, count: int) -> None:
    """Drop the zeros that stood in for experts that this node does not have."""
    if own == count:
        return
    if own == 0:
        replace_module(site.block, site.switch_path, Module())
        return
    for layer in projections(site.switch):
        for name, array in layer.parameters().items():
            layer[name] = mx.contiguous(array[:own])


def _evaluate(model: Module) -> list[mx.array]:
    """Compute every array, one by one so that few sources are held at once.

    Private arrays too, such as rope frequencies: what is still lazy is bound
    to the thread that made it.
    """
    leaves: Any = tree_flatten(model.parameters())
    arrays: list[mx.array] = [array for _, array in leaves]
    arrays += [a for m in model.modules() for a in m.values() if isinstance(a, mx.array)]
    arrays = list({id(array): array for array in arrays}.values())
    for array in arrays:
        mx.eval(array)
        # MLX would keep all that the weights were stacked from for later use.
        if mx.get_cache_memory() > _CACHE_BYTES:
            mx.clear_cache()
    return arrays


def _install(model: Module, site: Site, layer: Layer) -> None:
    if site.adapter is not None:
        replace_module(model, site.path, ExpertParallelMoE(site.block, site.adapter, layer))
    else:
        switch = ExpertParallelSwitch(site.switch, layer)
        replace_module(site.block, site.switch_path, switch)


def _notices(sites: list[Site]) -> tuple[str, ...]:
    names = sorted({type(site.block).__name__ for site in sites if site.adapter is None})
    return tuple(
        f"{name} has no adapter: exchanges carry every chosen expert's output apart"
        for name in names
    )
