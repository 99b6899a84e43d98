"""Who owns which experts: a pure function, the same on every node."""

from __future__ import annotations

from zmoe.errors import PlacementError
from zmoe.types import ModelInfo, Placement


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
    layers = []
    for ordinal in range(len(info.moe_layers)):
        base, extra = divmod(info.experts, nodes)
        counts = [base + ((rank - ordinal) % nodes < extra) for rank in range(nodes)]
        starts = [sum(counts[:rank]) for rank in range(nodes)]
        layers.append(tuple(tuple(range(s, s + c)) for s, c in zip(starts, counts)))
    return Placement(nodes, info.experts, tuple(layers))
