"""Load a node's share of a checkpoint into a model that computes with its peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from zmoe.checkpoint.select import Reader
from zmoe.checkpoint.verify import check_share
from zmoe.errors import PlacementError
from zmoe.exchange.base import Reducer
from zmoe.families.sites import Site, replace_module
from zmoe.kernels.experts import NativeExperts, can_be_native
from zmoe.kernels.linear import Head, Parts, make_native, select_rows
from zmoe.kernels.paged_model import PagedModel
from zmoe.kernels.threads import ThreadPool
from zmoe.loading.attention import cut_attention, sum_heads
from zmoe.loading.fuse import fuse_layers
from zmoe.loading.mapping import Mapping
from zmoe.loading.plan import Progress, make_plan, map_plan, reading
from zmoe.loading.skeleton import Skeleton
from zmoe.loading.slices import can_be_sliced, cut_biases, cut_copied, put_back
from zmoe.moe.block import ExpertParallelMoE, ExpertParallelSwitch, Layer
from zmoe.moe.experts import Experts
from zmoe.moe.graph import Form, Graph, GraphMoE, GraphSwitch
from zmoe.native import lib
from zmoe.obs import Recorder, Spans
from zmoe.placement.assignment import Ownership
from zmoe.placement.types import ModelInfo, Placement

_CACHE_BYTES = 16 << 20

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class LoadedShard:
    """A model with this node's experts, and what loading it took.

    `share_bytes` is what the model's arrays take, `largest_tensor_bytes` the
    largest of them, `bytes_read` what was read of the checkpoint for them.
    `notices` are lines for the user, those of `form` included.
    `head` says of each pass which rows' logits are wanted; what MLX computes is lazy
    anyway. `paged` is the model on its own caches, where all of its layers are the kernels'.
    """

    model: Module
    config: dict[str, Any]
    head: Head
    paged: PagedModel | None
    bytes_read: int
    share_bytes: int
    largest_tensor_bytes: int
    notices: tuple[str, ...]
    form: Form


def load_shard(
    info: ModelInfo,
    placement: Placement,
    reducer: Reducer,
    *,
    spans: Spans,
    progress: Progress | None = None,
    pool: ThreadPool | None = None,
    fuse: bool = True,
    policy: str = "selected",
    recorder: Recorder | None = None,
    skeleton: Skeleton | None = None,
    form: Form | None = None,
) -> LoadedShard:
    """Load the dense weights and the experts that `placement` gives `reducer.rank`.

    Reads only these byte ranges, once all names and shapes are known to fit;
    never holds more than they take and one more tensor. `skeleton` is used up,
    so that a node that inspected the model does not build it again. Layers may own
    different numbers of experts, or none. The model runs in the thread that
    loads it, its MoE layers in the `form` given; None: evaluated one by one. Its large
    matmuls run on `pool` if there is one; then what lies in
    the checkpoint as the kernels want it stays there, mapped, and with `fuse`
    whole layers of known families are the kernels'. Raises ModelError naming
    what is damaged or missing, PlacementError for a placement of another model.
    """
    form = form or Form()
    owned = owned_by(info, placement, reducer.rank)
    kept, in_graph = slice_of(placement, reducer.rank), form.graph is not None
    share = take_share(
        info, owned, pool, progress, kept_slice=kept, skeleton=skeleton, in_graph=in_graph
    )
    model, sites = share.model, share.sites
    heads: Sequence[str] = ()
    if form.cuts_attention:
        heads = cut_attention(model, sites, info.model_type, reducer.rank, placement.nodes)
    dtype = DTYPES[info.dtype]
    head = Head(dtype)
    summed = reducer.sum_dtype(dtype)
    layers = [
        Layer(m, Ownership(placement, m, reducer.rank, policy, recorder), summed, reducer, spans)
        for m in range(len(owned))
    ]
    padding = max(layer.ownership.most_padding for layer in layers)
    experts = native_experts(share, pairs_per_row(info, padding), pool)
    if pool is not None:
        make_native(model, pool, share.mapped, head)
    else:
        select_rows(model, head)
    sizes = share.sizes([model])
    _exchange_in(model, sites, layers, experts, form)
    if form.graph is not None:
        sum_heads(model, sites, heads, form.graph)
    paged = None
    if pool is not None and fuse:
        paged = fuse_layers(model, sites, layers, experts, pool, dtype)
    notices = (*share.notices, *_notices(sites), *form.notices)
    read, config = share.bytes_read, share.config
    return LoadedShard(model, config, head, paged, read, sum(sizes), max(sizes), notices, form)


@dataclass(frozen=True)
class Share:
    """What a node holds of a checkpoint, put together; what is not mapped is not computed yet."""

    model: Module
    config: dict[str, Any]
    sites: list[Site]
    mapped: dict[str, Parts]
    bytes_read: int
    notices: tuple[str, ...]

    def sizes(self, used: Sequence[Module]) -> list[int]:
        """The bytes of every array of the modules in use, computed now, and of what is mapped."""
        sizes = [array.nbytes for array in _evaluate(used)]
        return sizes + [part.nbytes for parts in self.mapped.values() for part in parts.values()]


def take_share(
    info: ModelInfo,
    owned: list[tuple[int, ...]],
    pool: ThreadPool | None,
    progress: Progress | None,
    dense: bool = True,
    kept_slice: tuple[int, int] | None = None,
    skeleton: Skeleton | None = None,
    in_graph: bool = False,
) -> Share:
    """Read or map what a node needs; without `dense`, stand-ins take the other weights' places.

    `progress` gets the bytes read so far and in all. `kept_slice`: only this range of
    the experts' moe_intermediate_size. Raises ModelError for what is damaged or missing,
    PlacementError for slices of experts whose outputs are not added as they are, but `in_graph`.
    """
    count = max(1, *(len(ids) for ids in owned))
    path, own = Path(info.path), dict(zip(info.moe_layers, owned, strict=True))
    skeleton = skeleton or Skeleton(path)
    if kept_slice is not None and not in_graph and not can_be_sliced(skeleton.sites):
        raise PlacementError(
            f"slices of the experts of {info.path} need the exchange in MLX's graph, since "
            "their outputs are not added as they are"
        )
    plan = make_plan(info, skeleton, owned, count, pool is not None, dense, kept_slice)
    report = progress or (lambda done, total: None)
    checked = check_share(path, own, lambda: report(0, plan.total), dense)
    with Reader() as reader:
        feed = reading(plan, reader, report)
        config = skeleton.load(feed, info.experts, count)
    model, sites = skeleton.take()
    mapping = Mapping()
    mapped = map_plan(
        plan, mapping, lambda: report(reader.bytes_read + mapping.bytes_read, plan.total)
    )
    for site, ids in zip(sites, owned, strict=True):
        _trim(site, len(ids), count, mapped)
        if kept_slice is not None:
            cut_copied(site, {path: cut for path, cut in plan.cuts.items() if path not in mapped})
            cut_biases(site, kept_slice)
            if pool is None:
                put_back(site, mapped)
    bytes_read = reader.bytes_read + mapping.bytes_read
    return Share(model, config, sites, mapped, bytes_read, (*checked, *_far_away(mapping)))


def slice_of(placement: Placement, rank: int) -> tuple[int, int] | None:
    """The range of its experts' moe_intermediate_size that `rank` holds; None: all of it."""
    return placement.slices[rank] if placement.slices else None


