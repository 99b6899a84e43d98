"""A network between nodes: its latency and bandwidth, and what messages of a MoE layer cost on it.

The latency is that of one exchange of a small frame between two nodes, both
sending and both receiving, software included. zmoe's own software takes 34 us
of it on loopback (bench/results/, 12 KiB, MLX array to MLX array).
"""

from __future__ import annotations

from dataclasses import dataclass

PER_PEER_S = 10e-6  # estimate: one more frame to send and one to receive


@dataclass(frozen=True)
class Link:
    """`latency_s`: one small exchange between two nodes. `per_peer_s`: what each
    further peer adds. `bandwidth`: payload bytes/s that a node sends, and at the
    same time receives. `supported`: zmoe has a transport for it.
    """

    name: str
    latency_s: float
    bandwidth: float
    source: str
    per_peer_s: float = PER_PEER_S
    supported: bool = True


def ethernet(name: str, gigabits: float, network_us: float) -> Link:
    """TCP over Ethernet: 94% of the line rate is payload (frames of 1500 bytes)."""
    source = (
        f"bandwidth: 94% of the standard's line rate; latency: 34 us measured on loopback "
        f"+ {network_us:g} us for cards and switch (estimate)"
    )
    return Link(name, (34 + network_us) * 1e-6, 0.94 * gigabits * 1e9 / 8, source)


RDMA = Link(
    "tb5-rdma",
    10e-6,
    7e9,
    "RDMA over Thunderbolt 5 (macOS 26.2). latency: users report 5 to 9 us; bandwidth: "
    "7.6 GB/s a rank reported in pytorch pull request 189856",
    per_peer_s=2e-6,
    supported=False,
)


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
    """The decentralised schedule: each of 2 or more nodes holds the sum of all `payload_bytes`.

    Directly, each sends its payload to all others: one round, N-1 payloads out
    and as many in. Or in two rounds, each adds up an N-th of the rows and sends
    the sums: 2 (N-1)/N payloads. The faster one counts.
    """
    one_round = round_latency(link, nodes)
    payload = payload_bytes / link.bandwidth
    direct = Messages(one_round, (nodes - 1) * payload)
    halves = Messages(2 * one_round, 2 * (nodes - 1) / nodes * payload)
    return min(direct, halves, key=lambda messages: messages.total)


def scatter_gather(link: Link, nodes: int, payload_bytes: float) -> Messages:
    """The centralised schedule on 2 or more nodes: the leader sends the rows to all workers,
    and gets as many bytes of outputs from each. Two rounds, through the leader's one link.
    """
    transfer = 2 * (nodes - 1) * payload_bytes / link.bandwidth
    return Messages(2 * round_latency(link, nodes), transfer)
