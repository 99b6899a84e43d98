"""Predictions: what a model would do on a number of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from zmoe.errors import PlacementError
from zmoe.perf.busiest import Busiest
from zmoe.perf.cost import Cluster, Step, StepTime, step_time
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link
from zmoe.perf.memory import expert_slots, node_bytes
from zmoe.perf.routing import distinct_experts
from zmoe.perf.shape import ModelShape
from zmoe.placement.build import check_way, place_by_speed, ways
from zmoe.placement.placed import Placed, placed_of
from zmoe.placement.types import Placement

MARGIN = 0.03  # by how much a prediction must beat whole experts spread evenly
ALIKE = 0.01  # of predictions that differ by less, the one that holds less wins


@dataclass(frozen=True)
class Workload:
    """`batch` sequences, each `context` tokens long while it goes on, after a prompt
    of `prompt` tokens that is read in chunks of `chunk`.
    """

    batch: int = 1
    context: int = 4096
    prompt: int = 128
    chunk: int = 512


@dataclass(frozen=True)
class Setup:
    """A question: which model, on nodes taken from `machines` in turn, doing what.

    `one_machine`: the nodes are processes that share the first machine evenly.
    `given`: the placement, whatever `placement` says. `link` None: nothing joins
    the machines, so that one node alone can be asked about. `in_graph`, `sharded`: see Cluster.
    """

    shape: ModelShape
    machines: tuple[Machine, ...]
    link: Link | None
    workload: Workload = field(default_factory=Workload)
    schedule: str = "decentralized"
    policy: str = "selected"
    placement: str = "experts"
    wire_bytes: float = 2.0
    one_machine: bool = False
    given: Placed | None = None
    in_graph: bool = False
    sharded: bool = False

    def shape_on(self, nodes: int) -> ModelShape:
        """What of the model each of `nodes` nodes is to hold and compute, apart from experts.

        Raises PlacementError where attention cannot be cut for them.
        """
        if not self.sharded:
            return self.shape
        attention = self.shape.attention.sharded(nodes)
        if attention is None:
            raise PlacementError(f"attention cannot be cut by heads for {nodes} nodes")
        return replace(self.shape, attention=attention)

    def cluster(self, nodes: int) -> Cluster:
        if self.one_machine:
            machines = [self.machines[0].divided(nodes)] * nodes
        else:
            machines = [self.machines[node % len(self.machines)] for node in range(nodes)]
        return Cluster(
            tuple(machines),
            self.link,
            self.schedule,
            self.policy,
            self.wire_bytes,
            self.one_machine,
            self.in_graph,
            self.sharded,
        )


@dataclass(frozen=True)
class Prediction:
    """`decode`: one step of all sequences; `prefill`: from the prompt to the first token.

    `busiest`: the node that decoding waits for. `memory`: bytes on each node.
    """

    setup: Setup
    cluster: Cluster
    placed: Placed
    decode: StepTime
    prefill: StepTime
    busiest: Busiest
    memory: tuple[int, ...]

    @property
    def nodes(self) -> int:
        return self.cluster.nodes

    @property
    def sharded(self) -> bool:
        return self.cluster.sharded

    @property
    def missing(self) -> int:
        """Bytes that the node which lacks most lacks; 0 when all fit."""
        lacks = (need - m.usable_bytes for need, m in zip(self.memory, self.cluster.machines))
        return max(0, round(max(lacks)))

    @property
    def fits(self) -> bool:
        return self.missing == 0

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.setup.workload.batch / self.decode.total

    @property
    def price_usd(self) -> float | None:
        """Of the machines, without network."""
        prices = [machine.price_usd for machine in self.cluster.machines]
        known = [price for price in prices if price is not None]
        return sum(known) if len(known) == len(prices) else None

    def row(self) -> dict[str, Any]:
        """One row of zmoe-plan's JSON. Speeds are null where the model does not fit."""
        work, price = self.setup.workload, self.price_usd
        speed = self.tokens_per_second if self.fits else None
        return {
            "nodes": self.nodes,
            "machines": [machine.name for machine in self.cluster.machines],
            "placement": self.placed.label,
            "fits": self.fits,
            "missing_per_node_bytes": self.missing,
            "memory_per_node_bytes": max(self.memory),
            "memory_by_node_bytes": list(self.memory),
            "executed_experts_per_node": self.busiest.count,
            "executed_experts_standard_error": self.busiest.standard_error,
            "tokens_per_second": speed,
            "breakdown": _milliseconds(self.decode, self.fits),
            "communication_share": self.decode.communication_share if self.fits else None,
            "prompt_tokens_per_second": (
                work.batch * work.prompt / self.prefill.total if self.fits else None
            ),
            "first_token_seconds": self.prefill.total if self.fits else None,
            "prompt_breakdown": _milliseconds(self.prefill, self.fits),
            "price_usd": price,
            "tokens_per_second_per_usd": speed / price if speed and price else None,
        }


