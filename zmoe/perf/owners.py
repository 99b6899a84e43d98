"""Which nodes hold which experts of a layer, and what selections they can share out.

`within(limits)` is the probability that the selected experts can be shared out
so that node n computes at most limits[n] of them, every expert at one of its
owners. It is the distribution of the busiest node under the best assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Protocol

import numpy as np
import numpy.typing as npt

from zmoe.errors import PlacementError
from zmoe.perf.routing import probability_within

SAMPLES = 20_000  # selections that are drawn where they are too many to list
MOST_NODES = 10  # with replicas: every subset of the nodes is looked at
_SEED = 2506_23635


class Owners(Protocol):
    """`local`: experts of a layer on each node. `samples`: drawn selections, 0 when exact."""

    @property
    def local(self) -> tuple[int, ...]: ...

    @property
    def samples(self) -> int: ...

    def within(self, limits: Sequence[int]) -> float: ...

    def on(self, places: int) -> Owners:
        """The same by place, where node n is at place n modulo `places`."""
        ...


@dataclass(frozen=True)
class Slices:
    """Every node holds its share of every expert's inner width; the shares add up to 1."""

    shares: tuple[float, ...]

    def on(self, places: int) -> Slices:
        """The same by place, where node n is at place n modulo `places`."""
        return Slices(tuple(sum(self.shares[at::places]) for at in range(places)))


@dataclass(frozen=True)
class Whole:
    """Every expert on one node. `drawn[u]`: probability of u distinct experts."""

    local: tuple[int, ...]
    drawn: tuple[float, ...]
    samples: int = 0

    def within(self, limits: Sequence[int]) -> float:
        return probability_within(self.local, tuple(limits), self.drawn)

    def on(self, places: int) -> Owners:
        """See Owners."""
        if places == len(self.local):
            return self
        return Whole(tuple(sum(self.local[at::places]) for at in range(places)), self.drawn)


class Replicated:
    """Experts on several nodes each.

    A selection fits the limits iff for every set of nodes the experts that only
    these own are at most their limits together (Hall's theorem). All selections
    are listed where they are few and one row draws; else `samples` are drawn,
    always the same, with the binomial standard error sqrt(p (1-p) / samples).
    """

    def __init__(self, owners: Sequence[Sequence[int]], drawn: Sequence[float]) -> None:
        self._owners, self._drawn = owners, drawn
        nodes = 1 + max(max(each) for each in owners)
        if nodes > MOST_NODES:
            raise PlacementError(f"replicas over {nodes} nodes: at most {MOST_NODES} are planned")
        self.local = tuple(sum(node in each for each in owners) for node in range(nodes))
        self.samples, selections = _selections(len(owners), drawn)
        masks = np.array([sum(1 << node for node in each) for each in owners])
        subsets = np.arange(1, 1 << nodes)
        only_here = (masks[:, None] & ~subsets[None, :]) == 0
        # demands[s, t]: experts of selection s that the nodes of subset t must compute
        self._demands = selections.astype(np.float32) @ only_here.astype(np.float32)
        self._members = (subsets[:, None] >> np.arange(nodes)) & 1

    def within(self, limits: Sequence[int]) -> float:
        if min(limits) < 0:
            return 0.0
        capacity = self._members @ np.array(limits)
        return float(np.mean(np.all(self._demands <= capacity, axis=1)))

    def on(self, places: int) -> Owners:
        """See Owners."""
        if places == len(self.local):
            return self
        return Replicated(
            [sorted({n % places for n in each}) for each in self._owners], self._drawn
        )


def _selections(experts: int, drawn: Sequence[float]) -> tuple[int, npt.NDArray[np.bool_]]:
    """0 and every selection, or how many were drawn and those; (selections, experts)."""
    sizes = [u for u, p in enumerate(drawn) if p > 0]
    if len(sizes) == 1 and comb(experts, sizes[0]) <= SAMPLES:
        chosen = np.array(list(combinations(range(experts), sizes[0])), dtype=np.intp)
        listed = np.zeros((len(chosen), experts), dtype=np.bool_)
        np.put_along_axis(listed, chosen, True, axis=1)
        return 0, listed
    generator = np.random.default_rng(_SEED)
    chances = np.array(drawn) / sum(drawn)
    size = generator.choice(len(chances), size=SAMPLES, p=chances)
    rank = generator.random((SAMPLES, experts)).argsort(axis=1).argsort(axis=1)
    return SAMPLES, rank < size[:, None]
