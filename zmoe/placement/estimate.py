"""A run's model, nodes and placements as the planner sees them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from zmoe.perf.cost import Cluster
from zmoe.perf.hardware import Machine
from zmoe.perf.links import Link, ethernet
from zmoe.perf.memory import PROGRAM_BYTES
from zmoe.perf.shape import GATED_MATRICES, Format, ModelShape
from zmoe.placement.build import resident
from zmoe.placement.candidates import Placed
from zmoe.placement.types import ModelInfo, Placement

# An exchange within a running model, where each node has one core for all it does: 150 us
# measured on two cores, 32 us with nothing else to do (bench/exchange.py).
LOOPBACK = Link("loopback", 100e-6, 2e9, "estimate between the two that were measured")
NETWORK = ethernet("10gbe", 10, 25)  # what joins the machines is not known
NATIVE_LAYER_S = 60e-6  # measured: neither product nor exchange, a layer (zmoe-run --stats)
UNKNOWN_SPEED = 20  # GB/s, where no node has measured


@dataclass(frozen=True)
class NodeResources:
    """What a node brings.

    machine: equal for nodes of one machine, which share its memory evenly.
    memory: bytes that the machine has for all of its nodes together.
    limit: bytes that this node may take, whatever its machine has; None: no limit.
    speed: GB/s at which it reads memory; 0: not measured.
    """

    machine: str
    memory: int
    limit: int | None = None
    speed: int = 0


def speeds_of(offers: Sequence[NodeResources]) -> tuple[int, ...]:
    """GB/s of each node: nodes of one machine are equal, as are all when one has not measured."""
    if not all(offer.speed for offer in offers):
        known = max(offer.speed for offer in offers)
        return (known or UNKNOWN_SPEED,) * len(offers)
    measured = defaultdict(list)
    for offer in offers:
        measured[offer.machine].append(offer.speed)
    return tuple(round(sum(m) / len(m)) for m in (measured[offer.machine] for offer in offers))


def capacity_for(
    info: ModelInfo, offers: Sequence[NodeResources], dense: Sequence[int], mapped: bool
) -> list[int]:
    """Bytes of experts that each node has room for beside its `dense` weights; negative
    where these do not fit.

    `mapped`: nodes of one machine share what they map of the checkpoint, so
    that its dense weights count once, and its experts too where all fit.
    """
    everything = info.expert_bytes * info.experts * len(info.moe_layers)
    together = defaultdict(list)
    for node, offer in enumerate(offers):
        if offer.limit is None:
            together[offer.machine].append(node)
    capacity = [(offer.limit or 0) - PROGRAM_BYTES - own for offer, own in zip(offers, dense)]
    for nodes in together.values():
        memory = max(offers[node].memory for node in nodes)
        resident_dense = [dense[node] for node in nodes]
        memory -= PROGRAM_BYTES * len(nodes) + (max if mapped else sum)(resident_dense)
        shared = mapped and memory >= everything
        for node in nodes:
            capacity[node] = everything if shared else memory // len(nodes)
    return [min(everything, each) for each in capacity]


def cache_room(
    info: ModelInfo,
    offers: Sequence[NodeResources],
    placement: Placement,
    mapped: bool,
    schedule: str,
) -> int:
    """Bytes that every node has left for keys and values; negative where weights take too much.

    In the centralised schedule the first node alone has a cache.
    """
    of_expert = info.expert_bytes
    weights = [of_expert * n for n in resident(placement, info.moe_intermediate_size)]
    cached = [True] + [schedule != "centralized"] * (placement.nodes - 1)
    rooms = []
    for machine in {offer.machine for offer in offers}:
        nodes = [node for node, offer in enumerate(offers) if offer.machine == machine]
        dense = [info.dense_bytes for node in nodes if cached[node]]
        taken = sum(weights[node] for node in nodes) + PROGRAM_BYTES * len(nodes)
        taken += (max if mapped else sum)([0, *dense])
        if dense:
            rooms.append((max(offers[node].memory for node in nodes) - taken) / len(dense))
    for node, offer in enumerate(offers):
        if offer.limit is not None and cached[node]:
            rooms.append(offer.limit - PROGRAM_BYTES - info.dense_bytes - weights[node])
    return int(min(rooms))


@dataclass(frozen=True)
class _Lump:
    """All dense weights of a layer, read once a step, whatever they are."""

    weights: int
    cache_elements: int = 0

    def parameters(self, hidden: int) -> int:
        return self.weights

    def attended(self, context: float, layers: int) -> float:
        return 0.0

    def score_operations(self, attended: float) -> float:
        return 0.0


def shape_of(info: ModelInfo) -> ModelShape:
    """A shape of as many bytes, for any family: all weights count as stored like the experts."""
    weights = Format(8 * info.expert_bytes / info.expert_parameters)
    router = len(info.moe_layers) * info.hidden_size * info.experts
    dense = 8 * info.dense_bytes / weights.bits_per_weight
    return ModelShape(
        name=Path(info.path).name,
        hidden=info.hidden_size,
        layers=info.layers,
        attention=_Lump(max(0, round((dense - router) / info.layers))),
        experts=info.experts,
        top_k=info.top_k,
        expert_hidden=round(info.expert_parameters / (GATED_MATRICES * info.hidden_size)),
        vocabulary=0,
        dense_layers=info.layers - len(info.moe_layers),
        dense_format=weights,
        expert_format=weights,
    )


def cluster_of(
    info: ModelInfo, offers: Sequence[NodeResources], mapped: bool, schedule: str, policy: str
) -> tuple[Cluster, list[int]]:
    """The nodes, and each one's capacity for experts in bytes, which its memory leaves it."""
    central = schedule == "centralized"
    dense = [0 if central and node else info.dense_bytes for node in range(len(offers))]
    capacity = capacity_for(info, offers, dense, mapped)
    default = Machine("", 0, 0.0, 0.0, "")
    machines = [
        Machine(
            name=f"node {node}",
            memory_bytes=PROGRAM_BYTES + dense[node] + capacity[node],
            bandwidth=speed * 1e9,
            rate=inf,
            source="measured by the node",
            usable_share=1.0,
            bandwidth_efficiency=1.0,
            sync_s=0.0 if mapped else default.sync_s,
            layer_s=NATIVE_LAYER_S if mapped else default.layer_s,
        )
        for node, speed in enumerate(speeds_of(offers))
    ]
    link = LOOPBACK if on_one_machine(offers) else NETWORK
    return Cluster(tuple(machines), link, schedule, policy), capacity


def on_one_machine(offers: Sequence[NodeResources]) -> bool:
    return len({offer.machine for offer in offers}) == 1


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
