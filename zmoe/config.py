"""Settings of a run. The field of a setting states its default, its limit, its help and its flag.

The commands' flags are generated from the fields, and the dataclasses travel unchanged from
the command line to the workers. Constructing one validates it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from zmoe.errors import SettingError

DEFAULT_MODEL = "zmoe-tiny"
PROTOCOL_VERSION = 11
SCHEDULES = ("decentralized", "centralized")
COMPUTES = ("auto", "mlx", "native")
BACKENDS = ("auto", "zmq", "ring", "jaccl", "nccl")
ATTENTIONS = ("replicated", "sharded")
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


def is_int(value: object, least: float, most: float = math.inf) -> bool:
    """Whether `value` is an int (not a bool) from `least` to `most`."""
    return type(value) is int and least <= value <= most


def _is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (not a bool)."""
    return type(value) in (int, float) and math.isfinite(typing.cast(float, value))


# ---- what is known of a field -----------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """Which values a setting may have, as a function and in words."""

    expected: str
    fits: Callable[[Any], bool]
    choices: tuple[str, ...] | None = None  # where they are a few names


def whole(expected: str, least: int, most: float = math.inf) -> Limit:
    """Whole numbers from `least` to `most`."""
    return Limit(expected, lambda value: is_int(value, least, most))


def number(expected: str, fits: Callable[[float], bool]) -> Limit:
    """Finite numbers that `fits` takes."""
    return Limit(expected, lambda value: _is_number(value) and fits(value))


def one_of(*names: str) -> Limit:
    """One of a few names."""
    return Limit(" or ".join(names), lambda value: value in names, names)


@dataclass(frozen=True)
class Setting:
    """The annotation of a field: what its type leaves open.

    The flag has the name of the field unless `flag` gives another; a setting without `help`
    has no flag. `in_gib`: the flag takes GiB, while the field is in bytes.
    """

    help: str = ""
    limit: Limit | None = None
    flag: str = ""
    short: str | None = None
    metavar: str | None = None
    in_gib: bool = False


@dataclass(frozen=True)
class Field:
    """A field of Settings with its annotation taken apart; `kind` is its type without None."""

    name: str
    kind: Any
    optional: bool
    setting: Setting

    @property
    def flag(self) -> str:
        """The long flag."""
        return self.setting.flag or "--" + self.name.replace("_", "-")


def fields_of(settings: type[Settings]) -> tuple[Field, ...]:
    """The fields of `settings`, in their order."""
    kind: Any = settings  # which mypy does not know to be hashable
    return _fields_of(kind)


@functools.cache  # each construction of settings asks, and type hints take 0.2 ms to resolve
def _fields_of(settings: Any) -> tuple[Field, ...]:
    found = []
    for name, hint in typing.get_type_hints(settings, include_extras=True).items():
        is_annotated = typing.get_origin(hint) is Annotated
        hint, setting = typing.get_args(hint) if is_annotated else (hint, Setting())
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        optional = isinstance(hint, types.UnionType)
        found.append(Field(name, kinds[0] if optional else hint, optional, setting))
    return tuple(found)


@dataclass(frozen=True)
class Settings:
    """Base of all settings. Construction raises SettingError, which names the field at fault."""

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            value, limit = getattr(self, field.name), field.setting.limit
            if limit is None or (field.optional and value is None) or limit.fits(value):
                continue
            raise SettingError(field.name, f"is {value!r}: expected {limit.expected}")


# ---- the settings --------------------------------------------------------------------

_POSITIVE = whole("a positive whole number", 1)
_TOP_K = whole("0 or a positive whole number", 0)
_LOGPROBS = whole("a whole number from 0 to 20", 0, 20)
_REPETITION = number(
    "0 or a number from 0.01 to 100", lambda value: value == 0 or 0.01 <= value <= 100
)
_RECENT = whole("a whole number from 1 to 1048576", 1, 1 << 20)
_PENALTY = number("a number from -2 to 2", lambda value: -2 <= value <= 2)
_LOGIT_BIAS = Limit(
    "token ids with a number from -100 to 100 each",
    lambda value: (
        isinstance(value, Mapping)
        and all(is_int(token, 0, 2**31 - 1) for token in value)
        and all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    ),
)
_SEED = whole("a whole number from 0 to 2^64-1", 0, 2**64 - 1)
_CHUNK = whole("a whole number from 1 to 8192", 1, 8192)
_PARALLEL = whole("a whole number from 1 to 256", 1, 256)
_WINDOW = whole("a whole number above 8", 9)
_KV_BITS = whole("8", 8, 8)
_TEMPERATURE = number("a number of 0 or more", lambda value: value >= 0)
_TOP_P = number("a number in (0, 1]", lambda value: 0 < value <= 1)
_MIN_P = number("a number in [0, 1]", lambda value: 0 <= value <= 1)
SECONDS = number("a positive number of seconds", lambda value: value > 0)
_SPECULATE = Limit(
    "auto, off or a whole number from 1 to 16",
    lambda value: value in ("auto", "off", *map(str, range(1, 17))),
)

