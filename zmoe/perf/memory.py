"""What each node must hold: weights, attention cache and the running program."""

from __future__ import annotations

from collections.abc import Sequence

from zmoe.perf.cost import Cluster
from zmoe.perf.shape import ModelShape

# Interpreter, libraries, exchange buffers and the activations of one prefill
# chunk: 168 and 172 MiB measured for two small models, more
# for a wide one. An estimate.
PROGRAM_BYTES = 256 << 20
# Of recurrent layers: the state now, the one before, and those of two steps that may be repeated.
STATES_PER_SEQUENCE = 4
ROUNDING = 0.5  # bytes that none are missing for, as in Prediction.missing


def states_kept(sequences: int) -> int:
    """How many states of recurrent layers a node holds while so many sequences run: theirs, and
    snapshots: the latest of each, and four of texts with which many begin.
    """
    return sequences * STATES_PER_SEQUENCE + sequences + 4


def dense_node_bytes(
    shape: ModelShape, cluster: Cluster, sequences: int, context: int
) -> list[float]:
    """Each node's memory without experts: of the centralised schedule only the leader
    holds dense weights and caches.
    """
    states = states_kept(sequences) * shape.state_bytes
    resident = shape.dense_bytes + sequences * shape.cache_bytes(context) + states
    holders = 1 if cluster.schedule == "centralized" else cluster.nodes
    return [PROGRAM_BYTES + (resident if node < holders else 0.0) for node in range(cluster.nodes)]


def expert_slots(shape: ModelShape, cluster: Cluster, sequences: int, context: int) -> list[int]:
    """How many experts of one layer each node has memory for, over all layers, at most all."""
    taken = dense_node_bytes(shape, cluster, sequences, context)
    most = shape.experts * shape.moe_layers
    return [
        min(most, int(max(0.0, machine.usable_bytes - dense + ROUNDING) / shape.expert_bytes))
        for machine, dense in zip(cluster.machines, taken)
    ]


def node_bytes(
    shape: ModelShape, cluster: Cluster, resident: Sequence[float], sequences: int, context: int
) -> tuple[int, ...]:
    """Each node's memory with resident[n] experts per layer on node n."""
    dense = dense_node_bytes(shape, cluster, sequences, context)
    one = shape.expert_bytes * shape.moe_layers
    return tuple(round(other + experts * one) for other, experts in zip(dense, resident))
