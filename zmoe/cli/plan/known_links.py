"""Well-known networks between nodes: latency and bandwidth, each with its source."""

from __future__ import annotations

from collections.abc import Mapping

from zmoe.perf.links import Link, ethernet

_LINKS = (
    ethernet("1gbe", 1, 40),
    ethernet("2.5gbe", 2.5, 35),
    ethernet("10gbe", 10, 25),
    ethernet("25gbe", 25, 15),
    Link(
        "10gbe-grpc",
        0.933e-3,
        1.25e9,
        "the transport of arXiv 2506.23635, from its own figures: 23% of a token's time at 6.1 "
        "tokens/s over 40 layers on 2 nodes is 943 us a layer, less 10 us for 12 KiB",
        per_peer_s=0.0,
    ),
    Link(
        "tb5",
        190e-6,
        5e9,
        "TCP over Thunderbolt 5. latency: half of the least round trip (0.38 ms) in exo issue "
        "2295; bandwidth: estimate, half of the stated 80 Gb/s",
    ),
    Link(
        "tb5-rdma",
        10e-6,
        7e9,
        "RDMA over Thunderbolt 5 (macOS 26.2). latency: users report 5 to 9 us; bandwidth: "
        "7.6 GB/s a rank reported in pytorch pull request 189856",
        per_peer_s=2e-6,
        supported=False,
    ),
    Link(
        "roce",
        8e-6,
        11.5e9,
        "RDMA over 100 Gb/s Ethernet. latency: estimate; bandwidth: estimate, 92% of line rate",
        per_peer_s=2e-6,
        supported=False,
    ),
)

LINKS: Mapping[str, Link] = {link.name: link for link in _LINKS}