# Each help text is a phrase without a final full stop; the default follows in brackets.
_TOP_P_HELP = "Sample from the most likely tokens that together have this probability; 1 is off"
_MIN_P_HELP = "Least probability of a token, relative to the most likely one; 0 is off"
_JOIN_HELP = "Seconds within which all nodes must connect"
_LOAD_HELP = "Seconds within which all nodes must load their weights"
_PEER_HELP = "Seconds to wait in one exchange for a peer that is still connected"
_COMPUTE_HELP = "Large matmuls in MLX or in zmoe's CPU kernels; auto: native unless there is a GPU"
_BACKEND_HELP = (
    "What carries the exchanges where MLX computes slices of experts: zmoe's own messages or "
    "another backend of MLX; auto: zmq, or jaccl where every node has RDMA"
)
_ATTENTION_HELP = (
    "Where MLX computes slices of experts: every node computes all attention heads, or its share "
    "of them, for one more exchange per layer"
)
_ACTIVATIONS_HELP = (
    "Precision of the activations in quantised matmuls on the CPU kernels; int8 is faster on "
    "some CPUs but less exact"
)
_WIRE_DTYPE_HELP = (
    "Data type of the partial sums that nodes exchange; auto selects the dtype of the model, and "
    "q8 (8-bit blocks) suits slow links"
)
_SCHEDULE_HELP = (
    "Every node computes attention and routing, or the first one does and the others hold experts"
)
_POLICY_HELP = (
    "Experts that a node runs in each layer: the selected ones, all of its own, or as many as the "
    "busiest node runs; those not selected do not change the output, but stay warm"
)
_WINDOW_HELP = (
    "Keep only this many tokens in the attention cache, the first 4 and the most recent ones, so "
    "that the text may exceed the model's context (default: no limit)"
)
_KV_BITS_HELP = (
    "Keep keys and values in the attention cache in 8 bits, so that it holds about twice as many "
    "tokens (default: as the model's activations are)"
)
_QUEUE_HELP = "Requests that may wait for others to end (default: four times --parallel)"
_SPECULATE_HELP = (
    "Guess tokens from the text so far and check them in one step; the text stays the same"
)


@dataclass(frozen=True)
class Sampling(Settings):
    """How the leader picks tokens; names and meaning are mlx-lm's.

    `repetition_penalty` divides the positive logits and multiplies the negative ones of the last
    `repetition_context_size` tokens, those of the prompt included. `presence_penalty` and
    `frequency_penalty` are OpenAI's: they are subtracted once, and once for each occurrence, from
    the logits of generated tokens. `logit_bias` maps token ids to what is added to their logits.
    `logprobs` asks for each token's log-probability and those of that many of the likeliest
    tokens. `seed` None draws a fresh one. `ignore_eos` goes on after an end token.
    """

    max_tokens: Annotated[int, Setting("Maximum tokens to generate", _POSITIVE, short="-m")] = 100
    temp: Annotated[float, Setting("Sampling temperature; 0 is greedy", _TEMPERATURE)] = 0.0
    top_p: Annotated[float, Setting(_TOP_P_HELP, _TOP_P)] = 1.0
    top_k: Annotated[int, Setting("Sample from the k most likely tokens; 0 is off", _TOP_K)] = 0
    min_p: Annotated[float, Setting(_MIN_P_HELP, _MIN_P)] = 0.0
    repetition_penalty: Annotated[
        float, Setting("Divide the logits of recent tokens by this; 0 is off", _REPETITION)
    ] = 0.0
    repetition_context_size: Annotated[
        int, Setting("Recent tokens to which --repetition-penalty applies", _RECENT)
    ] = 20
    presence_penalty: Annotated[
        float, Setting("Subtract this from the logits of generated tokens", _PENALTY)
    ] = 0.0
    frequency_penalty: Annotated[
        float, Setting("Subtract this for each time that a token was generated", _PENALTY)
    ] = 0.0
    logit_bias: Annotated[Mapping[int, float] | None, Setting(limit=_LOGIT_BIAS)] = (
        dataclasses.field(default=None, hash=False)
    )
    logprobs: Annotated[int | None, Setting(limit=_LOGPROBS)] = None
    seed: Annotated[int | None, Setting("Seed of the random numbers for sampling", _SEED)] = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logit_bias is not None:  # whoever gave it may change it
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))


