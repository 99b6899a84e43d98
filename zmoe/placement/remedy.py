"""What would make a model fit the memory of its nodes."""

from __future__ import annotations

from dataclasses import replace

from zmoe.perf.shape import affine
from zmoe.placement.build import most_nodes
from zmoe.placement.predict import Setup, predict

MOST_NODES = 64
BITS = (8, 6, 5, 4, 3, 2)


def remedy(setup: Setup, nodes: int, unit: str = "node") -> str:
    """The fewest nodes, or the most bits on so many `nodes`, that would do."""
    ways = []
    enough = nodes_that_fit(setup)
    if enough is not None:
        ways.append(counted(enough, unit))
    bits = bits_that_fit(setup, nodes)
    if bits is not None:
        ways.append(f"{bits} bits on {counted(nodes, unit)}")
    return f"{' or '.join(ways)} would do" if ways else "neither more nodes nor fewer bits help"


def nodes_that_fit(setup: Setup) -> int | None:
    """The fewest nodes that hold the model, None when no number does."""
    plain = _plain(setup)
    most = min(most_nodes(plain.placement, plain.shape), MOST_NODES)
    return next((n for n in range(1, most + 1) if predict(plain, n).fits), None)


def bits_that_fit(setup: Setup, nodes: int) -> int | None:
    """The most bits per weight with which `nodes` nodes hold the model."""
    now = setup.shape.expert_format.bits_per_weight
    for bits in BITS:
        weights = affine(bits)
        smaller = replace(_plain(setup), shape=setup.shape.with_format(weights))
        if weights.bits_per_weight < now and predict(smaller, nodes).fits:
            return bits
    return None


def _plain(setup: Setup) -> Setup:
    """The same without copies of experts: what fits, fits without."""
    if setup.placement == "slices" and setup.given is None:
        return setup
    return replace(setup, placement="experts", given=None)


def counted(count: int, unit: str = "node") -> str:
    """`count` with its unit: "1 node", "2 nodes"."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
