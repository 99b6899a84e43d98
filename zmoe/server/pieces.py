"""What a choice generates as a sequence of blocks: thoughts, text, calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from zmoe.server.calls import ToolCall
from zmoe.server.generation import Choice

Event = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """More of a text; one of another kind than the last piece begins a new block."""

    kind: Literal["reasoning", "text"]
    text: str


class Teller(Protocol):
    """Makes events of what is generated, and the whole answer."""

    def begin(self) -> list[Event]:
        """The engine has taken the request."""

    def add(self, piece: Piece | ToolCall) -> list[Event]:
        """More has been generated."""

    def end(self) -> list[Event]:
        """All has been generated."""


async def events_of(choice: Choice, teller: Teller) -> AsyncGenerator[Event]:
    """Yield the events that `teller` makes of `choice`. Raises ApiError."""
    begun = False
    async with aclosing(_pieces(choice)) as steps:
        async for step in steps:
            for event in [] if begun else teller.begin():
                yield event
            begun = True
            for piece in step:
                for event in teller.add(piece):
                    yield event
    for event in teller.end():
        yield event


async def _pieces(choice: Choice) -> AsyncGenerator[list[Piece | ToolCall]]:
    """Yield what each step adds, which may be nothing.

    Templates put white space around thoughts and calls, which is none of the text.
    """
    last, held = "", ""  # the kind of the last piece, and white space that may begin a text
    async with aclosing(choice):
        async for delta in choice:
            found: list[Piece | ToolCall] = []
            if delta.reasoning:
                found.append(Piece("reasoning", delta.reasoning))
                last = "reasoning"
            held += delta.content
            if held and (last == "text" or not held.isspace()):
                found.append(Piece("text", held if last in ("", "text") else held.lstrip()))
                last, held = "text", ""
            for call in delta.tool_calls:
                found.append(call)
                last, held = "call", ""
            yield found
