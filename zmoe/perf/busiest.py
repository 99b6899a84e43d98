"""The node that the others wait for: its count of experts, and its time.

Nodes synchronise in every MoE layer, so a layer takes as long as its slowest
node. Which node that is, and with how many experts, is random; an Outcome is
one possibility.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from zmoe.perf.owners import Owners


@dataclass(frozen=True)
class Cost:
    """Seconds: of loading, of the computing that loading does not hide, of the driver."""

    load: float = 0.0
    compute: float = 0.0
    driver: float = 0.0

    @property
    def total(self) -> float:
        return self.load + self.compute + self.driver

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.load + other.load, self.compute + other.compute, self.driver + other.driver
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.load * factor, self.compute * factor, self.driver * factor)


@dataclass(frozen=True)
class Outcome:
    """With `probability` the slowest node computes `count` experts at `cost`."""

    probability: float
    count: float
    cost: Cost


@dataclass(frozen=True)
class Busiest:
    """Expectations over the outcomes. `standard_error` of `count`: 0 when exact."""

    count: float
    cost: Cost
    standard_error: float = 0.0


def expectation(outcomes: Sequence[Outcome], samples: int = 0) -> Busiest:
    count = sum(o.probability * o.count for o in outcomes)
    cost = Cost()
    for outcome in outcomes:
        cost = cost + outcome.cost * outcome.probability
    variance = sum(o.probability * (o.count - count) ** 2 for o in outcomes)
    return Busiest(count, cost, sqrt(variance / samples) if samples else 0.0)


def selected(owners: Owners, costs: Sequence[Sequence[Cost]]) -> Busiest:
    """Each node computes the selected experts that are assigned to it.

    `costs[n][j]`: node n with j experts, never less for more of them. The
    assignment is the one whose slowest node is fastest: P(slowest <= t) is the
    probability that the experts can be shared out with at most as many on node
    n as it computes in t.
    """
    totals = [[cost.total for cost in each] for each in costs]
    where = {
        total: (node, count) for node, each in enumerate(totals) for count, total in enumerate(each)
    }
    outcomes, before = [], 0.0
    for total in sorted(where):
        now = owners.within([bisect_right(each, total) - 1 for each in totals])
        node, count = where[total]
        if now > before:
            outcomes.append(Outcome(now - before, count, costs[node][count]))
        before = now
    return expectation(outcomes, owners.samples)


def router_aided(owners: Owners, costs: Sequence[Sequence[Cost]]) -> Busiest:
    """Each node computes as many experts as the one with most selected (or all it has)."""
    outcomes, before = [], 0.0
    for count in range(max(owners.local) + 1):
        now = owners.within([count] * len(costs))
        if now > before:
            padded = [each[min(count, len(each) - 1)] for each in costs]
            slowest = max(padded, key=lambda cost: cost.total)
            outcomes.append(Outcome(now - before, count, slowest))
        before = now
    return expectation(outcomes, owners.samples)


def all_local(costs: Sequence[Sequence[Cost]]) -> Busiest:
    """Each node computes all of its experts, selected or not."""
    slowest = max(costs, key=lambda each: each[-1].total)
    return Busiest(len(slowest) - 1, slowest[-1])
