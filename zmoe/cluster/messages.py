"""Control messages between leader and workers: msgpack arrays, strictly typed.

A message is `[name, field, ...]` in the order of the dataclass; a dataclass within it is
an array, too. What does not fit (an unknown name, a missing or extra field, a wrong type,
a value out of range) is a `MessageError`, and no part of it is used. The annotations below
say what each field may hold; the limits of settings are checked besides.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack

from zmoe.batch.plan import Plan
from zmoe.cluster.hosts import check_address
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Setting, Timing
from zmoe.errors import InputError, SettingError
from zmoe.exchange.local import Endpoint
from zmoe.kernels.arithmetic import Arithmetic
from zmoe.placement.estimate import NodeResources
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


@dataclass(frozen=True, eq=False)
class _Fields:
    """Annotates a dataclass of another room: what some of its fields may hold."""

    hints: dict[str, Any]


Size = Annotated[int, _between(0, 2**60)]  # bytes
Whole = Annotated[int, _between(-(2**31), 2**31 - 1)]  # checked further by who uses it
Counter = Annotated[int, _between(0, 2**32 - 1)]
Rank = Annotated[int, _between(0, 63)]
Port = Annotated[int, _between(1, 65535)]
Seconds = Annotated[float, _between(0, 1e9)]
Word = Annotated[str, _text(200)]
Text = Annotated[str, _text(LONGEST_TEXT)]
Address = Annotated[str, _address]
Listener = Annotated[Endpoint, _Fields({"host": Address, "data_port": Port, "control_port": Port})]
Resources = Annotated[
    NodeResources,
    _Fields({"memory": Size, "limit": Size | None, "speed": Annotated[int, _between(0, 2**20)]}),
]
_UNLESS_ANNOTATED: dict[Any, Any] = {int: Whole, float: Seconds, str: Word}


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
    engine: EngineConfig
    timing: Timing
    memory_limit: Size | None


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
    nodes: Annotated[tuple[Listener, ...], _items(2, 64)]


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
class Cache:
    """Leader to worker: our caches are paged, and every node's have this many blocks."""

    blocks: Annotated[int, _between(1, 2**31 - 1)]


@dataclass(frozen=True)
class LoadPrefix:
    """Leader to worker: read the prompt cache `path` of this digest, the first blocks of it into
    `blocks`.
    """

    path: Text
    digest: Word
    blocks: Annotated[tuple[Counter, ...], _items(1, 2**19)]


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
    | Endpoints
    | Loading
    | Ready
    | Cache
    | LoadPrefix
    | Loaded
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
    parts = [type(message).__name__, *_values(message)]
    return bytes(msgpack.packb(parts, default=_values))


def _values(record: Any) -> list[Any]:
    """The fields of a dataclass, in order."""
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


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
    message: Message = _READERS[name](values)
    return message


def _is_foreign(protocol: object) -> bool:
    return isinstance(protocol, int) and protocol != PROTOCOL_VERSION


# ---- from annotations to readers -----------------------------------------------------

Reader = Callable[[Any], Any]  # from what msgpack gives to a field's value; raises MessageError


def _reader(hint: Any, where: str) -> Reader:
    """The reader of the field `where`, which has this annotation."""
    hint = _UNLESS_ANNOTATED.get(hint, hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, mark = arguments
        if isinstance(mark, Setting):  # whose limit its dataclass checks
            return _reader(kind, where)
        if isinstance(mark, _Fields):
            return _record_reader(kind, where, mark.hints)
        if typing.get_origin(kind) in (list, tuple):
            return _list_reader(kind, where, mark)
        return _plain_reader(kind, where, mark)
    if origin in (types.UnionType, typing.Union):
        read = _reader(arguments[0], where)
        return lambda value: None if value is None else read(value)
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return _list_reader(hint, where)
    if origin is tuple:
        return _list_reader(hint, where, _items(len(arguments), len(arguments)))
    if dataclasses.is_dataclass(hint):
        return _record_reader(hint, where, {})
    return _plain_reader(hint, where)


def _plain_reader(kind: type, where: str, check: Check = lambda _: "") -> Reader:
    allowed = (int, float) if kind is float else (kind,)  # bool, say, is no int here

    def read(value: Any) -> Any:
        if type(value) not in allowed:
            raise MessageError(f"{where} has the wrong type")
        if fault := check(value):
            raise MessageError(f"{where} {fault}")
        return value

    return read


def _list_reader(hint: Any, where: str, check: Check = lambda _: "") -> Reader:
    """The reader of a list or tuple of like items, which looks at the items after `check`."""
    read_list = _plain_reader(list, where, check)
    kind, read_item = typing.get_origin(hint), _reader(typing.get_args(hint)[0], where)
    return lambda value: kind(map(read_item, read_list(value)))


def _record_reader(kind: Any, where: str, hints: dict[str, Any]) -> Reader:
    """The reader of a dataclass; `hints` are other annotations for some of its fields."""
    hints = {**typing.get_type_hints(kind, include_extras=True), **hints}
    readers = [_reader(hint, f"{where}.{name}") for name, hint in hints.items()]
    read_list = _plain_reader(list, where)

    def read(values: Any) -> Any:
        if len(read_list(values)) != len(readers):
            raise MessageError(f"{where} has {len(values)} fields instead of {len(readers)}")
        fields = [read_field(value) for read_field, value in zip(readers, values)]
        try:
            return kind(*fields)
        except SettingError as error:
            raise MessageError(f"{where}.{error}") from error

    return read


_READERS = {name: _record_reader(kind, name, {}) for name, kind in _TYPES.items()}