@dataclass(frozen=True)
class Timing(Settings):
    """Deadlines in seconds.

    `join`: until every node has said hello. `load`: until every node has loaded its
    weights. `peer`: for one peer's part of one exchange, however slow its compute.
    `grace`: how long a broken link may take to come back.
    """

    join: Annotated[float, Setting(_JOIN_HELP, SECONDS, "--join-timeout")] = 60.0
    load: Annotated[float, Setting(_LOAD_HELP, SECONDS, "--load-timeout")] = 3600.0
    peer: Annotated[float, Setting(_PEER_HELP, SECONDS, "--peer-timeout")] = 120.0
    grace: Annotated[float, Setting(limit=SECONDS)] = 1.0


@dataclass(frozen=True)
class Batching(Settings):
    """How the leader divides steps among sequences; the other nodes need not know.

    `step_ms`: while sequences are generating, steps that also run a part of a new prompt aim at
    that many milliseconds. `speculate`: how many tokens to guess from the text so far and
    have checked in one step; "auto" adapts it to what pays. `max_queue`: most sequences that
    wait, None for no limit; `queue_timeout`: seconds until one that waits is given up.
    """

    step_ms: Annotated[
        int, Setting("Milliseconds per step while prompts are processed beside others", _POSITIVE)
    ] = 250
    speculate: Annotated[str, Setting(_SPECULATE_HELP, _SPECULATE, metavar="auto|off|K")] = "auto"
    max_queue: Annotated[int | None, Setting(_QUEUE_HELP, _POSITIVE)] = None
    queue_timeout: Annotated[float, Setting(limit=SECONDS)] = 600.0

    @property
    def drafts(self) -> int | None:
        """The most tokens to guess per step; None: as many as pay."""
        if self.speculate == "auto":
            return None
        return 0 if self.speculate == "off" else int(self.speculate)


@dataclass(frozen=True)
class EngineConfig(Settings):
    """What every node must agree on to run the same steps.

    `prefill_chunk`: most tokens of a prompt in one step. `parallel`: most sequences that run
    at the same time. `max_kv_size`: tokens that the rotating
    attention cache keeps, None for the whole context. `kv_bits`: 8 for keys and values in 8
    bits, None for the dtype of the activations. `compute`: who computes the large
    matmuls. `activations`: their precision in quantised matmuls on the C kernels.
    `wire_dtype`: how partial sums travel between nodes; "auto" as the model's activations are.
    `backend`: what carries the exchanges of slices that MLX computes. `attention`: whether
    every node then has all attention heads, "replicated", or its share of them, "sharded".
    `schedule`: "decentralized" (every node routes, one all-reduce per MoE layer), or
    "centralized" (the leader routes, the others hold experts only).
    `policy`: which of its experts a node runs in each MoE layer: "selected", those that
    the router has selected; "busy-full", all of them; "router-aided", as many as the busiest
    node has to. Experts that are run without being selected do not change the output.
    """

    prefill_chunk: Annotated[
        int, Setting("Prompt tokens to process per step", _CHUNK, "--prefill-step-size")
    ] = 512
    parallel: Annotated[int, Setting("Sequences that run at the same time", _PARALLEL)] = 32
    max_kv_size: Annotated[int | None, Setting(_WINDOW_HELP, _WINDOW)] = None
    kv_bits: Annotated[int | None, Setting(_KV_BITS_HELP, _KV_BITS, metavar="8")] = None
    compute: Annotated[str, Setting(_COMPUTE_HELP, one_of(*COMPUTES))] = "auto"
    activations: Annotated[str, Setting(_ACTIVATIONS_HELP, one_of(*ACTIVATIONS))] = "exact"
    wire_dtype: Annotated[str, Setting(_WIRE_DTYPE_HELP, one_of(*WIRE_DTYPES))] = "auto"
    backend: Annotated[str, Setting(_BACKEND_HELP, one_of(*BACKENDS))] = "auto"
    attention: Annotated[str, Setting(_ATTENTION_HELP, one_of(*ATTENTIONS))] = "replicated"
    schedule: Annotated[str, Setting(_SCHEDULE_HELP, one_of(*SCHEDULES))] = "decentralized"
    policy: Annotated[str, Setting(_POLICY_HELP, one_of(*POLICIES))] = "selected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute == "native" and self.attention != "replicated":
            raise SettingError(
                "attention", "is sharded: expected replicated, as MLX does not compute"
            )
        if self.compute == "mlx" and self.activations != "exact":
            raise SettingError("activations", "is int8: expected exact where MLX computes")
        if self.compute == "mlx" and self.kv_bits is not None:
            raise SettingError("kv_bits", f"is {self.kv_bits}: expected none where MLX computes")

    @property
    def max_rows(self) -> int:
        """The most rows of a step."""
        return max(self.prefill_chunk, self.parallel)
