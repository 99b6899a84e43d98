"""Settings of a run, validated where they enter; every error names the flag."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zmoe.errors import InputError

DEFAULT_MODEL = "zmoe-tiny"
PROTOCOL_VERSION = 4
SCHEDULES = ("decentralized", "centralized")
COMPUTES = ("auto", "mlx", "native")
ACTIVATIONS = ("exact", "int8")
WIRE_DTYPES = ("auto", "f32", "bf16", "f16", "q8")
POLICIES = ("selected", "busy-full", "router-aided")
# MLX's modes of quantisation, and the bits and group sizes that each has.
QUANTIZATIONS = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


def _check(ok: bool, flag: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{flag} is {value}: expected {expected}")


@dataclass(frozen=True)
class Sampling:
    """How the leader picks tokens; names and meaning are mlx-lm's.

    `temp` 0 is greedy; `top_p` 1, `top_k` 0 and `min_p` 0 are off; `seed` None
    leaves the generator alone. `ignore_eos` writes on after an end token.
    """

    max_tokens: int = 100
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens > 0, "--max-tokens", self.max_tokens, "a positive number")
        _check(
            math.isfinite(self.temp) and self.temp >= 0,
            "--temp",
            self.temp,
            "a number of 0 or more",
        )
        _check(0 < self.top_p <= 1, "--top-p", self.top_p, "a number in (0, 1]")
        _check(self.top_k >= 0, "--top-k", self.top_k, "0 or a positive number")
        _check(0 <= self.min_p <= 1, "--min-p", self.min_p, "a number in [0, 1]")
        seed_fits = self.seed is None or 0 <= self.seed < 2**64
        _check(seed_fits, "--seed", self.seed, "a number from 0 to 2^64-1")


@dataclass(frozen=True)
class Timing:
    """Deadlines in seconds.

    `join`: until every node has said hello. `load`: until every node holds its
    weights. `peer`: for one peer's part of one exchange, however slow its
    compute. `grace`: how long a broken link may take to come back.
    """

    join: float = 60.0
    load: float = 3600.0
    peer: float = 120.0
    grace: float = 1.0

    def __post_init__(self) -> None:
        for name in ("join", "load", "peer", "grace"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value > 0
            _check(ok, f"--{name}-timeout", value, "a positive number of seconds")


@dataclass(frozen=True)
class EngineConfig:
    """What every node must agree on to run the same steps.

    `prefill_chunk`: rows of one prefill step. `max_kv_size`: rotating attention
    cache of that many tokens, None for the whole context. `compute`: "mlx",
    "native" (the large products on the C kernels), or "auto": native on a CPU.
    `activations` of quantised products on the kernels: "exact", or "int8".
    `wire_dtype`: how partial sums travel between nodes: "auto" as the model's
    activations are, "q8" in blocks of 8-bit integers.
    `schedule`: "decentralized" (every node routes, one all-reduce a MoE layer),
    or "centralized" (the leader routes, the others hold experts only).
    `policy`: which of its experts a node runs in each MoE layer: "selected",
    those that are chosen; "busy-full", all of them; "router-aided", as many as
    the busiest node, which keeps their weights warm. What is not chosen is run
    for nothing: the output is the same.
    """

    prefill_chunk: int = 512
    max_kv_size: int | None = None
    compute: str = "auto"
    activations: str = "exact"
    wire_dtype: str = "auto"
    schedule: str = "decentralized"
    policy: str = "selected"

    def __post_init__(self) -> None:
        _check(
            1 <= self.prefill_chunk <= 8192,
            "--prefill-step-size",
            self.prefill_chunk,
            "a number from 1 to 8192",
        )
        kv_fits = self.max_kv_size is None or self.max_kv_size > 8
        _check(kv_fits, "--max-kv-size", self.max_kv_size, "more than 8")
        _check(self.compute in COMPUTES, "--compute", self.compute, " or ".join(COMPUTES))
        _check(self.policy in POLICIES, "--policy", self.policy, " or ".join(POLICIES))
        _check(
            self.activations in ACTIVATIONS,
            "--activations",
            self.activations,
            " or ".join(ACTIVATIONS),
        )
        _check(
            self.wire_dtype in WIRE_DTYPES,
            "--wire-dtype",
            self.wire_dtype,
            " or ".join(WIRE_DTYPES),
        )
        _check(
            self.compute != "mlx" or self.activations == "exact",
            "--activations",
            self.activations,
            "exact with --compute mlx",
        )
        _check(self.schedule in SCHEDULES, "--schedule", self.schedule, " or ".join(SCHEDULES))
