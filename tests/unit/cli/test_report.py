"""What --explain says of a placement."""

from __future__ import annotations

from dataclasses import replace

from zmoe.cli.report import explanation
from zmoe.placement.choose import Alternative, Choice
from zmoe.placement.types import Placement


def test_slices_are_explained() -> None:
    layers = (((0, 1, 2), (0, 1, 2)),) * 2
    choice = Choice(
        placement=Placement(2, 3, layers, slices=((0, 64), (64, 192))),
        label="slices",
        why="as the flag says",
        considered=(Alternative("slices", remark="no figures", form="in MLX's graph"),),
        assumed="decentralized",
        speeds=(10, 20),
        capacity=(3 << 20, 6 << 20),
        resident=(1 << 20, 3 << 20),
        evaluated="",
    )
    assert explanation(choice, "sharded").splitlines() == [
        "placement: slices (as the flag says)",
        "  node 0: 3 experts per layer (each layer: 0-2), [0, 64) of their intermediate size; "
        "1 MiB of experts (25%), room for 3 MiB; reads 10 GB/s",
        "  node 1: 3 experts per layer (each layer: 0-2), [64, 192) of their intermediate size; "
        "3 MiB of experts (75%), room for 6 MiB; reads 20 GB/s",
        "  layers: in MLX's graph, as every node has a slice of every expert",
        "  attention: 1/2 of the heads on each node, one more exchange per layer",
        "  predicted by the cost model, decentralized:",
        "  slices, in MLX's graph  no figures",
    ]
    whole = "  attention: all heads on each node, unless --attention sharded is given"
    assert explanation(choice).splitlines()[4] == whole
    predicted = "  predicted by the cost model, decentralized:"
    evaluated = explanation(replace(choice, evaluated="the routing is recorded")).splitlines()
    layers = "  layers: evaluated one by one, as the routing is recorded"
    assert evaluated[3:5] == [layers, predicted]
    assert explanation(replace(choice, evaluated=None)).splitlines()[3] == predicted
