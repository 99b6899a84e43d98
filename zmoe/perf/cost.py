"""One step's time: a forward pass of some rows through all layers of all nodes.

The five terms of `StepTime` add up to the step's time. They extend the
performance model of arXiv 2506.23635 (docs/performance-model.md has the
equations): unequal nodes, a matmul's loading overlapping its computing, and
the overhead of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from zmoe.perf.busiest import Busiest, Cost, all_local, router_aided, selected
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link, Messages, all_reduce, round_latency, scatter_gather
from zmoe.perf.measured import step_rate
from zmoe.perf.owners import Owners, Slices
from zmoe.perf.places import Place
from zmoe.perf.routing import mean_distinct
from zmoe.perf.shape import CACHE, CACHE_BYTES, ModelShape

SYNCS_PER_MOE_LAYER = 2  # the routing goes to the host; the partial sum is complete
IN_GRAPH_ROWS = 32  # a pass of more rows is evaluated at each exchange (docs/graph.md)
SCHEDULES = ("decentralized", "centralized")
POLICIES = ("selected", "busy-full", "router-aided")


def may_be_in_graph(schedule: str, policy: str) -> bool:
    """Whether no host needs the routing, so that MLX may compute a step in one graph."""
    return (schedule, policy) == ("decentralized", "selected")


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
    """Machines in rank order, the leader first, and how they work together.

    `link` None: there is one. `one_machine`: they are equal parts of one, whose
    cores the nodes take in turn. `in_graph`: a decode step is one graph of MLX
    (docs/graph.md), for which all machines have a `crossing_s`, and the experts are slices.
    `sharded`: there attention is cut by heads, which takes an exchange of its own.
    """

    machines: tuple[Machine, ...]
    link: Link | None
    schedule: str = "decentralized"
    policy: str = "selected"
    wire_bytes: float = 2.0  # an element of an exchanged partial sum
    one_machine: bool = False
    in_graph: bool = False
    sharded: bool = False

    @property
    def nodes(self) -> int:
        return len(self.machines)

    @property
    def is_central(self) -> bool:
        return self.schedule == "centralized" and self.nodes > 1

    @property
    def places(self) -> tuple[Place, ...]:
        """Where something is computed at a time; node n is at place n modulo their number."""
        cores = self.machines[0].cores
        if not self.one_machine or cores is None:
            return tuple(Place(machine, machine.cores or 1) for machine in self.machines)
        count = min(self.nodes, cores)
        return tuple(
            Place(self.machines[at], cores // count, count, len(range(at, self.nodes, count)))
            for at in range(count)
        )


def attention_cost(shape: ModelShape, place: Place, step: Step, alone: bool = False) -> Cost:
    """One layer's projections, cache and scores; `alone`: while the other nodes wait."""
    attended = shape.attention.attended(step.context, shape.layers)
    cached = step.sequences * attended * shape.attention.cache_elements * CACHE_BYTES
    parameters = shape.attention_parameters
    scores = step.rows * shape.attention.score_operations(attended)
    operations = 2 * parameters * step.rows
    projections = place.matmul(shape.dense_format, parameters, operations, alone)
    return projections + place.matmul(CACHE, cached / CACHE_BYTES, scores, alone)


def dense_matmul(
    shape: ModelShape, place: Place, parameters: int, rows: int, alone: bool = False
) -> Cost:
    """A matmul with dense weights: router, shared experts, dense MLP, output head."""
    return place.matmul(shape.dense_format, parameters, 2 * parameters * rows, alone)


def experts_cost(
    shape: ModelShape,
    place: Place,
    count: float,
    beside: float,
    pairs: float,
    wires: bool,
    number: float | None = None,
) -> Cost:
    """`count` experts' worth of weights, applied to `pairs` (row, expert) pairs, while the
    other places compute `beside` each.

    `wires`: the driver has to wire them first (Machine.wiring). `number`: of the
    experts that these are slices of; None: they are whole.
    """
    one, operations = shape.expert_parameters, 2 * shape.expert_parameters * pairs
    number = count if number is None else number
    cost = place.experts(shape.expert_format, number, count * one, beside * one, operations)
    wiring = place.machine.wiring
    driver = count * shape.expert_bytes / wiring if wires and wiring else 0.0
    return cost + Cost(driver=driver)


