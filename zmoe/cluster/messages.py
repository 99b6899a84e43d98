"""Control messages between leader and workers: msgpack arrays, strictly typed.

A message is `[name, field, ...]` in the order of the dataclass. What does not
fit (an unknown name, a missing or extra field, a wrong type, a value out of
range) is a `MessageError`; nothing of it is used. The annotations below say
what each field may hold.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Union

import msgpack

from zmoe.cluster.hosts import check_address
from zmoe.config import PROTOCOL_VERSION
from zmoe.errors import InputError
from zmoe.placement.types import Placement

MAX_MESSAGE_BYTES = 4 << 20  # from the leader: several times the largest placement
MAX_REPORT_BYTES = 64 << 10  # from a worker
LONGEST_TEXT = 4000


class MessageError(ValueError):
    """Bytes that are no message of this protocol."""


# ---- what fields may hold -------------------------------------------------------

Check = Callable[[Any], str]  # what is wrong with a value, or ""


def _between(least: float, most: float) -> Check:
    # The negation also catches NaN.
    return lambda value: "" if least <= value <= most else f"is {value}: not in {least} to {most}"


def _items(least: int, most: int) -> Check:
    return lambda value: (
        "" if least <= len(value) <= most else f"has {len(value)} items: not {least} to {most}"
    )


def _text(most: int) -> Check:
    def check(value: str) -> str:
        if len(value) > most:
            return f"has {len(value)} characters: more than {most}"
        return "" if value.isprintable() else "has characters that cannot be printed"

    return check


def _address(value: str) -> str:
    try:
        check_address(value, "")
    except InputError:
        return f"is {value[:40]!r}: not an IPv4 address"
    return ""


Size = Annotated[int, _between(0, 2**60)]  # bytes
Whole = Annotated[int, _between(-(2**31), 2**31 - 1)]  # checked further by who uses it
Counter = Annotated[int, _between(0, 2**32 - 1)]
Rank = Annotated[int, _between(0, 63)]
Port = Annotated[int, _between(1, 65535)]
Seconds = Annotated[float, _between(0, 1e9)]
Word = Annotated[str, _text(200)]
Text = Annotated[str, _text(LONGEST_TEXT)]
Address = Annotated[str, _address]
PerNode = _items(2, 64)


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

    `memory_limit`: bytes that a node may take whose own flags don't say.
    """

    nodes: Annotated[int, _between(2, 64)]
    model: Text
    prefill_chunk: Whole
    max_kv_size: Whole | None
    compute: Word
    activations: Word
    wire_dtype: Word
    schedule: Word
    policy: Word
    memory_limit: Size | None
    peer_timeout: Seconds
    grace_timeout: Seconds
    load_timeout: Seconds
    join_timeout: Seconds


@dataclass(frozen=True)
class Hello:
    """Worker to leader: what I am and have, and where my data sockets listen.

    `compute` to `arithmetic` are those of zmoe.kernels.arithmetic.Arithmetic,
    `machine` to `speed` those of zmoe.placement.estimate.Offer.
    """

    fingerprint: Word
    dtype: Word
    quantization: Word
    isa: Word
    compute: Word
    device: Word
    mlx: Word
    mlx_lm: Word
    arithmetic: Word
    machine: Word
    memory: Size
    memory_limit: Size | None
    speed: Annotated[int, _between(0, 2**20)]
    host: Address
    data_port: Port
    control_port: Port


@dataclass(frozen=True)
class Place:
    """Leader to worker: who owns what; the fields are those of zmoe.placement.types.Placement."""

    experts: Whole
    owned: list[list[list[Whole]]]
    slices: list[Annotated[list[Whole], _items(2, 2)]]
    speeds: list[Whole]

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

    isa: Word
    hosts: Annotated[list[Address], PerNode]
    data_ports: Annotated[list[Port], PerNode]
    control_ports: Annotated[list[Port], PerNode]

    def __post_init__(self) -> None:
        if not len(self.hosts) == len(self.data_ports) == len(self.control_ports):
            raise MessageError("Mesh has lists of unequal lengths")


@dataclass(frozen=True)
class Loading:
    """Worker to leader: bytes of my share read so far."""

    done: Size
    total: Size


@dataclass(frozen=True)
class Ready:
    """Worker to leader: my share of the placement with this digest is loaded, after `seconds`."""

    seconds: Seconds
    placement: Word


@dataclass(frozen=True)
class Step:
    """Leader to worker: one forward pass over `tokens`; `reset` starts a new sequence."""

    step: Annotated[int, _between(1, 2**32 - 1)]
    reset: bool
    tokens: Annotated[list[Annotated[int, _between(0, 2**31 - 1)]], _items(1, 8192)]


@dataclass(frozen=True)
class AskMemory:
    """Leader to worker: report your peak memory."""


@dataclass(frozen=True)
class Memory:
    """Worker to leader: peak resident bytes so far."""

    peak_memory: Size


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
_JOIN_FIELDS_OF_ALL_VERSIONS = 4


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
    if name == "Join" and len(values) >= _JOIN_FIELDS_OF_ALL_VERSIONS and _is_foreign(values[0]):
        values = [*values[:_JOIN_FIELDS_OF_ALL_VERSIONS], ""]
    checks = _CHECKS[name]
    if len(values) != len(checks):
        raise MessageError(f"{name} has {len(values)} fields instead of {len(checks)}")
    for (field, check), value in zip(checks, values):
        if fault := check(value):
            raise MessageError(f"{name}.{field} {fault}")
    message: Message = _TYPES[name](*values)
    return message


def _is_foreign(protocol: object) -> bool:
    return isinstance(protocol, int) and protocol != PROTOCOL_VERSION


def _check_of(hint: Any) -> Check:
    """The check that a field with this annotation has to pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, further = _check_of(arguments[0]), arguments[1]
        return lambda value: kind(value) or further(value)
    if origin is types.UnionType or origin is Union:
        choices = [_check_of(choice) for choice in arguments]

        def check_choices(value: object) -> str:
            faults = [check(value) for check in choices]
            return "" if "" in faults else faults[0]

        return check_choices
    if origin is list:
        check_item = _check_of(arguments[0])

        def check_list(value: object) -> str:
            if not isinstance(value, list):
                return "has the wrong type"
            return next(filter(None, map(check_item, value)), "")

        return check_list
    allowed = (int, float) if hint is float else (hint,)  # bool, say, is no int here
    return lambda value: "" if type(value) in allowed else "has the wrong type"


_CHECKS = {
    name: [
        (field, _check_of(hint))
        for field, hint in typing.get_type_hints(kind, include_extras=True).items()
    ]
    for name, kind in _TYPES.items()
}
