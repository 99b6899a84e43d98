"""Control messages between leader and workers: msgpack arrays, strictly typed.

A message is `[name, field, ...]` in the order of the dataclass. What does not
fit (an unknown name, a missing or extra field, a wrong type) is a
`MessageError`; nothing of it is used.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Union

import msgpack

from zmoe.types import Placement

MAX_MESSAGE_BYTES = 16 << 20


class MessageError(ValueError):
    """Bytes that are no message of this protocol."""


@dataclass(frozen=True)
class Join:
    """Worker to leader: I am here. First message, understood by every version."""

    protocol: int
    rank: int
    version: str
    host: str


@dataclass(frozen=True)
class Setup:
    """Leader to worker: what will run. `model` is a folder or a hub name.

    `memory_limit`: bytes that a node may take whose own flags don't say.
    """

    session: int
    nodes: int
    model: str
    prefill_chunk: int
    max_kv_size: int | None
    compute: str
    activations: str
    wire_dtype: str
    schedule: str
    policy: str
    memory_limit: int | None
    peer_timeout: float
    grace_timeout: float
    load_timeout: float
    join_timeout: float

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= 64 or not 0 <= self.session < 2**64:
            raise MessageError(f"Setup for {self.nodes} nodes, session {self.session}")


@dataclass(frozen=True)
class Hello:
    """Worker to leader: what I am and have, and where my data sockets listen.

    `machine` to `speed` are those of zmoe.planner.given.Offer.
    """

    protocol: int
    fingerprint: str
    dtype: str
    quantization: str
    isa: str
    machine: str
    memory: int
    memory_limit: int | None
    speed: int
    host: str
    data_port: int
    control_port: int

    def __post_init__(self) -> None:
        sizes = (self.memory, self.memory_limit or 0)
        if not all(0 <= size < 2**60 for size in sizes) or not 0 <= self.speed < 2**20:
            raise MessageError(f"Hello with memory {sizes} and speed {self.speed}")


@dataclass(frozen=True)
class Place:
    """Leader to worker: who owns what; the fields are those of zmoe.types.Placement."""

    experts: int
    owned: list[list[list[int]]]
    slices: list[list[int]]
    speeds: list[int]

    def __post_init__(self) -> None:
        if any(len(part) != 2 for part in self.slices):
            raise MessageError("Place with slices that have no two ends")

    @classmethod
    def of(cls, placement: Placement) -> Place:
        return cls(
            placement.experts,
            [[list(ids) for ids in layer] for layer in placement.owned],
            [list(part) for part in placement.slices],
            list(placement.speeds),
        )

    def placement(self, nodes: int) -> Placement:
        """The placement for `nodes` nodes, not yet checked."""
        return Placement(
            nodes,
            self.experts,
            tuple(tuple(tuple(ids) for ids in layer) for layer in self.owned),
            tuple((start, end) for start, end in self.slices),
            tuple(self.speeds),
        )


@dataclass(frozen=True)
class Mesh:
    """Leader to worker: every node's data sockets, by rank.

    `isa` names the instruction set that every node's kernels use, so that all
    of them round alike.
    """

    isa: str
    hosts: list[str]
    data_ports: list[int]
    control_ports: list[int]


@dataclass(frozen=True)
class Loading:
    """Worker to leader: bytes of my share read so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """Worker to leader: my share of the placement with this digest is loaded, after `seconds`."""

    seconds: float
    placement: str


@dataclass(frozen=True)
class Step:
    """Leader to worker: one forward pass over `tokens`; `reset` starts a new sequence."""

    step: int
    reset: bool
    tokens: list[int]


@dataclass(frozen=True)
class AskMemory:
    """Leader to worker: report your peak memory."""


@dataclass(frozen=True)
class Memory:
    """Worker to leader: peak resident bytes so far."""

    peak_memory: int


@dataclass(frozen=True)
class Stop:
    """Leader to worker: the run is over. `error` is empty when all is well."""

    error: str


@dataclass(frozen=True)
class Failed:
    """Worker to leader: I can't go on.

    `input_error`: it is bad input (exit 2). `lost`: the rank whose loss is the
    reason, noticed at `layer` (None: between layers) and `step`.
    """

    error: str
    input_error: bool
    lost: int | None
    layer: int | None
    step: int


Message = (
    Join
    | Setup
    | Hello
    | Place
    | Mesh
    | Loading
    | Ready
    | Step
    | AskMemory
    | Memory
    | Stop
    | Failed
)
_TYPES: dict[str, type[Any]] = {t.__name__: t for t in typing.get_args(Message)}
_HINTS = {name: typing.get_type_hints(t) for name, t in _TYPES.items()}


def encode(message: Message) -> bytes:
    """One frame's bytes."""
    values = [getattr(message, f.name) for f in dataclasses.fields(message)]
    return bytes(msgpack.packb([type(message).__name__, *values]))


def decode(frame: bytes) -> Message:
    """The message in `frame`; raises MessageError."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise MessageError(f"{len(frame)} bytes are more than any message has")
    try:
        parts = msgpack.unpackb(frame, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MessageError("not msgpack") from error
    if not isinstance(parts, list) or not parts or not isinstance(parts[0], str):
        raise MessageError("not a message")
    name, values = parts[0], parts[1:]
    if name not in _TYPES:
        raise MessageError(f"unknown message {name[:40]!r}")
    fields = dataclasses.fields(_TYPES[name])
    if len(values) != len(fields):
        raise MessageError(f"{name} has {len(values)} fields instead of {len(fields)}")
    for field, value in zip(fields, values):
        if not _fits(value, _HINTS[name][field.name]):
            raise MessageError(f"{name}.{field.name} has the wrong type")
    message: Message = _TYPES[name](*values)
    return message


def _fits(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is Union:
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if origin is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(v, item) for v in value)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