def owned_by(info: ModelInfo, placement: Placement, rank: int) -> list[tuple[int, ...]]:
    """The expert ids of `rank` per MoE layer. Raises PlacementError unless the placement fits."""
    layers = len(info.moe_layers)
    if placement.experts != info.experts or len(placement.owned) != layers:
        raise PlacementError(
            f"a placement of {placement.experts} experts in {len(placement.owned)} layers"
            f" does not fit {info.path}: {info.experts} in {layers}"
        )
    return [layer[rank] for layer in placement.owned]


def pairs_per_row(info: ModelInfo, padding: int) -> int:
    """The most pairs per token: top_k, and what `padding` pairs add per block of tokens."""
    return info.top_k - (-padding // lib.ZMOE_ROW_BLOCK)


def native_experts(
    share: Share, pairs_per_row: int, pool: ThreadPool | None
) -> dict[str, NativeExperts]:
    """The experts that `pool` can compute, by path of their block."""
    experts = {}
    for site in share.sites:
        if pool is not None and can_be_native(site.switch):
            experts[site.path] = NativeExperts(
                site.switch_name, site.switch, pool, pairs_per_row, share.mapped
            )
    return experts


def _trim(site: Site, own: int, count: int, mapped: dict[str, Parts]) -> None:
    """Drop the zeros that stood in for experts that this node does not have."""
    if own == count:
        return
    for path, layer in site.linears.items():
        for name, array in layer.parameters().items():
            if name not in mapped.get(path, {}):
                layer[name] = mx.contiguous(array[:own])


def _evaluate(used: Sequence[Module]) -> list[mx.array]:
    """Compute every array, one by one so that few sources are held at once.

    Private arrays too, such as rope frequencies: what is still lazy is bound
    to the thread that made it.
    """
    leaves: Any = tree_flatten([module.parameters() for module in used])
    arrays: list[mx.array] = [array for _, array in leaves]
    modules = [module for each in used for module in each.modules()]
    arrays += [a for m in modules for a in m.values() if isinstance(a, mx.array)]
    arrays = list({id(array): array for array in arrays}.values())
    for array in arrays:
        mx.eval(array)
        # MLX would keep all that the weights were stacked from for later use.
        if mx.get_cache_memory() > _CACHE_BYTES:
            mx.clear_cache()
    return arrays


def _exchange_in(
    model: Module,
    sites: Sequence[Site],
    layers: Sequence[Layer],
    experts: dict[str, NativeExperts],
    form: Form,
) -> None:
    """Put what computes the experts of all nodes in the places of the MoE layers."""
    for site, layer in zip(sites, layers, strict=True):
        if form.graph is not None:
            _install_in_graph(model, site, layer.ordinal, form.graph)
        elif not form.as_it_is:
            _install(model, site, layer, experts.get(site.path))


def _install(model: Module, site: Site, layer: Layer, experts: Experts | None) -> None:
    if site.adapter is not None:
        block = ExpertParallelMoE(site.block, site.adapter, layer, experts)
        replace_module(model, site.path, block)
    else:
        switch = ExpertParallelSwitch(site.switch, layer, experts)
        replace_module(site.block, site.switch_path, switch)


def _install_in_graph(model: Module, site: Site, ordinal: int, graph: Graph) -> None:
    if site.adapter is not None:
        block = GraphMoE(site.block, site.adapter, ordinal, graph)
        replace_module(model, site.path, block)
    else:
        replace_module(site.block, site.switch_path, GraphSwitch(site.switch, ordinal, graph))


def _far_away(mapping: Mapping) -> tuple[str, ...]:
    if not mapping.far_bytes:
        return ()
    far, read = mapping.far_bytes / 2**30, mapping.bytes_read / 2**30
    return (f"{far:.2f} of {read:.2f} GiB of the weights lie in the memory of other sockets",)


def _notices(sites: list[Site]) -> tuple[str, ...]:
    names = sorted({type(site.block).__name__ for site in sites if site.adapter is None})
    return tuple(
        f"{name} has no adapter: exchanges carry every chosen expert's output apart"
        for name in names
    )
