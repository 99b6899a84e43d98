"""One step's time: a forward pass of some rows through all layers of all nodes.

The five terms of `StepTime` add up to the step's time. They extend the
performance model of arXiv 2506.23635 (docs/performance-model.md has the
equations): unequal nodes, a product's loading overlapping its computing, and
the overhead of the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from zmoe.planner.busiest import Busiest, Cost, all_local, router_aided, selected
from zmoe.planner.exchange import Messages, all_reduce, round_latency, scatter_gather
from zmoe.planner.hardware import Machine
from zmoe.planner.links import Link
from zmoe.planner.owners import Owners, Slices
from zmoe.planner.routing import mean_distinct
from zmoe.planner.shape import CACHE_BYTES, ModelShape

SYNCS_PER_MOE_LAYER = 2  # the routing goes to the host; the partial sum is complete
SCHEDULES = ("decentralized", "centralized")
POLICIES = ("selected", "busy-full", "router-aided")


@dataclass(frozen=True)
class Step:
    """`rows`: tokens of the pass, over all `sequences`. `context`: tokens that a
    row looks back on. `heads`: rows that the output head is computed for.
    """

    rows: int
    sequences: int
    context: float
    heads: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by cause."""

    load: float = 0.0
    compute: float = 0.0
    latency: float = 0.0
    transfer: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return self.load + self.compute + self.latency + self.transfer + self.overhead

    @property
    def communication_share(self) -> float:
        return (self.latency + self.transfer) / self.total

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Cluster:
    """Machines in rank order, the leader first, and how they work together."""

    machines: tuple[Machine, ...]
    link: Link
    schedule: str = "decentralized"
    policy: str = "selected"
    wire_bytes: float = 2.0  # an element of an exchanged partial sum

    @property
    def nodes(self) -> int:
        return len(self.machines)


def product(machine: Machine, weight_bytes: float, operations: float) -> Cost:
    """Loading `weight_bytes` once while computing `operations`."""
    load = weight_bytes / machine.reached_bandwidth
    return Cost(load, max(0.0, operations / machine.reached_rate - machine.overlap * load))


def attention_cost(shape: ModelShape, machine: Machine, step: Step) -> Cost:
    """One layer's projections, cache and scores."""
    attended = shape.attention.attended(step.context, shape.layers)
    cached = step.sequences * attended * shape.attention.cache_elements * CACHE_BYTES
    parameters = shape.attention_parameters
    operations = step.rows * (2 * parameters + shape.attention.score_operations(attended))
    return product(machine, shape.dense_format.bytes(parameters) + cached, operations)


def dense_product(shape: ModelShape, machine: Machine, parameters: int, rows: int) -> Cost:
    """A product with dense weights: router, shared experts, dense MLP, output head."""
    return product(machine, shape.dense_format.bytes(parameters), 2 * parameters * rows)


def experts_cost(
    shape: ModelShape, machine: Machine, count: float, pairs: float, wires: bool
) -> Cost:
    """`count` experts' worth of weights, applied to `pairs` (row, expert) pairs.

    `wires`: the driver has to wire them first (Machine.wiring).
    """
    weight_bytes = count * shape.expert_bytes
    cost = product(machine, weight_bytes, 2 * shape.expert_parameters * pairs)
    driver = weight_bytes / machine.wiring if wires and machine.wiring else 0.0
    return cost + Cost(driver=driver)


def busiest_node(
    shape: ModelShape, cluster: Cluster, step: Step, owners: Owners, before: Sequence[Cost]
) -> Busiest:
    """The slowest node of one MoE layer when node n first spends `before[n]`.

    A node computes its part of all (row, expert) pairs in the mean, but one for
    each of its experts at least, and one a row for each at most.
    """
    wires = cluster.policy == "selected"
    costs = []
    for machine, local, base in zip(cluster.machines, owners.local, before):
        mean_pairs = step.rows * shape.top_k * local / sum(owners.local)
        of_node = []
        for count in range(local + 1):
            pairs = min(count * step.rows, max(count, mean_pairs))
            of_node.append(base + experts_cost(shape, machine, count, pairs, wires))
        costs.append(of_node)
    if cluster.policy == "busy-full":
        return all_local(costs)
    return (router_aided if cluster.policy == "router-aided" else selected)(owners, costs)


