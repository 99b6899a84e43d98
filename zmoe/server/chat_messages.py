"""The messages of a chat, as OpenAI's API has them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from zmoe.server.blocks import listed
from zmoe.server.errors import invalid
from zmoe.server.fields import refused
from zmoe.server.front import Front
from zmoe.server.http import Body
from zmoe.server.prompts import Prompt
from zmoe.server.tools import Tool

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
_TEXTS = ("text", "refusal")
_as_list = listed("text", "parts")


class Part(Body):
    """A part of a message's content."""

    type: str
    text: str = ""
    refusal: str = ""
    prompt_cache_breakpoint: Any = None  # the prefix cache needs no such hints

    @field_validator("type", mode="after")
    @classmethod
    def _is_text(cls, given: str) -> str:
        if given not in _TEXTS:
            raise refused(f"{given!r} is not supported: the model takes text only, no images")
        return given


def _parts(given: Any) -> Any:
    parts = _as_list(given)
    for at, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXTS:
            raise refused(f"has a part {at} of type {kind!r}: the model takes text only, no images")
    return parts


class CalledFunction(Body):
    """A function that the model has called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class Called(Body):
    """A call in a message of the model's."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int = 0  # that of a stream's deltas, which some clients send back


class ChatMessage(Body):
    """A message. Those at the end change no prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part] | None, BeforeValidator(_parts)] = None
    name: str | None = None
    tool_calls: list[Called] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Any = None
    annotations: Any = None


class ChatPrompt(Body):
    """What the prompt of a chat is made of."""

    messages: list[ChatMessage]
    tools: list[Tool] = Field(default_factory=list)
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    async def prompt_of_chat(self, front: Front, *, with_tools: bool) -> Prompt:
        """The prompt. Raises ApiError."""
        messages, kwargs = for_template(self.messages), dict(self.chat_template_kwargs)
        if self.continue_final_message and messages[-1]["role"] != "assistant":
            raise invalid("continue_final_message", "needs a last message of the role assistant")
        if self.add_generation_prompt is self.continue_final_message:
            wanted = str(not self.continue_final_message).lower()
            raise invalid("add_generation_prompt", f"must be {wanted} for such messages")
        if self.reasoning_effort is not None:
            kwargs |= front.prompts.kwargs_of_effort(self.reasoning_effort)
        return await front.apart(
            front.prompts.of_chat,
            messages,
            tools=self.tools_for_template() if with_tools else None,
            kwargs=kwargs,
            continue_last=self.continue_final_message,
        )

    def tools_for_template(self) -> list[dict[str, Any]]:
        """The tools as the client has described them."""
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates take them. Raises ApiError."""
    if not messages:
        raise invalid("messages", "is empty")
    return [_for_template(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _for_template(message: ChatMessage, where: str) -> dict[str, Any]:
    is_answer = message.role == "assistant"
    if message.content is None and not (is_answer and message.tool_calls):
        raise invalid(f"{where}.content", "is missing")
    if message.role == "tool" and message.tool_call_id is None:
        raise invalid(f"{where}.tool_call_id", "is missing")
    for field in ("tool_calls", "reasoning_content"):
        if getattr(message, field) and not is_answer:
            raise invalid(f"{where}.{field}", f"does not belong to the role {message.role}")
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "".join(part.text or part.refusal for part in message.content or ()),
    }
    for field in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, field) is not None:
            found[field] = getattr(message, field)
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"{where}.tool_calls[{at}]"),
                },
            }
            for at, call in enumerate(message.tool_calls)
        ]
    return found


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise invalid(f"{where}.function.arguments", "is no JSON object")
    return found
