"""Ways to place a model's experts, as placements.

A slot holds one expert of one MoE layer; node n has `slots[n]` of them, over all
layers. `speeds[n]` is its relative speed. `beside` is what every
node does in a layer besides, in times of what all of the layer's experts take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd

from zmoe.errors import PlacementError
from zmoe.perf.shape import ModelShape
from zmoe.perf.units import in_bytes
from zmoe.placement.check import NOT_SLICED
from zmoe.placement.spread import over_layers, proportional, runs, spread_replicas
from zmoe.placement.types import Placement

WAYS = ("auto", "experts", "replicas", "slices")


def ways(
    shape: ModelShape,
    speeds: Sequence[float],
    slots: Sequence[int],
    schedule: str,
    usage: Sequence[Sequence[int]] | None = None,
) -> dict[str, Callable[[], Placement]]:
    """What "auto" considers, by label: functions that build it, or raise PlacementError."""
    dense = 0.0 if schedule == "centralized" else shape.dense_bytes
    beside = dense / (shape.layers * shape.top_k * shape.expert_bytes)
    return {
        "experts": lambda: place_evenly(shape, len(speeds)),
        "experts by speed": lambda: place_by_speed(shape, speeds, slots, beside),
        "replicas": lambda: place_replicas(shape, speeds, slots, usage, beside),
        "slices": lambda: place_slices(shape, speeds, slots, beside),
    }


def check_way(way: str, shape: ModelShape, nodes: int) -> None:
    """Raise PlacementError where `way` is impossible however much room the nodes have."""
    if way == "slices":
        place_slices(shape, [1] * nodes, [_slots(shape)] * nodes)
    elif way != "replicas":
        place_evenly(shape, nodes)


def most_nodes(way: str, shape: ModelShape) -> int:
    """The most nodes that `way` is planned for, one at least."""
    steps = shape.expert_hidden // (shape.slice_alignment or shape.expert_hidden)
    return max(1, min(shape.experts, steps)) if way == "slices" else shape.experts


def place_evenly(shape: ModelShape, nodes: int) -> Placement:
    """Whole experts in contiguous runs, none twice, counts differing by at most one.

    Contiguous, so that a node's part of a stacked tensor is one byte range.
    Where `nodes` does not divide the experts, the ranks that take one more
    rotate over the layers, so that no node holds more than its share.
    Raises PlacementError when there are more nodes than experts.
    """
    if nodes > shape.experts:
        raise PlacementError(
            f"{nodes} nodes are more than the {shape.experts} experts per layer of {shape.name}: "
            f"use at most {shape.experts}"
        )
    return _place_whole(shape, proportional(_slots(shape), [1] * nodes))


def place_by_speed(
    shape: ModelShape, speeds: Sequence[float], slots: Sequence[int], beside: float = 0.0
) -> Placement:
    """Whole experts in contiguous runs, none twice, so that all nodes are done at once in
    the mean, as far as there is room. Raises PlacementError when there is not.
    """
    whole = _slots(shape)
    beside = 0.0 if len(set(speeds)) == 1 else beside
    return _place_whole(shape, proportional(whole, speeds, slots, beside=beside * whole))


def place_replicas(
    shape: ModelShape,
    speeds: Sequence[float],
    slots: Sequence[int],
    usage: Sequence[Sequence[int]] | None = None,
    beside: float = 0.0,
) -> Placement:
    """Copies of whole experts as far as there is room, none twice on a node.

    The speeds for the assignment are in proportion to what each should compute.
    `usage[m]`: how often each expert of the m-th MoE layer was chosen; None:
    all alike. Raises PlacementError when there is no room for one of each.
    """
    experts, layers = shape.experts, shape.moe_layers
    # One copy of each surely fits: a layer's slots are never fewer than what that takes.
    single = over_layers(proportional(_slots(shape), slots, slots), layers)
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
    shape: ModelShape, speeds: Sequence[float], slots: Sequence[int], beside: float = 0.0
) -> Placement:
    """A range of every expert's hidden dimension for each node, so that all are done at once
    as far as there is room. Raises PlacementError when an expert cannot be cut so finely.
    """
    nodes, hidden, slice_alignment = len(speeds), shape.expert_hidden, shape.slice_alignment
    if not slice_alignment:
        raise PlacementError(f"the experts of {shape.name} {NOT_SLICED}")
    units = hidden // slice_alignment  # a remainder goes to the last node
    if units < nodes:
        raise PlacementError(
            f"the experts of {shape.name} are {hidden} wide and cut in steps of {slice_alignment}: "
            f"{units} slices at most, not {nodes}"
        )
    whole = _slots(shape)
    most = [total * hidden // (slice_alignment * whole) for total in slots]
    lacking = max(units - sum(most), most.count(0))
    if lacking > 0:
        missing = lacking * slice_alignment * whole * shape.expert_bytes // hidden
        raise PlacementError(
            f"slices of the experts of {shape.name} do not fit the nodes' memory: "
            f"{in_bytes(missing)} are missing"
        )
    sizes = proportional(units, speeds, most, least=1, beside=beside * units)
    bounds = [slice_alignment * sum(sizes[:node]) for node in range(nodes)] + [hidden]
    everything = tuple(range(shape.experts))
    owned = ((everything,) * nodes,) * shape.moe_layers
    return Placement(nodes, shape.experts, owned, tuple(pairwise(bounds)))


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


def _slots(shape: ModelShape) -> int:
    return shape.experts * shape.moe_layers


def _place_whole(shape: ModelShape, totals: Sequence[int]) -> Placement:
    counts = over_layers(totals, shape.moe_layers)
    return Placement(len(totals), shape.experts, tuple(runs(of_layer) for of_layer in counts))
