"""What the nodes of a run offer, as the performance model takes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from zmoe.perf.hardware import KERNELS, Device, Machine
from zmoe.perf.links import Link, ethernet
from zmoe.perf.memory import PROGRAM_BYTES
from zmoe.placement.build import resident
from zmoe.placement.predict import Setup, Workload
from zmoe.placement.types import ModelInfo, Placement

# An exchange within a running model, where each node has one core for all it does: 150 us
# measured on two cores, 32 us with nothing else to do (bench/exchange.py).
LOOPBACK = Link("loopback", 100e-6, 2e9, "estimate between the two that were measured")
NETWORK = ethernet("10gbe", 10, 25)  # what joins the machines is not known
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


def setup_of(
    info: ModelInfo,
    offers: Sequence[NodeResources],
    device: Device,
    network: Link,
    schedule: str,
    policy: str,
    sharded: bool,
) -> tuple[Setup, list[int]]:
    """What to predict of a decoded token, and each node's capacity for experts in bytes.

    `network` joins the machines. `sharded`: attention is, so that each node holds less of it.
    """
    central, nodes = schedule == "centralized", len(offers)
    elsewhere = info.head_bytes * (nodes - 1) // nodes if sharded else 0
    dense = [0 if central and node else info.dense_bytes - elsewhere for node in range(nodes)]
    capacity = capacity_for(info, offers, dense, device == KERNELS)
    machines = [
        Machine(
            name=f"node {node}",
            memory_bytes=PROGRAM_BYTES + dense[node] + capacity[node],
            bandwidth=speed * 1e9,
            rate=inf,
            source="measured by the node",
            usable_share=1.0,
            bandwidth_efficiency=1.0,
            sync_s=device.sync_s,
            crossing_s=device.crossing_s,
            layer_s=device.layer_s,
        )
        for node, speed in enumerate(speeds_of(offers))
    ]
    link = LOOPBACK if on_one_machine(offers) else network
    work = Workload(prompt=0)
    return Setup(info.shape, tuple(machines), link, work, schedule, policy), capacity


def on_one_machine(offers: Sequence[NodeResources]) -> bool:
    return len({offer.machine for offer in offers}) == 1
