"""Control messages between leader and workers, encoded by `zmoe.codec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from zmoe.batch.plan import Plan
from zmoe.cluster.hosts import check_address
from zmoe.codec import Codec, Fields, MessageError, between, items, text
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.errors import InputError
from zmoe.exchange.keys import is_key
from zmoe.exchange.local import Endpoint
from zmoe.kernels.arithmetic import Arithmetic
from zmoe.placement.estimate import NodeResources
from zmoe.placement.types import Placement
from zmoe.recovery.messages import (
    Adopted,
    Evicted,
    Halted,
    Mesh,
    Opened,
    Quiesce,
    Suspect,
    View,
)
from zmoe.recovery.view import ClusterView

MAX_MESSAGE_BYTES = 4 << 20  # from the leader: several times the largest placement
MAX_REPORT_BYTES = 64 << 10  # from a worker
LONGEST_TEXT = 4000
MOST_NOTICES = 4


def _address(value: str) -> str:
    try:
        check_address(value, "")
    except InputError:
        return f"is {value[:40]!r}: not an IPv4 address"
    return ""


def _public_key(value: str) -> str:
    return "" if not value or is_key(value) else f"is {value[:60]!r}: not a public key"


def _four_or_none(value: tuple[float, ...]) -> str:
    return "" if len(value) in (0, 4) else f"has {len(value)} items: not 4, nor none"


Size = Annotated[int, between(0, 2**60)]  # bytes
Counter = Annotated[int, between(0, 2**32 - 1)]
Session = Annotated[int, between(0, 2**63 - 1)]
Rank = Annotated[int, between(0, 63)]
Port = Annotated[int, between(1, 65535)]
Seconds = Annotated[float, between(0, 1e9)]
Word = Annotated[str, text(200)]
Text = Annotated[str, text(LONGEST_TEXT)]
Address = Annotated[str, _address]
Key = Annotated[str, _public_key]
Listener = Annotated[
    Endpoint, Fields({"host": Address, "data_port": Port, "control_port": Port, "key": Key})
]
Resources = Annotated[
    NodeResources,
    Fields({"memory": Size, "limit": Size | None, "speed": Annotated[int, between(0, 2**20)]}),
]


def one_line(text: str) -> str:
    """`text` as a Text may hold it: printable, in one line, not too long."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:LONGEST_TEXT]


# ---- the messages ------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """Worker to leader: I am here. It is sent before there is a session.

    Of a Join of another protocol only the first four fields are read, so that the
    leader can name both versions. `token` is what the leader wrote to the
    worker's standard input, empty for a worker that was started by hand.
    """

    protocol: Counter
    rank: Rank
    version: Word
    host: Word
    token: Word


@dataclass(frozen=True)
class Setup:
    """Leader to worker: what will run. `model` is a folder or a hub name.

    `memory_limit`: bytes that a node may take whose own flags don't say. `ports`: of which a
    node takes those that it listens at. `keep_alive`: seconds for which a node waits for another
    leader when this one is gone.
    """

    nodes: Annotated[int, between(2, 64)]
    model: Text
    engine: EngineConfig
    timing: Timing
    memory_limit: Size | None
    ports: tuple[Port, Port] | None = None
    keep_alive: Seconds = 0.0


@dataclass(frozen=True)
class Program:
    """Leader to worker, instead of Setup: run the program that you were started with."""

    nodes: Annotated[int, between(2, 64)]
    timing: Timing
    ports: tuple[Port, Port] | None = None


@dataclass(frozen=True)
class Listening:
    """Worker to leader, instead of Hello: where my data sockets listen."""

    endpoint: Listener


@dataclass(frozen=True)
class Ended:
    """Worker to leader: my program has ended with this exit code, after so many `collectives`;
    again where MLX still calls some.
    """

    code: Annotated[int, between(0, 255)]
    collectives: Size


@dataclass(frozen=True)
class Finished:
    """Leader to worker: what Ended says with exit code 0, of the program of `rank`."""

    rank: Rank
    collectives: Size


@dataclass(frozen=True)
class Hello:
    """Worker to leader: what I am and have, and where my data sockets listen."""

    fingerprint: Word
    dtype: Word
    quantization: Word
    isa: Word
    arithmetic: Arithmetic
    resources: Resources
    endpoint: Listener


@dataclass(frozen=True)
class Place:
    """Leader to worker: who owns what. Nobody has checked yet that it fits the model."""

    placement: Placement


@dataclass(frozen=True)
class Endpoints:
    """Leader to worker: every node's data sockets, by rank.

    `isa` names the instruction set that every node's kernels use, so that all
    of them round alike.
    """

    isa: Word
    nodes: Annotated[tuple[Listener, ...], items(2, 64)]


@dataclass(frozen=True)
class Enter:
    """Leader to worker, instead of Place and Endpoints: the others run already. Load, have caches
    of so many blocks (0: they are not paged), say Ready, and wait for the view in which you are.
    `figures`: what is known of the links, as zmoe.exchange.algorithm.Choice has it. With `divides`
    load nothing yet: that view divides the weights anew.
    """

    placement: Placement
    isa: Word
    blocks: Annotated[int, between(0, 2**31 - 1)]
    figures: Annotated[tuple[float, ...], _four_or_none]
    divides: bool


@dataclass(frozen=True)
class Loading:
    """Worker to leader: bytes of my share read so far."""

    done: Size
    total: Size


@dataclass(frozen=True)
class Ready:
    """Worker to leader: my share of the placement with this digest is loaded, after `seconds`.

    `notices` are lines for the user.
    """

    seconds: Seconds
    placement: Word
    notices: Annotated[tuple[Text, ...], items(0, MOST_NOTICES)]


@dataclass(frozen=True)
class Cache:
    """Leader to worker: our caches are paged, and every node's have this many blocks."""

    blocks: Annotated[int, between(1, 2**31 - 1)]


