"""What there is to adopt, and what each node brings: from the placement and the nodes' offers."""

from __future__ import annotations

from collections.abc import Sequence

from zmoe.perf.memory import PROGRAM_BYTES
from zmoe.placement.build import resident
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import ModelInfo, Placement
from zmoe.recovery.adopt import Holding, Stock


def stock_of(
    info: ModelInfo, placement: Placement, offers: Sequence[NodeResources], mapped: bool
) -> Stock:
    """The shards of `placement`, one a rank, and what the nodes at these ranks have of them.

    Every node has the whole checkpoint on its disk. `mapped`: weights are mapped from there.
    """
    counts = resident(placement, info.moe_intermediate_size)
    sizes = tuple(int(info.expert_bytes * count) for count in counts)
    shards = range(placement.nodes)
    holdings = {}
    for node, offer in enumerate(offers):
        memory = offer.memory if offer.limit is None else offer.limit
        sharing = sum(other.machine == offer.machine for other in offers)
        share = memory if offer.limit is not None else memory // sharing
        free = share - PROGRAM_BYTES - info.dense_bytes - sizes[node]
        held = {shard: _in_common(info, placement, sizes, node, shard) for shard in shards}
        holdings[node] = Holding(free, {s: n for s, n in held.items() if n}, tuple(shards))
    return Stock(sizes, holdings, mapped)


def _in_common(
    info: ModelInfo, placement: Placement, sizes: Sequence[int], node: int, shard: int
) -> int:
    """Bytes of `shard` that `node` holds as its own, or as replicas."""
    if node == shard:
        return sizes[node]
    if placement.slices and placement.slices[node] != placement.slices[shard]:
        return 0
    both = sum(len(set(layer[node]) & set(layer[shard])) for layer in placement.owned)
    all_of_it = sum(len(layer[shard]) for layer in placement.owned)
    return sizes[shard] * both // all_of_it if all_of_it else 0
