"""A network between nodes: its latency and bandwidth.

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