@dataclass(frozen=True)
class LoadPrefix:
    """Leader to worker: read the prompt cache `path` of this digest into `places`: blocks, for the
    first ones of it, or on MLX's caches the number of a sequence. Where layers are recurrent, the
    number of one comes before all blocks.
    """

    path: Text
    digest: Word
    places: Annotated[tuple[Counter, ...], items(1, 2**19)]


@dataclass(frozen=True)
class Loaded:
    """Worker to leader: I have read what LoadPrefix names."""


@dataclass(frozen=True)
class Step:
    """Leader to worker: run this plan. Nobody has checked yet that it goes with the caches."""

    plan: Plan


@dataclass(frozen=True)
class AskMemory:
    """Leader to worker: report your peak memory."""


@dataclass(frozen=True)
class Memory:
    """Worker to leader: peak resident bytes so far."""

    peak_memory: Size


@dataclass(frozen=True)
class AskTimes:
    """Leader to worker: tell how long your steps take. The answer to the last `round` counts."""

    round: Counter


@dataclass(frozen=True)
class Times:
    """Worker to leader: in so many `steps` since I was asked last I have computed for so many
    `seconds`; the rest I have waited for others.
    """

    round: Counter
    steps: Counter
    seconds: Seconds


@dataclass(frozen=True)
class Stop:
    """Leader to worker: the run is over. `error` is empty when all is well.

    Outside of a session it is the answer to a Join that is refused.
    """

    error: Text


@dataclass(frozen=True)
class Failed:
    """Worker to leader: I can't go on.

    `input_error`: it is bad input (exit 2). `lost`: the rank whose loss is the
    reason, noticed at `layer` (None: between layers) and `step`.
    """

    error: Text
    input_error: bool
    lost: Rank | None
    layer: Counter | None
    step: Counter


# ---- of the recovery (zmoe.recovery.messages) ------------------------------------------

_Hosted = Annotated[tuple[Listener, ...], items(1, 64)]  # of the shards of a node, ascending
_View = Annotated[
    ClusterView,
    Fields(
        {
            "epoch": Counter,
            "session": Session,
            "hosts": Annotated[tuple[Rank, ...], items(1, 64)],
            "nodes": Annotated[tuple[Rank, ...], items(1, 64)],
            "base": Counter,
            "fresh": bool,
            "slices": Annotated[tuple[tuple[Size, Size], ...], items(0, 64)],
        }
    ),
]
_SUSPECT = Fields({"epoch": Counter, "step": Counter, "lost": Rank})
_MESH = Fields({"epoch": Counter, "endpoints": Annotated[tuple[_Hosted, ...], items(1, 64)]})

Message = (
    Join
    | Setup
    | Program
    | Listening
    | Ended
    | Finished
    | Hello
    | Place
    | Endpoints
    | Enter
    | Loading
    | Ready
    | Cache
    | LoadPrefix
    | Loaded
    | Step
    | AskMemory
    | Memory
    | AskTimes
    | Times
    | Stop
    | Failed
    | Annotated[Suspect, _SUSPECT]
    | Annotated[Quiesce, Fields({"epoch": Counter})]
    | Annotated[Halted, Fields({"epoch": Counter, "done": Counter})]
    | Annotated[View, Fields({"view": _View})]
    | Annotated[Opened, Fields({"epoch": Counter, "endpoint": _Hosted})]
    | Annotated[Mesh, _MESH]
    | Annotated[Adopted, Fields({"epoch": Counter})]
    | Annotated[Evicted, Fields({"reason": Text})]
)
_CODEC = Codec(Message)
_JOIN_FIELDS_OF_ALL_VERSIONS = 4


encode = _CODEC.encode


def decode(frame: bytes) -> Message:
    """The message in `frame`; raises MessageError."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise MessageError(f"{len(frame)} bytes are more than any message has")
    message: Message = _CODEC.decode(frame, _adapt)
    return message


def _adapt(name: str, values: list[Any]) -> list[Any]:
    """Of a Join of another protocol only the fields that all versions have."""
    if name == "Join" and len(values) >= _JOIN_FIELDS_OF_ALL_VERSIONS and _is_foreign(values[0]):
        return [*values[:_JOIN_FIELDS_OF_ALL_VERSIONS], ""]
    return values


def _is_foreign(protocol: object) -> bool:
    return isinstance(protocol, int) and protocol != PROTOCOL_VERSION
