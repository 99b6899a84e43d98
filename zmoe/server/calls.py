"""Calls that a model makes, and how forced ones are read while they are written."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_HEAD = re.compile(r'[\[}, ]*\{"name": "([^"]*)", "arguments": ')
_MARK = re.compile(r'[{}"]|\\.?', re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call, or a piece of one; `arguments` is a JSON object as text, or a piece of that.

    A piece that does not begin a call goes on with the last one.
    """

    id: str
    name: str
    arguments: str
    begins: bool = True
    ends: bool = True


def add_calls(calls: list[ToolCall], more: Iterable[ToolCall]) -> None:
    """Append `more` to `calls`; what goes on with the last one becomes a part of it."""
    for piece in more:
        if piece.begins or not calls:
            calls.append(piece)
        else:
            last = calls[-1]
            arguments = last.arguments + piece.arguments
            calls[-1] = ToolCall(last.id, last.name, arguments, last.begins, piece.ends)


def parsed_call(call: Mapping[str, Any]) -> ToolCall:
    """A call as mlx-lm's parsers give it. Raises KeyError and the like."""
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call.get("id") or _new_id()), str(call["name"]), arguments)


class ForcedCalls:
    """Reads the JSON array that calls_grammar() describes, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._head = ""  # of a call, as far as it has come
        self._call: tuple[str, str] | None = None  # id and name of the one that is being written
        self._depth, self._in_string, self._is_escaped = 0, False, False

    def read(self, text: str) -> list[ToolCall]:
        """The pieces of calls that `text` adds."""
        found: list[ToolCall] = []
        while text:
            begins = self._call is None
            if self._call is None:
                self._head += text
                head = _HEAD.match(self._head)
                if head is None:
                    break
                text, self._head = self._head[head.end() :], ""
                self._call = (_new_id(), head[1])
            end = self._end(text)
            found.append(ToolCall(*self._call, text[:end], begins, end is not None))
            if end is None:
                break
            self._call, text = None, text[end:]
        return found

    def _end(self, text: str) -> int | None:
        """Where the object ends in more of its text; None where that is further on."""
        if self._is_escaped and text:
            text, self._is_escaped = " " + text[1:], False
        for mark in _MARK.finditer(text):
            if mark[0][0] == "\\":
                self._is_escaped = mark[0] == "\\"  # what is escaped comes with the next piece
            elif mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark[0] == "{" else -1
                if self._depth == 0:
                    return mark.end()
        return None


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"
