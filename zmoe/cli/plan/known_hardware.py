"""Well-known machines and the links between them: speeds and prices, each with its source.

Prices are list prices in US dollars without tax in the month named, the machine's
launch, and in the configuration named; they change (memory became dear in 2026),
so check before buying. What no vendor states is an estimate and says so. A
calibrated profile (zmoe/perf/profile.py) replaces all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from zmoe.perf.hardware import (
    CPU_SYNC_S,
    CUDA_SYNC_S,
    GIB,
    METAL_CROSSING_S,
    METAL_LAYER_CYCLES,
    Machine,
)
from zmoe.perf.links import RDMA, Link, ethernet

# Shares of the bandwidth that decoding of a plain model (7B, F16) reaches with llama.cpp
# (discussion 4167): an Ultra's two dies reach less of theirs.
_ULTRA, _MAX, _PRO = 0.7, 0.78, 0.85
# Metal's recommended working set: about three quarters, and more with
# `sysctl iogpu.wired_limit_mb`. An estimate.
_MAC_SHARE = 0.75
_APPLE = "memory, bandwidth and price: Apple's specifications and store"
_GPU = "rate: estimate, GPU cores x lanes x 2 x clock"

_MACHINES = (
    Machine(
        "m2-ultra",
        192 * GIB,
        800e9,
        27.2e12,
        f"Mac Studio, 76 GPU cores, 192 GB, 1 TB. {_APPLE} in June 2023 (3,999, 1,000 more for "
        f"the GPU and 1,600 for the memory); {_GPU} (76 x 128 x 1.4 GHz)",
        usable_share=_MAC_SHARE,
        bandwidth_efficiency=_ULTRA,
        crossing_s=METAL_CROSSING_S,
        layer_s=METAL_LAYER_CYCLES / 1.4e9,
        price_usd=6599,
    ),
    Machine(
        "m3-ultra",
        512 * GIB,
        819e9,
        28.3e12,
        f"Mac Studio, 80 GPU cores, 512 GB, 1 TB. {_APPLE} in March 2025; {_GPU} (80 x 128 x "
        "1.38 GHz)",
        usable_share=_MAC_SHARE,
        bandwidth_efficiency=_ULTRA,
        crossing_s=METAL_CROSSING_S,
        layer_s=METAL_LAYER_CYCLES / 1.38e9,
        price_usd=9499,
    ),
    Machine(
        "m4-max",
        128 * GIB,
        546e9,
        18.4e12,
        f"Mac Studio, 40 GPU cores, 128 GB, 512 GB. {_APPLE} in March 2025; {_GPU} (40 x 128 x "
        "1.8 GHz)",
        usable_share=_MAC_SHARE,
        bandwidth_efficiency=_MAX,
        crossing_s=METAL_CROSSING_S,
        layer_s=METAL_LAYER_CYCLES / 1.8e9,
        price_usd=3499,
    ),
    Machine(
        "m4-pro-mini",
        64 * GIB,
        273e9,
        9.2e12,
        f"Mac mini, 20 GPU cores, 64 GB, 512 GB. {_APPLE} in October 2024; {_GPU} (20 x 128 x "
        "1.8 GHz)",
        usable_share=_MAC_SHARE,
        bandwidth_efficiency=_PRO,
        crossing_s=METAL_CROSSING_S,
        layer_s=METAL_LAYER_CYCLES / 1.8e9,
        price_usd=2199,
    ),
    Machine(
        "dgx-spark",
        128 * GIB,
        273e9,
        125e12,
        "memory and bandwidth: NVIDIA's specifications; price: NVIDIA's in October 2025 (4,699 "
        "in 2026); rate: estimate, an eighth of the stated 1 petaflop of sparse FP4",
        sync_s=CUDA_SYNC_S,
        crossing_s=CUDA_SYNC_S,
        price_usd=3999,
    ),
    Machine(
        "ryzen-ai-max-395",
        128 * GIB,
        256e9,
        59e12,
        "memory and bandwidth (256 bit LPDDR5X-8000): AMD's specifications; price: Framework "
        "Desktop 128 GB in February 2025 (2,459 from January 2026); rate: estimate, 40 compute "
        "units x 512 x 2.9 GHz; "
        "usable share: estimate, 96 GB for the GPU",
        usable_share=0.75,
        sync_s=CUDA_SYNC_S,
        price_usd=1999,
    ),
    Machine(
        "epyc",
        384 * GIB,
        460.8e9,
        6.6e12,
        "EPYC 9354, one socket, 12 x 32 GB DDR5-4800. bandwidth: AMD's specifications; rate: "
        "estimate, 32 cores x 64 x 3.25 GHz; price: estimate for the whole server",
        sync_s=CPU_SYNC_S,
        price_usd=7000,
    ),
    Machine(
        "dgx-h100",
        640 * GIB,
        8 * 3.35e12,
        8 * 989e12,
        "eight H100 as one node, tensor parallel over NVLink, for comparison: not what zmoe "
        "runs. memory, bandwidth and rate: NVIDIA's specifications; price: 22 times that of two "
        "m2-ultra, as arXiv 2506.23635 has it (SemiAnalysis in May 2023: 270,000); time per "
        "layer: estimate, two all-reduces",
        sync_s=CUDA_SYNC_S,
        price_usd=290_000,
        supported=False,
    ),
)

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
    RDMA,
    Link(
        "roce",
        8e-6,
        11.5e9,
        "RDMA over 100 Gb/s Ethernet. latency: estimate; bandwidth: estimate, 92% of line rate",
        per_peer_s=2e-6,
        supported=False,
    ),
)

MACHINES: Mapping[str, Machine] = {machine.name: machine for machine in _MACHINES}
LINKS: Mapping[str, Link] = {link.name: link for link in _LINKS}
