"""Well-known machines: memory, bandwidth, rates and price, each with its source.

Prices are list prices in US dollars without tax in the month named, the machine's
launch, and in the configuration named; they change (memory became dear in 2026),
so check before buying. What no vendor states is an estimate and says so. A
calibrated profile (zmoe/perf/profile.py) replaces all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from zmoe.perf.hardware import GIB, Machine

CUDA_SYNC_S = 20e-6  # estimate
CPU_SYNC_S = 50e-6  # one mx.eval of MLX on CPU, measured on an EPYC
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

MACHINES: Mapping[str, Machine] = {machine.name: machine for machine in _MACHINES}
