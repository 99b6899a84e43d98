"""Which experts a step selects, taken as drawn uniformly, and how they fall on nodes.

A row (token) draws k of E experts without replacement; rows draw independently.
Real routers are close to uniform over a long text, and less so from one token
to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NEGLIGIBLE = 1e-15  # probability below which an outcome is dropped
MOST_EXPERTS = 1024  # of one layer: C(1024, 512) is still a float


@lru_cache(maxsize=256)
def distinct_experts(experts: int, top_k: int, rows: int) -> tuple[float, ...]:
    """P(`rows` rows select u distinct experts of one layer) for u = 0..experts; exact.

    Row by row: with u seen, a row brings j new ones with probability
    C(E-u, j) C(u, k-j) / C(E, k).
    """
    seen = np.zeros(experts + 1)
    seen[0] = 1.0
    total = comb(experts, top_k)
    counts = min(experts, top_k * (rows - 1)) + 1  # of experts seen before any row: 0 and up
    brings = [
        np.array([comb(experts - u, new) * comb(u, top_k - new) / total for u in range(counts)])
        for new in range(top_k + 1)
    ]
    for _ in range(rows):
        after = np.zeros_like(seen)
        for new, chance in enumerate(brings):
            more = (seen[:counts] * chance)[: experts + 1 - new]
            after[new : new + len(more)] += more
        seen = after
        if seen[experts] > 1 - NEGLIGIBLE:
            break
    return tuple(float(p) for p in seen)


def mean_distinct(experts: int, top_k: int, rows: int) -> float:
    """Expected distinct experts: E (1 - (1 - k/E)^rows)."""
    return experts * (1 - (1 - top_k / experts) ** rows)


@lru_cache(maxsize=4096)
def probability_within(
    local: tuple[int, ...], limits: tuple[int, ...], drawn: tuple[float, ...]
) -> float:
    """P(no node gets more than its limit), each expert on one node; exact.

    `local`: experts on each node. `limits`: the most that each may get.
    `drawn[u]`: probability that u distinct experts are selected; given u, every
    set of u is equally likely, so that the counts on the nodes follow the
    multivariate hypergeometric distribution. The sets within the limits are
    counted by the product of polynomials sum_{j <= limit} C(local, j) x^j.
    """
    if min(limits) < 0:
        return 0.0
    most = max(u for u, p in enumerate(drawn) if p > NEGLIGIBLE)
    within: Floats = np.ones(1)
    for size, limit in zip(local, limits):
        factor = _binomials(size)[: min(limit, most) + 1]
        within = np.convolve(within, factor)[: most + 1]
    everything = _binomials(sum(local))
    return float(
        sum(
            p * within[u] / everything[u]
            for u, p in enumerate(drawn)
            if p > NEGLIGIBLE and u < len(within)
        )
    )


@lru_cache(maxsize=256)
def _binomials(size: int) -> Floats:
    """C(size, j) for j = 0..size."""
    return np.array([float(comb(size, j)) for j in range(size + 1)])


def expected_largest(local: Sequence[int], drawn: Sequence[float]) -> float:
    """Expected largest count of selected experts on any node, each expert on one node; exact."""
    sizes, chances = tuple(local), tuple(drawn)
    return sum(
        1 - probability_within(sizes, (limit,) * len(sizes), chances) for limit in range(max(sizes))
    )
