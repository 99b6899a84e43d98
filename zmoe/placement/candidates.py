"""Ways to spread experts over nodes, and what each node then holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from zmoe.errors import PlacementError
from zmoe.perf.cost import Cluster
from zmoe.perf.memory import expert_capacity
from zmoe.perf.owners import Owners, Replicated, Slices, Whole
from zmoe.perf.routing import even_split
from zmoe.perf.shape import ModelShape
from zmoe.placement.spread import proportional, spread_replicas

PLACEMENTS = ("experts", "replicas", "slices", "auto")


@dataclass(frozen=True)
class Placed:
    """`resident[n]`: experts' worth of weights of one layer on node n, in the mean over the layers.

    `owners`: of each expert of a layer; `shares`: of each node in every expert.
    One of the two is empty.
    """

    label: str
    resident: tuple[float, ...]
    owners: tuple[tuple[int, ...], ...] = ()
    shares: tuple[float, ...] = ()

    def selecting(self, drawn: tuple[float, ...]) -> Owners | Slices:
        """The same for steps that select u distinct experts with probability drawn[u]."""
        return Slices(self.shares) if self.shares else _owners(self.owners, drawn)


@lru_cache(maxsize=64)
def _owners(owners: tuple[tuple[int, ...], ...], drawn: tuple[float, ...]) -> Owners:
    if any(len(each) > 1 for each in owners):
        return Replicated(owners, drawn)
    nodes = 1 + max(owner for (owner,) in owners)
    return Whole(tuple(sum(owner == node for (owner,) in owners) for node in range(nodes)), drawn)


def candidates(
    placement: str, shape: ModelShape, cluster: Cluster, sequences: int, context: int
) -> list[Placed]:
    """What `placement` may mean here; for "auto", everything that makes sense.

    Raises PlacementError when whole experts cannot be given to every node.
    """
    nodes = cluster.nodes
    if nodes > shape.experts:
        raise PlacementError(
            f"{nodes} nodes are more than the {shape.experts} experts per layer of {shape.name}: "
            f"use at most {shape.experts}"
        )
    even = _whole("experts", even_split(shape.experts, nodes), rotating=True)
    if nodes == 1 or placement == "experts":
        return [even]
    speeds = [machine.reached_bandwidth for machine in cluster.machines]
    slots = [int(capacity) for capacity in expert_capacity(shape, cluster, sequences, context)]
    made = {"slices": [_slices(shape, speeds)], "replicas": [_replicas(shape, slots, even)]}
    if placement in made:
        return made[placement]
    by_speed = _whole("experts by speed", proportional(shape.experts, speeds, least=1))
    memories = [max(1, count) for count in slots]
    by_memory = _whole("experts by memory", proportional(shape.experts, memories, least=1))
    return [even, by_speed, by_memory, *made["replicas"], *made["slices"]]


def _whole(label: str, local: tuple[int, ...], rotating: bool = False) -> Placed:
    """Whole experts, none twice. `rotating`: who has one more changes from layer to layer."""
    owners = tuple((node,) for node, count in enumerate(local) for _ in range(count))
    resident = (len(owners) / len(local),) * len(local) if rotating else tuple(map(float, local))
    return Placed(label, resident, owners)


def _replicas(shape: ModelShape, slots: Sequence[int], otherwise: Placed) -> Placed:
    """As many copies as there are slots for."""
    if sum(slots) < shape.experts or min(slots) < 1:
        return otherwise
    owners = spread_replicas(shape.experts, slots)
    resident = tuple(float(sum(node in each for each in owners)) for node in range(len(slots)))
    return Placed("replicas", resident, owners)


def _slices(shape: ModelShape, speeds: Sequence[float]) -> Placed:
    """Shares in proportion to speed, so that all nodes are done at once."""
    shares = tuple(speed / sum(speeds) for speed in speeds)
    return Placed("slices", tuple(shape.experts * share for share in shares), shares=shares)
