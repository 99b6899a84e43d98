"""Typed messages between processes: msgpack arrays, read strictly.

A message is `[name, field, ...]` in the order of its dataclass; a dataclass within it is an
array, too. What does not fit (an unknown name, a missing or extra field, a wrong type, a value
out of range) is a `MessageError`, and no part of it is used. The annotations of the dataclasses
say what each field may hold; the limits of settings are checked besides.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack

from zmoe.config import Setting
from zmoe.errors import SettingError


class MessageError(ValueError):
    """Bytes that are no message of the protocol."""


# ---- what fields may hold -------------------------------------------------------

Check = Callable[[Any], str]  # what is wrong with a value, or ""


@dataclass(frozen=True, eq=False)
class between:
    """Checks that a number is in a range; NaN is in none."""

    least: float
    most: float

    def __call__(self, value: float) -> str:
        inside = self.least <= value <= self.most
        return "" if inside else f"is {value}: not in {self.least} to {self.most}"


def items(least: int, most: int) -> Check:
    return lambda value: (
        "" if least <= len(value) <= most else f"has {len(value)} items: not {least} to {most}"
    )


def text(most: int) -> Check:
    def check(value: str) -> str:
        if len(value) > most:
            return f"has {len(value)} characters: more than {most}"
        return "" if value.isprintable() else "has characters that cannot be printed"

    return check


@dataclass(frozen=True, eq=False)
class Fields:
    """Annotates a dataclass of another room: what some of its fields may hold."""

    hints: dict[str, Any]


_UNLESS_ANNOTATED: dict[Any, Any] = {
    int: Annotated[int, between(-(2**31), 2**31 - 1)],  # checked further by who uses it
    float: Annotated[float, between(0, 1e9)],
    str: Annotated[str, text(200)],
}


class Codec:
    """The messages of one protocol, by the names of their dataclasses."""

    def __init__(self, messages: Any) -> None:
        """`messages` is the union of the dataclasses; Fields may annotate those of other rooms."""
        self._readers = dict[str, Reader]()
        for kind in typing.get_args(messages):
            hints = {}
            if typing.get_origin(kind) is Annotated:
                kind, mark = typing.get_args(kind)
                hints = mark.hints
            self._readers[kind.__name__] = _record_reader(kind, kind.__name__, hints)

    def encode(self, message: Any) -> bytes:
        """One frame's bytes."""
        parts = [type(message).__name__, *_values(message)]
        return bytes(msgpack.packb(parts, default=_values))

    def decode(
        self, frame: bytes, adapt: Callable[[str, list[Any]], list[Any]] | None = None
    ) -> Any:
        """The message in `frame`; raises MessageError.

        `adapt(name, values)` may change the fields before they are read.
        """
        try:
            parts = msgpack.unpackb(frame, strict_map_key=False)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise MessageError("not msgpack") from error
        if not isinstance(parts, list) or not parts or not isinstance(parts[0], str):
            raise MessageError("not a message")
        name, values = parts[0], parts[1:]
        if name not in self._readers:
            raise MessageError(f"unknown message {name[:40]!r}")
        return self._readers[name](adapt(name, values) if adapt is not None else values)


def _values(record: Any) -> list[Any]:
    """The fields of a dataclass, in order."""
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


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
        if isinstance(mark, Fields):
            return _record_reader(kind, where, mark.hints)
        if typing.get_origin(kind) in (list, tuple):
            return _list_reader(kind, where, mark)
        if kind is int and isinstance(mark, between):
            return _int_reader(where, mark)
        return _plain_reader(kind, where, mark)
    if origin in (types.UnionType, typing.Union):
        read = _reader(arguments[0], where)
        return lambda value: None if value is None else read(value)
    if origin is Mapping:
        key, value = (_reader(kind, where) for kind in arguments)
        read_map = _plain_reader(dict, where)
        return lambda found: {key(k): value(v) for k, v in read_map(found).items()}
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return _list_reader(hint, where)
    if origin is tuple:
        return _list_reader(hint, where, items(len(arguments), len(arguments)))
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
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


def _int_reader(where: str, limits: between) -> Reader:
    """As _plain_reader, but faster: a plan has hundreds of numbers."""
    least, most = limits.least, limits.most
    refuse = _plain_reader(int, where, limits)
    return lambda value: value if type(value) is int and least <= value <= most else refuse(value)


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
