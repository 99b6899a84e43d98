"""What a client asks of /v1/responses: its fields, and what they mean here."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, field_validator

from zmoe.server.ask import Ask
from zmoe.server.blocks import by_type, check_is_text, listed
from zmoe.server.errors import invalid
from zmoe.server.fields import refused
from zmoe.server.http import Body
from zmoe.server.tools import Function, check_names
from zmoe.server.turns import Turns

_MOST = 2**31 - 1


# ---- items ---------------------------------------------------------------------------


class TextPart(Body):
    """A part of a message. Those at the end come from answers, and change no prompt."""

    type: Literal["input_text", "output_text", "summary_text", "reasoning_text", "text"]
    text: str
    annotations: Any = None
    logprobs: Any = None

    @field_validator("type", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        others = ("input_image", "input_file", "input_audio")
        return check_is_text(given, others, "images or files")


_as_parts = listed("input_text", "parts")
Texts = Annotated[
    list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])
]


class Item(Body):
    """A part of the conversation. `id`, `status` and `phase` change no prompt."""

    id: str | None = None
    status: Any = None
    phase: Any = None


class MessageItem(Item):
    """Something that is said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts


class CallItem(Item):
    """A call that the model made; `arguments` is a JSON object as text."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, given: str) -> str:
        try:
            found = json.loads(given or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise refused("is no JSON object")
        return given or "{}"


class OutputItem(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: Texts


class ReasoningItem(Item):
    """What the model thought."""

    type: Literal["reasoning"]
    summary: list[TextPart] = Field(default_factory=list)
    content: list[TextPart] = Field(default_factory=list)
    encrypted_content: Any = None


AnyItem = Annotated[
    Annotated[MessageItem, Tag("type=message")]
    | Annotated[CallItem, Tag("type=function_call")]
    | Annotated[OutputItem, Tag("type=function_call_output")]
    | Annotated[ReasoningItem, Tag("type=reasoning")],
    by_type("expected message, function_call, function_call_output or reasoning"),
]


def _as_items(given: Any) -> Any:
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise refused("is neither a text nor a list of items")
    return [
        {"type": "message", **each} if isinstance(each, dict) and "role" in each else each
        for each in given
    ]


# ---- settings ------------------------------------------------------------------------


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False

    @field_validator("type", mode="before")
    @classmethod
    def _is_function(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "function":
            raise refused(f"is {given[:100]!r}: this server has functions of the client's only")
        return given


class FunctionName(Body):
    """Which function."""

    type: Literal["function"]
    name: str


class ToolChoice(Body):
    """Whether the model must call, and what."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    name: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: list[FunctionName] = Field(default_factory=list)


def _as_choice(given: Any) -> Any:
    if given in ("function", "allowed_tools"):
        raise refused("is a name: expected an object with that type")
    return {"type": given} if isinstance(given, str) else given


class TextFormat(Body):
    """The form of the answer; `strict` or not, the answer keeps to the schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool = False


class TextConfig(Body):
    """What the answer is like."""

    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["medium"] = "medium"


class Reasoning(Body):
    """How much the model thinks. Thoughts are told in full, instead of a summary."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] = "auto"
    mode: Literal["standard"] = "standard"


class StreamOptions(Body):
    """What a stream tells besides."""

    include_obfuscation: Literal[False] = False


class ResponsesRequest(Body):
    """A prompt, and how it is answered. Those at the end change no answer."""

    model: str | None = None
    input: Annotated[
        list[AnyItem], BeforeValidator(_as_items, json_schema_input_type=str | list[AnyItem])
    ] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] = Field(default_factory=list)
    tool_choice: Annotated[
        ToolChoice, BeforeValidator(_as_choice, json_schema_input_type=str | ToolChoice)
    ] = ToolChoice(type="auto")
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = Field(None, ge=1, le=_MOST)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: bool = True
    background: Literal[False] = False
    truncation: Literal["auto", "disabled"] = "disabled"
    top_logprobs: Literal[0] = 0
    include: list[Literal["reasoning.encrypted_content"]] = Field(default_factory=list)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    max_tool_calls: int | None = Field(None, ge=1, le=_MOST)  # of built-in tools, of which none is
    service_tier: Literal["auto", "default", "flex", "priority"] = "auto"
    user: Any = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    client_metadata: Any = None

    def ask(self, earlier: list[AnyItem]) -> Ask:
        """What is asked, behind `earlier` items of the conversation. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is for a stream, which was not asked for")
        choice, form, effort = self.tool_choice, self.text.format, self.reasoning.effort
        check_names([tool.name for tool in self.tools], "tools[{}].name")
        named = self._named()
        allowed = named if choice.type == "allowed_tools" else [tool.name for tool in self.tools]
        must = choice.type in ("required", "function") or choice.mode == "required"
        if must and not self.tools:
            raise invalid("tool_choice", "asks for a call, and there are no tools")
        if form.type == "json_schema" and form.schema_ is None:
            raise invalid("text.format.schema", "is missing")
        schema = {"json_schema": form.schema_, "json_object": {"type": "object"}}.get(form.type)
        return Ask(
            self._messages(earlier),
            ("parameters", "text.format.schema", "input"),
            functions=[
                Function(
                    name=tool.name,
                    description=tool.description,
                    strict=tool.strict,
                    parameters=tool.parameters,
                )
                for tool in self.tools
                if choice.type != "none" and tool.name in allowed
            ],
            forced=(named or allowed) if must else (),
            one_call=not self.parallel_tool_calls or choice.type == "function",
            schema=schema,
            thinks=None if effort is None else effort != "none",
            effort=effort if effort != "none" else None,
        )

    def _named(self) -> list[str]:
        """The tools that `tool_choice` names."""
        choice, known = self.tool_choice, {tool.name for tool in self.tools}
        if bool(choice.name) != (choice.type == "function"):
            raise invalid("tool_choice.name", f"does not go with the type {choice.type}")
        if bool(choice.tools) != (choice.type == "allowed_tools"):
            raise invalid("tool_choice.tools", f"does not go with the type {choice.type}")
        named = [choice.name] if choice.name else [tool.name for tool in choice.tools]
        for name in named:
            if name not in known:
                raise invalid("tool_choice", f"names {name!r}, which is no tool")
        return named

    def _messages(self, earlier: list[AnyItem]) -> list[dict[str, Any]]:
        turns = Turns()
        if self.instructions:
            turns.add_text("system", self.instructions)
        for item in earlier:
            _add(turns, item, "previous_response_id")
        for at, item in enumerate(self.input):
            _add(turns, item, f"input[{at}]")
        if turns.open_calls:
            call = next(iter(turns.open_calls))
            raise invalid("input", f"lacks the function_call_output of {call!r}")
        if not self.input and not earlier:
            raise invalid("input", "is empty")
        return turns.messages()


def _add(turns: Turns, item: Any, where: str) -> None:
    if isinstance(item, MessageItem):
        role: Any = "system" if item.role == "developer" else item.role
        turns.add_text(role, _text(item.content))
    elif isinstance(item, CallItem):
        turns.add_call(item.call_id, item.name, json.loads(item.arguments))
    elif isinstance(item, OutputItem):
        if item.call_id not in turns.open_calls:
            raise invalid(f"{where}.call_id", f"is {item.call_id!r}: no call waits for it")
        turns.add_result(item.call_id, _text(item.output))
    elif isinstance(item, ReasoningItem):
        text = _text(item.content or item.summary)
        if text:
            turns.add_reasoning(text)


def _text(parts: list[TextPart]) -> str:
    return "\n".join(part.text for part in parts)