def _milliseconds(time: StepTime, known: bool) -> dict[str, float | None]:
    terms = ("load", "compute", "latency", "transfer", "overhead")
    return {f"{term}_ms": 1e3 * getattr(time, term) if known else None for term in terms}


def predict(setup: Setup, nodes: int) -> Prediction:
    """The prediction for `nodes` nodes; of several placements that fit, of the preferred one.

    Raises PlacementError when there are more nodes than experts, or when the
    placement that is given is for another number of nodes.
    """
    if setup.given is None:
        found = _built(setup, setup.cluster(nodes))
    elif len(setup.given.resident) == nodes:
        found = [setup.given]
    else:
        wanted = len(setup.given.resident)
        raise PlacementError(f"{setup.given.label} is for {wanted} nodes, not for {nodes}")
    predictions = []
    for placed in found:
        try:
            predictions.append(evaluate(setup, placed))
        except PlacementError:  # replicas on more nodes than can be counted
            if len(found) == 1:
                raise
    least = min(p.missing for p in predictions)
    return preferred([p for p in predictions if p.missing == least])


def preferred(predictions: Sequence[Prediction]) -> Prediction:
    """The placement that `auto` takes of those predicted, one at least, which all fit.

    What MLX computes in its graph, or else whole experts spread evenly, labelled "experts",
    unless another is faster by MARGIN, since a prediction is one; of others that are about as
    fast as the fastest the one that holds least.
    """
    least = min(p.decode.total for p in predictions)
    for usual in sorted(predictions, key=lambda p: not p.setup.in_graph):
        is_usual = usual.setup.in_graph or usual.placed.label == "experts"
        if is_usual and least > (1 - MARGIN) * usual.decode.total:
            return usual
    alike = [p for p in predictions if p.decode.total <= (1 + ALIKE) * least]
    return min(alike, key=lambda p: sum(p.placed.resident))


def _built(setup: Setup, cluster: Cluster) -> list[Placed]:
    """What a run on `cluster` would choose from; whole experts spread evenly where nothing
    of it has room.
    """
    shape, work = setup.shape_on(cluster.nodes), setup.workload
    speeds = [machine.reached_bandwidth for machine in cluster.machines]
    slots = expert_slots(shape, cluster, work.batch, work.context)
    makers = ways(shape, speeds, slots, cluster.schedule)
    even = makers["experts"]()  # which refuses more nodes than experts
    made: dict[Placement, str] = {}
    if cluster.nodes > 1:
        check_way(setup.placement, shape, cluster.nodes)
        for way in makers if setup.placement == "auto" else [setup.placement]:
            with suppress(PlacementError):
                made.setdefault(makers[way](), way)
    made = made or {even: "experts"}
    whole = shape.experts * shape.moe_layers
    if setup.placement == "auto" and sum(slots) < whole:  # what lacks least
        room = [whole] * cluster.nodes
        made.setdefault(place_by_speed(shape, [s + 1 for s in slots], room), "experts by memory")
    placed = (placed_of(each, shape.expert_hidden, way) for each, way in made.items())
    return [each for each in placed if each is not None]


def predict_all(setup: Setup, counts: Sequence[int]) -> list[Prediction]:
    return [predict(setup, nodes) for nodes in counts]


def evaluate(setup: Setup, placed: Placed) -> Prediction:
    """The prediction for as many nodes as the experts are `placed` on."""
    nodes, work = len(placed.resident), setup.workload
    shape, cluster = setup.shape_on(nodes), setup.cluster(nodes)
    step = Step(rows=work.batch, sequences=work.batch, context=work.context, heads=work.batch)
    decode, busiest = _timed(shape, cluster, placed, step)
    prefill = StepTime()
    for start in range(0, work.prompt, work.chunk):
        length = min(work.chunk, work.prompt - start)
        last = start + length == work.prompt
        step = Step(
            rows=work.batch * length,
            sequences=work.batch,
            context=start + (length + 1) / 2,  # a row looks back on half of its own chunk
            heads=work.batch if last else 0,
        )
        prefill = prefill + _timed(shape, cluster, placed, step)[0]
    memory = node_bytes(shape, cluster, placed.resident, work.batch, work.context)
    return Prediction(setup, cluster, placed, decode, prefill, busiest, memory)


def _timed(
    shape: ModelShape, cluster: Cluster, placed: Placed, step: Step
) -> tuple[StepTime, Busiest]:
    drawn = distinct_experts(shape.experts, shape.top_k, step.rows)
    return step_time(shape, cluster, step, placed.selecting(drawn))