def sliced_node(
    shape: ModelShape, cluster: Cluster, step: Step, slices: Slices, before: Sequence[Cost]
) -> Busiest:
    """The slowest node when each computes its share of every selected expert.

    Nothing is left to chance but how many distinct experts are selected, of
    which the expected number counts.
    """
    distinct = mean_distinct(shape.experts, shape.top_k, step.rows)
    count = shape.experts if cluster.policy == "busy-full" else distinct
    pairs = max(count, step.rows * shape.top_k)
    wires = cluster.policy == "selected"
    costs = [
        base + experts_cost(shape, machine, count * share, pairs * share, wires)
        for machine, share, base in zip(cluster.machines, slices.shares, before)
    ]
    slowest = max(range(cluster.nodes), key=lambda node: costs[node].total)
    return Busiest(count * slices.shares[slowest], costs[slowest])


def step_time(
    shape: ModelShape, cluster: Cluster, step: Step, experts: Owners | Slices
) -> tuple[StepTime, Busiest]:
    """The step's time, and the busiest node of a MoE layer."""
    leader = cluster.machines[0]
    central = cluster.schedule == "centralized" and cluster.nodes > 1
    dense = (leader,) if central else cluster.machines
    attention = [attention_cost(shape, machine, step) for machine in dense]
    routed = [
        cost + dense_product(shape, machine, shape.router_parameters, step.rows)
        for cost, machine in zip(attention, dense)
    ]
    before = [Cost()] * cluster.nodes if central else routed
    if isinstance(experts, Slices):
        busiest = sliced_node(shape, cluster, step, experts, before)
    else:
        busiest = busiest_node(shape, cluster, step, experts, before)
    shared = _slowest(
        dense_product(shape, machine, shape.shared_parameters, step.rows) for machine in dense
    )
    dense_layer = _slowest(
        cost + dense_product(shape, machine, shape.dense_mlp_parameters, step.rows)
        for cost, machine in zip(attention, dense)
    )
    moe_layer = busiest.cost + shared + (routed[0] if central else Cost())
    products = moe_layer * shape.moe_layers + dense_layer * shape.dense_layers
    if step.heads:
        products = products + dense_product(shape, leader, shape.head_parameters, step.heads)
    messages = _layer_messages(shape, cluster, step, shared)
    tokens_to_all = 0.0 if central else round_latency(cluster.link, cluster.nodes)
    time = StepTime(
        load=products.load,
        compute=products.compute,
        latency=messages.latency * shape.moe_layers + tokens_to_all,
        transfer=messages.transfer * shape.moe_layers,
        overhead=products.driver + _host_time(shape, cluster),
    )
    return time, busiest


def _slowest(costs: Iterable[Cost]) -> Cost:
    return max(costs, key=lambda cost: cost.total)


def _layer_messages(shape: ModelShape, cluster: Cluster, step: Step, shared: Cost) -> Messages:
    """What of one layer's messages remains to wait for beside the shared expert."""
    central = cluster.schedule == "centralized"
    payload = step.rows * shape.hidden * cluster.wire_bytes
    exchange = scatter_gather if central else all_reduce
    messages = exchange(cluster.link, cluster.nodes, payload)
    if messages.total == 0:
        return messages
    left = max(0.0, 1 - shared.total / messages.total)
    return Messages(messages.latency * left, messages.transfer * left)


def _host_time(shape: ModelShape, cluster: Cluster) -> float:
    """Building and launching every layer, and waiting for the accelerator."""
    syncs = SYNCS_PER_MOE_LAYER * shape.moe_layers + 1  # and one for the sampled token
    return max(shape.layers * m.layer_s + syncs * m.sync_s for m in cluster.machines)
