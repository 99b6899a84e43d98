"""Settings of a run, validated where they enter; every error names the setting."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zmoe.errors import SettingError

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


def check_setting(ok: bool, setting: str, value: object, expected: str) -> None:
    """Raise SettingError unless `ok`."""
    if not ok:
        raise SettingError(setting, f"is {value!r}: expected {expected}")


def is_int(value: object, least: float, most: float = math.inf) -> bool:
    """Whether `value` is an int (no bool) from `least` to `most`."""
    return type(value) is int and least <= value <= most


def is_number(value: object, least: float, most: float = math.inf) -> bool:
    """Whether `value` is a finite int or float (no bool) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and least <= value <= most


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
        check = check_setting
        check(is_int(self.max_tokens, 1), "max_tokens", self.max_tokens, "a positive whole number")
        check(is_number(self.temp, 0), "temp", self.temp, "a number of 0 or more")
        top_p_fits = is_number(self.top_p, 0, 1) and self.top_p > 0
        check(top_p_fits, "top_p", self.top_p, "a number in (0, 1]")
        check(is_int(self.top_k, 0), "top_k", self.top_k, "0 or a positive whole number")
        check(is_number(self.min_p, 0, 1), "min_p", self.min_p, "a number in [0, 1]")
        seed_fits = self.seed is None or is_int(self.seed, 0, 2**64 - 1)
        check(seed_fits, "seed", self.seed, "a whole number from 0 to 2^64-1")


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
            fits = is_number(value, 0) and value > 0
            check_setting(fits, name, value, "a positive number of seconds")


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
        check = check_setting
        chunk, window = self.prefill_chunk, self.max_kv_size
        check(is_int(chunk, 1, 8192), "prefill_chunk", chunk, "a whole number from 1 to 8192")
        window_fits = window is None or is_int(window, 9)
        check(window_fits, "max_kv_size", window, "a whole number above 8")
        for name, known in (
            ("compute", COMPUTES),
            ("policy", POLICIES),
            ("activations", ACTIVATIONS),
            ("wire_dtype", WIRE_DTYPES),
            ("schedule", SCHEDULES),
        ):
            value = getattr(self, name)
            check(value in known, name, value, " or ".join(known))
        if self.compute == "mlx" and self.activations != "exact":
            raise SettingError("activations", "is int8: expected exact where MLX computes")
