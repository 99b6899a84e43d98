"""What calibration finds out about a machine: rates of its matmuls, times of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class MatmulRate:
    """Matmuls with weights stored as `format`, by each of `nodes` processes of the
    machine that compute at the same time, on `threads` threads each.

    dense, experts: bytes of weights a second with one row, in a layer's projections,
    and in its few experts, of which each takes expert_s more. many: operations a
    second with many rows.
    """

    format: str
    nodes: int
    threads: int
    dense: float
    experts: float
    expert_s: float
    many: float


@dataclass(frozen=True)
class StepRate:
    """Decoding by `nodes` processes of the machine: what is no matmul.

    A step takes `step_s` and `layer_s` for each of its layers beside its matmuls:
    with one node what the host does, with several also what their messages cost
    while every node has but its share of the cores for all it does.
    """

    nodes: int
    schedule: str
    policy: str
    layer_s: float
    step_s: float


@dataclass(frozen=True)
class Speed:
    """Something a second on one node: `alone`, while the other nodes of its machine wait,
    and `together`, while they do the same.
    """

    alone: float
    together: float

    def seconds(self, amount: float, beside: float) -> float:
        """For `amount`, of which the other nodes have `beside` each, from the same moment on."""
        shared = min(amount, beside)
        return shared / self.together + (amount - shared) / self.alone


def rates_of(
    rates: Sequence[MatmulRate], format: str, threads: int, nodes: int
) -> tuple[MatmulRate, MatmulRate] | None:
    """Of `format` on `threads` threads (or the nearest number that was measured) alone, and
    with as near as may be to `nodes` nodes at once; None where the format was not measured.
    """
    known = [rate for rate in rates if rate.format == format]
    if not known:
        return None
    nearest = min({rate.threads for rate in known}, key=lambda n: (abs(log(n / threads)), n))
    alike = [rate for rate in known if rate.threads == nearest]
    return (
        min(alike, key=lambda rate: rate.nodes),
        min(alike, key=lambda rate: (abs(rate.nodes - nodes), rate.nodes)),
    )


def step_rate(steps: Sequence[StepRate], schedule: str, policy: str, nodes: int) -> StepRate | None:
    """Of `nodes` nodes, on the line through the two nearest numbers that were measured."""
    alike = (each for each in steps if each.policy == policy)
    known = sorted(
        (each for each in alike if each.nodes == 1 or each.schedule == schedule),
        key=lambda each: (abs(each.nodes - nodes), each.nodes),
    )
    if not known:
        return None
    first = known[0]
    if first.nodes == nodes or nodes == 1 or len(known) == 1:
        return first
    second = next((each for each in known if each.nodes != first.nodes), first)
    share = (nodes - first.nodes) / (second.nodes - first.nodes)

    def between(one: float, other: float) -> float:
        return max(0.0, one + share * (other - one))

    return StepRate(
        nodes,
        schedule,
        policy,
        between(first.layer_s, second.layer_s),
        between(first.step_s, second.step_s),
    )