def busiest_node(
    shape: ModelShape, cluster: Cluster, step: Step, owners: Owners, before: Sequence[Cost]
) -> Busiest:
    """The slowest place of one MoE layer when place p first spends `before[p]`.

    A place computes its part of all (row, expert) pairs in the mean, but one for
    each of its experts at least, and one a row for each at most.
    """
    policy, places = cluster.policy, cluster.places
    aided = policy == "router-aided"  # all nodes compute as many as the busiest
    distinct = mean_distinct(shape.experts, shape.top_k, step.rows)
    here = owners if aided else owners.on(len(places))
    costs = []
    for at, local in enumerate(here.local):
        place = places[at % len(places)]
        times = place.nodes if aided else 1
        mean_pairs = step.rows * shape.top_k * times * local / sum(here.local)
        of_place = []
        for count in range(local + 1):
            mine = times * count
            others = float(mine)
            if policy == "selected":
                others = max(0.0, distinct - mine) / max(1, len(places) - 1)
            pairs = min(mine * step.rows, max(mine, mean_pairs))
            experts = experts_cost(shape, place, mine, others, pairs, policy == "selected")
            of_place.append(before[at % len(places)] + experts)
        costs.append(of_place)
    if policy == "busy-full":
        return replace(all_local(costs), count=max(owners.local))
    if aided:
        return router_aided(owners, costs)
    busiest = selected(here, costs)
    if here is not owners:  # that was the busiest place
        each = [[Cost(float(count)) for count in range(local + 1)] for local in owners.local]
        busiest = replace(busiest, count=selected(owners, each).count)
    return busiest


def sliced_node(
    shape: ModelShape, cluster: Cluster, step: Step, slices: Slices, before: Sequence[Cost]
) -> Busiest:
    """The slowest place when each node computes its share of every selected expert.

    Nothing is left to chance but how many distinct experts are selected, of
    which the expected number counts.
    """
    distinct = mean_distinct(shape.experts, shape.top_k, step.rows)
    count = shape.experts if cluster.policy == "busy-full" else distinct
    pairs = max(count, step.rows * shape.top_k)
    wires, places = cluster.policy == "selected", cluster.places
    shares = slices.on(len(places)).shares
    costs = []
    for place, share, base in zip(places, shares, before):
        others = count * (1 - share) / max(1, len(places) - 1)
        number = count * place.nodes
        work = (count * share, others, pairs * share, wires, number)
        costs.append(base + experts_cost(shape, place, *work))
    slowest = max(range(len(costs)), key=lambda at: costs[at].total)
    return Busiest(count * max(slices.shares), costs[slowest])


def step_time(
    shape: ModelShape, cluster: Cluster, step: Step, experts: Owners | Slices
) -> tuple[StepTime, Busiest]:
    """The step's time in seconds, by cause, and the busiest node of a MoE layer: the experts
    that it computes, and the seconds that it takes for them.

    `experts` say which node computes what of a layer's E experts: Owners of whole experts, or
    the share of each node in all of them (Slices, which add up to 1). All nodes' machines are
    in bytes/s and operations/s; `step` is in rows (tokens).
    """
    central, places = cluster.is_central, cluster.places
    dense = places[:1] if central else places
    attention = [attention_cost(shape, place, step, central) for place in dense]
    turns = [1 if central else place.nodes for place in dense]

    def slowest(parameters: int, *before: Cost) -> Cost:
        """Of the places, one after the other for the nodes of each: `before`, and a matmul."""
        each = zip(dense, turns, before or [Cost()] * len(dense))
        return max(
            (
                (cost + dense_matmul(shape, place, parameters, step.rows, central)) * times
                for place, times, cost in each
            ),
            key=lambda cost: cost.total,
        )

    routed = [
        (cost + dense_matmul(shape, place, shape.router_parameters, step.rows, central)) * times
        for cost, place, times in zip(attention, dense, turns)
    ]
    before = [Cost()] * len(places) if central else routed
    if isinstance(experts, Slices):
        busiest = sliced_node(shape, cluster, step, experts, before)
    else:
        busiest = busiest_node(shape, cluster, step, experts, before)
    shared = slowest(shape.shared_parameters)
    moe_layer = busiest.cost + shared + (routed[0] if central else Cost())
    matmuls = moe_layer * shape.moe_layers
    if shape.dense_layers:
        matmuls += slowest(shape.dense_mlp_parameters, *attention) * shape.dense_layers
    if step.heads:
        head = dense_matmul(shape, places[0], shape.head_parameters, step.heads, alone=True)
        matmuls = matmuls + head
    messages, once = step_messages(shape, cluster, step, shared)
    of_attention = _sharding_messages(shape, cluster, step)
    time = StepTime(
        load=matmuls.load,
        compute=matmuls.compute,
        latency=messages.latency * shape.moe_layers + of_attention.latency * shape.layers + once,
        transfer=messages.transfer * shape.moe_layers + of_attention.transfer * shape.layers,
        overhead=matmuls.driver + _host_time(shape, cluster, step.rows),
    )
    return time, busiest


