"""Ways to place a model's experts, as placements.

A slot holds one expert of one MoE layer; node n has `slots[n]` of them, over all
layers. `speeds[n]` is its relative speed. `beside` is what every
node does in a layer besides, in times of what all of the layer's experts take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd

from zmoe.errors import PlacementError
from zmoe.placement.check import NOT_SLICED
from zmoe.placement.spread import over_layers, proportional, runs, spread_replicas
from zmoe.placement.types import ModelInfo, Placement


def place_evenly(info: ModelInfo, nodes: int) -> Placement:
    """Whole experts in contiguous runs, none twice, counts differing by at most one.

    Contiguous, so that a node's part of a stacked tensor is one byte range.
    Where `nodes` does not divide the experts, the ranks that take one more
    rotate over the layers, so that no node holds more than its share.
    Raises PlacementError when there are more nodes than experts.
    """
    if nodes > info.experts:
        raise PlacementError(
            f"{nodes} nodes are more than the {info.experts} experts per layer of {info.path}: "
            f"use at most {info.experts}"
        )
    return _place_whole(info, proportional(_slots(info), [1] * nodes))


def place_by_speed(
    info: ModelInfo, speeds: Sequence[int], slots: Sequence[int], beside: float = 0.0
) -> Placement:
    """Whole experts in contiguous runs, none twice, so that all nodes are done at once in
    the mean, as far as there is room. Raises PlacementError when there is not.
    """
    whole = _slots(info)
    beside = 0.0 if len(set(speeds)) == 1 else beside
    return _place_whole(info, proportional(whole, speeds, slots, beside=beside * whole))


def place_replicas(
    info: ModelInfo,
    speeds: Sequence[int],
    slots: Sequence[int],
    usage: Sequence[Sequence[int]] | None = None,
    beside: float = 0.0,
) -> Placement:
    """Copies of whole experts as far as there is room, none twice on a node.

    The speeds for the assignment are in proportion to what each should compute.
    `usage[m]`: how often each expert of the m-th MoE layer was chosen; None:
    all alike. Raises PlacementError when there is no room for one of each.
    """
    experts, layers = info.experts, len(info.moe_layers)
    # One copy of each surely fits: a layer's slots are never fewer than what that takes.
    single = over_layers(proportional(_slots(info), slots, slots), layers)
    owned = []
    spread = lru_cache(spread_replicas)
    for layer, counts in enumerate(single):
        layer_slots = tuple(
            min(experts, max(count, total // layers)) for count, total in zip(counts, slots)
        )
        heat = None if usage is None else tuple(count + 1 for count in usage[layer])
        owners = spread(experts, layer_slots, heat)
        owned.append(
            tuple(
                tuple(expert for expert, on in enumerate(owners) if node in on)
                for node in range(len(slots))
            )
        )
    shares = proportional(100, speeds, least=1, beside=100 * beside)
    assigned = () if len(set(speeds)) == 1 else _reduced(shares)
    return Placement(len(slots), experts, tuple(owned), speeds=assigned)


def place_slices(
    info: ModelInfo, speeds: Sequence[int], slots: Sequence[int], beside: float = 0.0
) -> Placement:
    """A range of every expert's hidden dimension for each node, so that all are done at once
    as far as there is room. Raises PlacementError when an expert cannot be cut so finely.
    """
    nodes, hidden, slice_alignment = len(speeds), info.moe_intermediate_size, info.slice_alignment
    if not slice_alignment:
        raise PlacementError(f"the experts of {info.path} {NOT_SLICED}")
    units = hidden // slice_alignment  # a remainder goes to the last node
    if units < nodes:
        raise PlacementError(
            f"the experts of {info.path} are {hidden} wide and cut in steps of {slice_alignment}: "
            f"{units} slices at most, not {nodes}"
        )
    whole = _slots(info)
    most = [total * hidden // (slice_alignment * whole) for total in slots]
    if min(most) < 1 or sum(most) < units:
        raise PlacementError(f"slices of the experts of {info.path} do not fit the nodes' memory")
    sizes = proportional(units, speeds, most, least=1, beside=beside * units)
    bounds = [slice_alignment * sum(sizes[:node]) for node in range(nodes)] + [hidden]
    everything = tuple(range(info.experts))
    owned = ((everything,) * nodes,) * len(info.moe_layers)
    return Placement(nodes, info.experts, owned, tuple(pairwise(bounds)))


def resident(placement: Placement, hidden: int) -> tuple[float, ...]:
    """How many experts' worth of weights each node has over all layers, of `hidden` wide ones."""
    counts = [sum(len(layer[node]) for layer in placement.owned) for node in range(placement.nodes)]
    if not placement.slices:
        return tuple(map(float, counts))
    return tuple(
        count * (end - start) / hidden for count, (start, end) in zip(counts, placement.slices)
    )


def _reduced(numbers: Sequence[int]) -> tuple[int, ...]:
    """The same proportions in the smallest whole numbers."""
    divisor = gcd(*numbers)
    return tuple(number // divisor for number in numbers)


def _slots(info: ModelInfo) -> int:
    return info.experts * len(info.moe_layers)


def _place_whole(info: ModelInfo, totals: Sequence[int]) -> Placement:
    counts = over_layers(totals, len(info.moe_layers))
    return Placement(len(totals), info.experts, tuple(runs(of_layer) for of_layer in counts))
