"""A placement as the equations see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from zmoe.perf.owners import Owners, Replicated, Slices, Whole
from zmoe.placement.build import resident
from zmoe.placement.types import Placement


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
        if self.shares:
            return Slices(self.shares)
        return _owners(self.owners, len(self.resident), drawn)


@lru_cache(maxsize=64)
def _owners(owners: tuple[tuple[int, ...], ...], nodes: int, drawn: tuple[float, ...]) -> Owners:
    if any(len(each) > 1 for each in owners):
        return Replicated(owners, drawn)
    return Whole(tuple(owners.count((node,)) for node in range(nodes)), drawn)


def placed_of(placement: Placement, hidden: int, label: str) -> Placed | None:
    """A placement of experts that are `hidden` wide as that of its first MoE layer.

    None where some nodes hold slices and others the same or none of an
    expert: the planner has no model of that.
    """
    layers, nodes = len(placement.owned), range(placement.nodes)
    mean = tuple(total / layers for total in resident(placement, hidden))
    if len(set(placement.slices)) > 1:
        everything = all(len(ids) == placement.experts for of in placement.owned for ids in of)
        if not everything or len(set(placement.slices)) < placement.nodes:
            return None
        return Placed(label, mean, shares=tuple((b - a) / hidden for a, b in placement.slices))
    on = [set(ids) for ids in placement.owned[0]]
    owners = (tuple(node for node in nodes if e in on[node]) for e in range(placement.experts))
    return Placed(label, mean, tuple(owners))