def step_messages(
    shape: ModelShape, cluster: Cluster, step: Step, shared: Cost
) -> tuple[Messages, float]:
    """What of one layer's messages remains to wait for beside the shared expert, and the
    latency of what comes once a step.
    """
    if cluster.nodes == 1:
        return Messages(), 0.0
    assert cluster.link is not None
    central = cluster.is_central
    payload = step.rows * shape.hidden * cluster.wire_bytes
    exchange = scatter_gather if central else all_reduce
    messages = exchange(cluster.link, cluster.nodes, payload)
    once = 0.0 if central else round_latency(cluster.link, cluster.nodes)
    measured = _measured_on_one_machine(cluster)
    if measured is not None:
        messages, once = replace(messages, latency=measured[0]), measured[1]
    if messages.total == 0:
        return messages, once
    left = max(0.0, 1 - shared.total / messages.total)
    return Messages(messages.latency * left, messages.transfer * left), once


def _measured_on_one_machine(cluster: Cluster) -> tuple[float, float] | None:
    """What its nodes' messages add to a layer, and to a step, where that was measured."""
    steps, schedule, policy = cluster.machines[0].steps, cluster.schedule, cluster.policy
    several = step_rate(steps, schedule, policy, cluster.nodes)
    alone = step_rate(steps, schedule, policy, 1)
    if not cluster.one_machine or several is None or alone is None:
        return None
    return max(0.0, several.layer_s - alone.layer_s), max(0.0, several.step_s - alone.step_s)


def _sharding_messages(shape: ModelShape, cluster: Cluster, step: Step) -> Messages:
    """Those that add up one layer's attention."""
    if not cluster.sharded or cluster.link is None or cluster.nodes == 1:
        return Messages()
    return all_reduce(cluster.link, cluster.nodes, step.rows * shape.hidden * cluster.wire_bytes)


def _host_time(shape: ModelShape, cluster: Cluster, rows: int) -> float:
    """Building and launching every layer, and waiting for the accelerator or the host."""
    several = cluster.nodes > 1
    syncs = SYNCS_PER_MOE_LAYER * shape.moe_layers + 1  # and one for the sampled token
    crossings = 0
    if cluster.in_graph and several:
        crossings = shape.moe_layers + cluster.sharded * shape.layers
        syncs = 1 + (crossings if rows > IN_GRAPH_ROWS else 0)
    elif cluster.in_graph:
        syncs = 0  # mlx-lm queues a step before the host has the token of the last one

    def of(machine: Machine) -> float:
        alone = step_rate(machine.steps, cluster.schedule, cluster.policy, 1)
        layer_s = machine.layer_s if alone is None else alone.layer_s
        step_s = machine.step_s if alone is None else alone.step_s
        waits = syncs * machine.sync_s + crossings * (machine.crossing_s or 0.0)
        return shape.layers * layer_s + waits + step_s

    return max(map(of, cluster.machines))
