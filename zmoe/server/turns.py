"""From a conversation in pieces, as two of the APIs have it, to the messages of a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


class Turns:
    """Collects what is said and done. What one side says in several pieces becomes one message,
    since many templates want the sides to alternate.

    `open_calls` are the ids of calls that have no result, in order.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []  # with lists of texts
        self.open_calls: dict[str, None] = {}

    def add_text(self, role: Role, text: str) -> None:
        """Something that is said."""
        self._turn(role)["content"].append(text)

    def add_reasoning(self, text: str) -> None:
        """What the model thought before it said or did what follows."""
        self._turn("assistant").setdefault("reasoning_content", []).append(text)

    def add_call(self, id: str, name: str, arguments: Mapping[str, Any]) -> None:
        """A call that the model made."""
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn("assistant").setdefault("tool_calls", []).append(call)
        self.open_calls[id] = None

    def add_result(self, id: str, text: str) -> None:
        """What a call gave; it must be an open one."""
        del self.open_calls[id]
        self._messages.append({"role": "tool", "tool_call_id": id, "content": [text]})

    def messages(self) -> list[dict[str, Any]]:
        """The messages."""
        texts = ("content", "reasoning_content")
        return [
            message | {name: "\n".join(message[name]) for name in texts if name in message}
            for message in self._messages
        ]

    def _turn(self, role: Role) -> dict[str, Any]:
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]
