"""Experts dealt out to nodes, as plain numbers. All of it is deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations

from zmoe.errors import PlacementError


def proportional(
    total: int,
    weights: Sequence[float],
    most: Sequence[int] | None = None,
    least: int = 0,
    beside: float = 0.0,
) -> tuple[int, ...]:
    """Whole numbers that add up to `total`, in proportion to `weights` once `beside` is
    added to each of them.

    None is below `least` or above its `most`. The largest quotient of number
    and weight is as small as can be (D'Hondt's rule): with nodes' speeds for
    weights, and what each has to do anyway `beside`, the last node is done as
    early as can be. Equal weights give numbers that differ by at most one.
    Raises PlacementError when `most` adds up to less than `total`.
    """
    nodes = range(len(weights))
    most = [total] * len(weights) if most is None else most
    if sum(most) < total:
        raise PlacementError(f"{total} experts do not fit {sum(most)} slots")
    counts = [least] * len(weights)
    if not least and not beside:  # what the rule gives each in any case
        share = total / sum(weights) * (1 - 1e-9)
        counts = [min(limit, int(share * weight)) for limit, weight in zip(most, weights)]
    for _ in range(total - sum(counts)):
        free = (n for n in nodes if counts[n] < most[n])
        counts[max(free, key=lambda n: (weights[n] / (beside + counts[n] + 1), -n))] += 1
    return tuple(counts)


def over_layers(totals: Sequence[int], layers: int) -> list[tuple[int, ...]]:
    """Each node's `totals` spread over `layers` that all get equally many: counts per layer.

    A node's counts differ by at most one: those that are owed most take the odd
    ones, so that it is another's turn in each layer. `layers` divides the sum of
    `totals`.
    """
    nodes, left = len(totals), list(totals)
    per_layer = sum(totals) // layers
    spread = []
    for layer in range(layers):
        divided = [divmod(total, layers - layer) for total in left]
        odd = per_layer - sum(base for base, _ in divided)
        turns = sorted(range(nodes), key=lambda n: -divided[n][1])
        counts = [base + (turns.index(n) < odd) for n, (base, _) in enumerate(divided)]
        left = [total - count for total, count in zip(left, counts)]
        spread.append(tuple(counts))
    return spread


def runs(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Consecutive ids, `counts[n]` of them for node n: one byte range of a stacked tensor."""
    ends = list(accumulate(counts))
    return tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts))


def copies(experts: int, slots: Sequence[int], heat: Sequence[float]) -> list[int]:
    """How many nodes shall own each expert: one at least, more for those with more `heat`.

    The `slots` of the nodes are given one by one to the expert with most heat per copy, of
    equals to that with the fewest copies, that can still be on a node of its own (the copies of
    all can be placed iff for every number k of nodes the copies that don't fit all other
    nodes fit the k with fewest slots: the cut of the flow experts -> nodes).
    Raises PlacementError when there are too few slots for one copy of each.
    """
    nodes, owners = len(slots), [1] * experts
    smallest = [0, *accumulate(sorted(slots))]
    # spare[k]: copies that the k smallest nodes could take beyond what they must.
    spare = [smallest[k] - (experts if k == nodes else 0) for k in range(nodes + 1)]
    if spare[nodes] < 0:
        raise PlacementError(
            f"{experts} experts per layer do not fit the {sum(slots)} slots of {nodes} nodes"
        )
    waiting = set(range(experts)) if nodes > 1 else set()
    while waiting and spare[nodes]:
        hottest = max(waiting, key=lambda e: (heat[e] / owners[e], -owners[e], -e))
        if min(spare[nodes - owners[hottest] :]) == 0:
            waiting.discard(hottest)
            continue
        for k in range(nodes - owners[hottest], nodes + 1):
            spare[k] -= 1
        owners[hottest] += 1
        if owners[hottest] == nodes:
            waiting.discard(hottest)
    return owners


def spread_replicas(
    experts: int, slots: Sequence[int], heat: Sequence[float] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Owners of each expert when node n has `slots[n]` slots, all of which are used.

    `heat`: how often each is chosen; None: all alike. The hottest come first;
    the copies of each go to the nodes with most slots left, among these to
    those whose experts are coolest, then to those that share the fewest
    experts so far, so that the pairs of owners are spread evenly. Raises
    PlacementError when there are too few slots.
    """
    free = [min(slot, experts) for slot in slots]
    warmth = [1.0] * experts if heat is None else list(heat)
    wanted = copies(experts, free, warmth)
    nodes = range(len(free))
    load = [0.0] * len(free)
    together = [[0] * len(free) for _ in nodes]
    owners: list[tuple[int, ...]] = [()] * experts
    for expert in sorted(range(experts), key=lambda e: (-wanted[e], -warmth[e], e)):
        mine: list[int] = []
        for _ in range(wanted[expert]):
            best = max(
                (n for n in nodes if n not in mine),
                key=lambda n: (free[n], -load[n], -sum(together[n][m] for m in mine), -n),
            )
            mine.append(best)
            free[best] -= 1
        for node in mine:
            load[node] += warmth[expert] / len(mine) if heat is not None else 0.0
        for a, b in combinations(mine, 2):
            together[a][b] += 1
            together[b][a] += 1
        owners[expert] = tuple(sorted(mine))
    return tuple(owners)
