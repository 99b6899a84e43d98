"""Whether a placement is one, and fits a model; it may come from a file or the network."""

from __future__ import annotations

from collections.abc import Sequence

from zmoe.errors import PlacementError
from zmoe.perf.shape import ModelShape
from zmoe.placement.types import Placement

MOST_SPEED = 1 << 20


NOT_SLICED = "cannot be sliced: their widths differ, or their outputs are not added as they are"


def check_placement(placement: Placement, shape: ModelShape) -> None:
    """Raise PlacementError, which names expert, layer and node, for what does not fit a
    model of this `shape`.
    """
    nodes, experts, layers = placement.nodes, shape.experts, shape.moe_layers
    hidden = shape.expert_hidden
    if placement.experts != experts or len(placement.owned) != layers:
        raise PlacementError(
            f"a placement of {placement.experts} experts in {len(placement.owned)} layers "
            f"does not fit a model of {experts} in {layers}"
        )
    if placement.slices:
        _check_slices(placement.slices, nodes, hidden, shape.slice_alignment)
    if placement.speeds and (
        len(placement.speeds) != nodes or not all(0 < s <= MOST_SPEED for s in placement.speeds)
    ):
        raise PlacementError(f"a placement of {nodes} nodes needs a positive speed for each")
    whole = ((0, hidden),) * nodes
    for layer, owned in enumerate(placement.owned):
        _check_layer(layer, owned, placement.slices or whole, experts, hidden)


def _check_slices(
    slices: Sequence[tuple[int, int]], nodes: int, hidden: int, slice_alignment: int
) -> None:
    if len(slices) != nodes:
        raise PlacementError(f"{len(slices)} slices for {nodes} nodes")
    for node, (start, end) in enumerate(slices):
        if not 0 <= start < end <= hidden:
            raise PlacementError(
                f"node {node} has the slice [{start}, {end}) of experts that are {hidden} wide"
            )
        if (start, end) == (0, hidden):
            continue
        if not slice_alignment:
            raise PlacementError(f"the experts of this model {NOT_SLICED}")
        if start % slice_alignment or (end % slice_alignment and end != hidden):
            raise PlacementError(
                f"node {node} has the slice [{start}, {end}): "
                f"this model's experts are cut at multiples of {slice_alignment}"
            )


def _check_layer(
    layer: int,
    owned: Sequence[Sequence[int]],
    slices: Sequence[tuple[int, int]],
    experts: int,
    hidden: int,
) -> None:
    if len(owned) != len(slices):
        raise PlacementError(f"layer {layer}: experts of {len(owned)} nodes, not of {len(slices)}")
    ranges: list[set[tuple[int, int]]] = [set() for _ in range(experts)]
    for node, (ids, part) in enumerate(zip(owned, slices)):
        for before, expert in zip((-1, *ids), ids):
            if not 0 <= expert < experts:
                raise PlacementError(
                    f"layer {layer}, node {node}: no expert {expert} among the {experts}"
                )
            if expert <= before:
                raise PlacementError(
                    f"layer {layer}, node {node}: expert {expert} comes after {before}"
                )
            ranges[expert].add(part)
    for expert, parts in enumerate(ranges):
        if not parts:
            raise PlacementError(f"layer {layer}: no node owns expert {expert}")
        _check_tiles(layer, expert, sorted(parts), hidden)


def _check_tiles(layer: int, expert: int, parts: Sequence[tuple[int, int]], hidden: int) -> None:
    at = 0
    for start, end in (*parts, (hidden, hidden)):
        if start != at:
            what = "no node owns" if start > at else "several nodes own parts of"
            raise PlacementError(
                f"layer {layer}, expert {expert}: {what} [{min(start, at)}, {max(start, at)}) "
                f"of its width of {hidden}"
            )
        at = end
