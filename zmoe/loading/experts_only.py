"""Load a node's experts without the model around them: a worker of the centralised schedule."""

from __future__ import annotations

from dataclasses import dataclass

from zmoe.exchange.base import Reducer
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.worker_experts import WorkerExperts
from zmoe.loading.load import DTYPES, native_experts, owned_by, pairs_per_row, slice_of, take_share
from zmoe.loading.plan import Progress
from zmoe.loading.skeleton import Skeleton
from zmoe.moe.adapter import bound_hook
from zmoe.placement.types import ModelInfo, Placement


@dataclass(frozen=True)
class LoadedExperts:
    """A node's own experts of every MoE layer and nothing else; see LoadedShard."""

    layers: tuple[WorkerExperts, ...]
    bytes_read: int
    share_bytes: int
    largest_tensor_bytes: int
    notices: tuple[str, ...]


def load_experts(
    info: ModelInfo,
    placement: Placement,
    reducer: Reducer,
    *,
    progress: Progress | None = None,
    pool: ThreadPool | None = None,
    policy: str = "selected",
    skeleton: Skeleton | None = None,
) -> LoadedExperts:
    """Load the experts that `placement` gives `reducer.rank`, without any dense weight.

    Otherwise like load_shard, errors included.
    """
    owned = owned_by(info, placement, reducer.rank)
    kept = slice_of(placement, reducer.rank)
    share = take_share(info, owned, pool, progress, False, kept, skeleton)
    widths = [site.width for site in share.sites]  # the kernels take the weights that tell them
    experts = native_experts(share, pairs_per_row(info, max(map(len, owned))), pool)
    sizes = share.sizes([site.switch for site in share.sites])
    layers = tuple(
        WorkerExperts(
            info.experts,
            ids,
            width,
            site.switch,
            experts.get(site.path),
            bound_hook(site.adapter, site.switch),
            reducer.sum_dtype(DTYPES[info.dtype]),
            policy,
        )
        for site, ids, width in zip(share.sites, owned, widths, strict=True)
    )
    return LoadedExperts(layers, share.bytes_read, sum(sizes), max(sizes, default=0), share.notices)
