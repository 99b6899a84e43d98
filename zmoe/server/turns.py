"""From a conversation in pieces, as two of the APIs have it, to the messages of a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


class Turns:
    """Collects `messages`. What one side says in several pieces becomes one message, since many
    templates want the sides to alternate.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def add_text(self, role: Role, text: str) -> None:
        """Something that is said."""
        message = self._turn(role)
        message["content"] = "\n".join(filter(None, (message["content"], text)))

    def add_reasoning(self, text: str) -> None:
        """What the model thought before it said or did what follows."""
        message = self._turn("assistant")
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def add_call(self, id: str, name: str, arguments: Mapping[str, Any]) -> None:
        """A call that the model made."""
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn("assistant").setdefault("tool_calls", []).append(call)

    def add_result(self, id: str, text: str) -> None:
        """What a call of the model's gave."""
        self.messages.append({"role": "tool", "tool_call_id": id, "content": text})

    def open_calls(self) -> set[str]:
        """The ids of calls that have no result."""
        made = {call["id"] for m in self.messages for call in m.get("tool_calls", ())}
        return made - {m["tool_call_id"] for m in self.messages if m["role"] == "tool"}

    def _turn(self, role: Role) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]
