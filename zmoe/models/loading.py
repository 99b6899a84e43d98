"""Load a node's share of a checkpoint into a model that computes with its peers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from zmoe.errors import ModelError, PlacementError
from zmoe.models.checkpoint import read_tensors
from zmoe.models.discover import (
    Site,
    expert_count,
    find_sites,
    model_classes,
    projections,
    replace_module,
)
from zmoe.models.share import Piece, Share, layer_of, select
from zmoe.moe.block import ExpertParallelMoE, ExpertParallelSwitch, Layer
from zmoe.obs import Spans
from zmoe.types import ModelInfo, Placement, Reducer

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class LoadedShard:
    """A model with this node's experts, and what loading it took.

    `share_bytes` is what the model's arrays take, `bytes_read` what was read
    of the checkpoint for them. `notices` are lines for the user.
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

    Reads only these byte ranges; at no time is more in memory than they take
    and one more tensor. The model runs in the thread that loads it. Raises
    ModelError naming what is damaged or missing, PlacementError for a
    placement of another model.
    """
    owned = _owned(info, placement, reducer.rank)
    count = max(1, *(len(ids) for ids in owned))
    tensors = read_tensors(Path(info.path))
    pieces = select(tensors, info.experts, dict(zip(info.moe_layers, owned, strict=True)), count)
    share = Share(pieces)
    try:
        model, config = _build(info, share, count)
        sites = find_sites(model)
        for site, ids in zip(sites, owned, strict=True):
            _trim(site, len(ids), count)
        _evaluate(model, share, _expected_bytes(pieces, info.layers), progress)
    finally:
        share.close()
    dtype = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[info.dtype]
    for ordinal, (site, ids) in enumerate(zip(sites, owned, strict=True)):
        _install(model, site, Layer(ordinal, info.experts, ids, dtype, reducer, spans))
    return LoadedShard(
        model,
        config,
        share.bytes_read,
        sum(array.nbytes for array in _arrays(model)),
        max(piece.file_bytes for piece in pieces),
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


def _build(info: ModelInfo, share: Share, count: int) -> tuple[Module, dict[str, Any]]:
    """mlx-lm's own model over the share, as if it had `count` experts; unread."""

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        base, args = model_classes(config)
        return _shrunk(base, info.experts, count, share), args

    try:
        return load_model(Path(info.path), lazy=True, get_model_classes=classes)
    except ModelError:
        raise
    except Exception as error:  # mlx-lm and MLX raise whatever a bad checkpoint makes them
        raise ModelError(f"{info.path} cannot be loaded: {_reason(error)}") from error


def _shrunk(base: Any, experts: int, count: int, share: Share) -> type[Module]:
    """`base` with `count` experts in each switch layer, fed from `share`."""

    class Shrunk(base):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            for site in find_sites(self):
                for layer in projections(site.switch):
                    for name, array in layer.parameters().items():
                        layer[name] = mx.zeros((count, *array.shape[1:]), array.dtype)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            del weights  # those of the whole checkpoint, which stay unread
            weights = share.load()
            if hasattr(base, "sanitize"):
                with expert_count(self, experts, count):
                    weights = super().sanitize(weights)
            # Views would keep what they were cut from, and strides slow products.
            return {name: mx.contiguous(array) for name, array in weights.items()}

    Shrunk.__name__ = base.__name__
    return Shrunk


def _reason(error: Exception) -> str:
    """One line of what mlx-lm says; of a list of names, the first."""
    text = str(error)
    if match := re.match(r"(Missing|Received) (\d+) parameters[^:]*:\s*(\S+?),?\s*$", text, re.M):
        kind = "missing" if match[1] == "Missing" else "unknown to the model"
        more = f" and {int(match[2]) - 1} more" if int(match[2]) > 1 else ""
        return f"tensor {match[3]}{more} {kind}"
    if isinstance(error, KeyError):
        return f"tensor {error.args[0]} is missing"
    return " ".join(text.split()) or type(error).__name__


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


def _arrays(model: Module) -> list[mx.array]:
    """Every array of the model, private ones such as rope frequencies included."""
    leaves: Any = tree_flatten(model.parameters())
    arrays: list[mx.array] = [array for _, array in leaves]
    arrays += [a for m in model.modules() for a in m.values() if isinstance(a, mx.array)]
    return list({id(array): array for array in arrays}.values())


def _expected_bytes(pieces: list[Piece], layers: int) -> int:
    """What will be read: layers beyond the model's own (for drafting) will not."""
    own = (p for p in pieces if (layer_of(p.name) or 0) < layers)
    return sum(piece.file_bytes for piece in own)


def _evaluate(model: Module, share: Share, total: int, progress: Progress | None) -> None:
    """Read and compute the arrays one by one, so that few sources are held at once."""
    for array in _arrays(model):
        mx.eval(array)
        share.check()
        if progress is not None:
            progress(min(share.bytes_read, total), total)
    mx.clear_cache()  # what the tensors were made from
    if progress is not None:
        progress(total, total)


def _install(model: Module, site: Site, layer: Layer) -> None:
    if site.adapter is not None:
        replace_module(model, site.path, ExpertParallelMoE(site.block, site.adapter, layer))
    else:
        replace_module(site.block, site.switch_path, ExpertParallelSwitch(site.switch, layer))


def _notices(sites: list[Site]) -> tuple[str, ...]:
    names = sorted({type(site.block).__name__ for site in sites if site.adapter is None})
    return tuple(
        f"{name} has no adapter: exchanges carry every chosen expert's output apart"
        for name in names
    )
