"""What the nodes' messages of one MoE layer cost."""

from __future__ import annotations

from dataclasses import dataclass

from zmoe.perf.links import Link


@dataclass(frozen=True)
class Messages:
    """Seconds that messages take by their number, and by their bytes."""

    latency: float = 0.0
    transfer: float = 0.0

    @property
    def total(self) -> float:
        return self.latency + self.transfer


def round_latency(link: Link, nodes: int) -> float:
    """One message to, and one from, each of the other nodes, all at once."""
    return link.latency_s + (nodes - 2) * link.per_peer_s if nodes > 1 else 0.0


def all_reduce(link: Link, nodes: int, payload_bytes: float) -> Messages:
    """The decentralised schedule: every node holds the sum of all `payload_bytes`.

    Directly, each sends its payload to all others: one round, N-1 payloads out
    and as many in. Or in two rounds, each adds up an N-th of the rows and sends
    the sums: 2 (N-1)/N payloads. The faster one counts.
    """
    if nodes == 1:
        return Messages()
    one_round = round_latency(link, nodes)
    payload = payload_bytes / link.bandwidth
    direct = Messages(one_round, (nodes - 1) * payload)
    halves = Messages(2 * one_round, 2 * (nodes - 1) / nodes * payload)
    return min(direct, halves, key=lambda messages: messages.total)


def scatter_gather(link: Link, nodes: int, payload_bytes: float) -> Messages:
    """The centralised schedule: the leader sends the rows to all workers, and gets
    as many bytes of outputs from each. Two rounds, through the leader's one link.
    """
    if nodes == 1:
        return Messages()
    transfer = 2 * (nodes - 1) * payload_bytes / link.bandwidth
    return Messages(2 * round_latency(link, nodes), transfer)
