"""What the process that serves clients (the front) and the one that leads the cluster (the engine)
tell each other, encoded by `zmoe.codec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from zmoe.codec import Codec, Fields, between, items
from zmoe.config import Sampling
from zmoe.engine.counts import Counts

Number = Annotated[int, between(0, 2**63)]
Size = Annotated[int, between(0, 2**60)]
Signed = Annotated[float, between(-1e9, 1e9)]
LogProbability = Annotated[float, between(float("-inf"), 0.001)]  # what rounding adds to 0
Text = Annotated[str, lambda value: ""]
_COUNTERS = [name for name, kind in Counts.__annotations__.items() if kind == "int"]
Choices = Annotated[
    Sampling,
    Fields(
        {
            "presence_penalty": Signed,
            "frequency_penalty": Signed,
            "logit_bias": Mapping[int, Signed] | None,
            "seed": Annotated[int, between(0, 2**64 - 1)] | None,
        }
    ),
]


# ---- front to engine -----------------------------------------------------------------


@dataclass(frozen=True)
class Submit:
    """Generate what follows `prompt` (token ids). `number` names the request from now on.

    `borders` and `salt` are those of a scheduler's Request; `grammar` is one of llguidance,
    or empty, and begins to count behind the first tokens `grammar_after`. `generated` are the
    tokens that engines before this one gave to the request, None where it is new.
    """

    number: Number
    prompt: tuple[Number, ...]
    sampling: Choices
    borders: tuple[Number, ...]
    salt: bytes
    grammar: Text
    grammar_after: tuple[Number, ...]
    generated: tuple[Number, ...] | None


@dataclass(frozen=True)
class Abort:
    """Nobody wants the rest of this request; nothing is told of it from now on."""

    number: Number


@dataclass(frozen=True)
class Close:
    """End the cluster, and the process."""


# ---- engine to front -----------------------------------------------------------------


@dataclass(frozen=True)
class Loading:
    """So many bytes of a node's share have been read."""

    rank: Number
    done: Size
    total: Size


@dataclass(frozen=True)
class Notice:
    """A line for whoever started the server, or several."""

    text: Text


@dataclass(frozen=True)
class NodeStatus:
    """What a node is and holds.

    `experts` are summed over the layers, and `expert_share` is its part of all experts' weights.
    It listens at `ports` of `host`, which are none in a cluster of one. `machine` is the same
    number for the nodes of one machine, `memory` the bytes that the node may take, and `speed` the
    GB/s at which it reads memory, 0 where that was not measured.
    """

    experts: Number
    expert_share: float
    host: str
    ports: tuple[Number, ...]
    machine: Number
    memory: Size
    peak_memory: Size
    speed: Number


@dataclass(frozen=True)
class Ready:
    """The cluster serves requests.

    `context` is the most tokens of prompt and text, 0 for no limit; `capacity` the positions
    that the caches of keys and values hold in all. `experts` are those of one layer, of which a
    token takes `top_k`. `placement` names the one that was taken, and `compute` says whose
    matmuls are run.
    """

    model_type: str
    dtype: str
    quantization: str
    layers: Number
    moe_layers: Number
    experts: Number
    top_k: Number
    vocabulary: Number
    placement: str
    placement_reason: Text
    compute: str
    context: Size
    capacity: Size
    load_seconds: float
    nodes: tuple[NodeStatus, ...]


@dataclass(frozen=True)
class TokenLogprob:
    """A token that could have been picked, and its log-probability."""

    token: Number
    logprob: LogProbability


@dataclass(frozen=True)
class Logprobs:
    """The log-probability of the token that was picked, and those of the likeliest ones."""

    logprob: LogProbability
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Output:
    """The tokens that a step gave to a request.

    `logprobs` has one item per token, or none where they were not asked for. `finish` is
    empty, "stop" (the last token ends the text, and is no part of it), "length", or "error" with
    a reason: `error` is the message, and `kind` "input", "queue_full", "queue_timeout" or
    "failed". `cached` counts the tokens of the prompt that needed no computing.
    """

    number: Number
    tokens: tuple[Number, ...]
    logprobs: tuple[Logprobs, ...]
    finish: str
    kind: str
    error: Text
    cached: Size


@dataclass(frozen=True)
class Outputs:
    """What a step gave, for all requests that it served."""

    outputs: Annotated[tuple[Output, ...], items(1, 4096)]


@dataclass(frozen=True)
class Stats:
    """The state of the cluster, told every second; `peak_memory` is in bytes by rank, `links` are
    the ranks to which the leader's link stands, and `hosts` is by rank the node that computes its
    share: another one where it is lost, None where all others compute a part of it. By rank,
    `step_seconds` are those that a node computes in a step, and `slow` says how slow those are for
    which the others wait.
    """

    counts: Annotated[
        Counts,
        Fields(
            {
                **dict.fromkeys(_COUNTERS, Size),
                "spans": Mapping[str, float],
                "exchange": Mapping[str, Size],
            }
        ),
    ]
    peak_memory: tuple[Size, ...]
    links: tuple[Number, ...]
    hosts: tuple[Number | None, ...]
    step_seconds: Mapping[Number, float]
    slow: Mapping[Number, str]

    @property
    def lost(self) -> list[int]:
        """The ranks whose share others compute."""
        return [rank for rank, host in enumerate(self.hosts) if host != rank]


@dataclass(frozen=True)
class Ended:
    """The cluster has ended. `input_error`: by bad input, so that beginning anew is no use."""

    error: Text
    input_error: bool


FRONT = Codec(Submit | Abort | Close)
ENGINE = Codec(Loading | Notice | Ready | Outputs | Stats | Ended)
