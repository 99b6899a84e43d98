"""What a client of Anthropic's API asks: the fields of /v1/messages, and what they mean here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, field_validator

from zmoe.server.ask import Ask
from zmoe.server.blocks import by_type, check_is_text, listed
from zmoe.server.errors import invalid
from zmoe.server.fields import refused
from zmoe.server.http import Body
from zmoe.server.tools import Function, check_names
from zmoe.server.turns import Turns

MOST_STOPS = 64
_MOST = 2**31 - 1
# Begins Claude Code's first block, which differs in each request: no prefix would be found.
_BILLING = "x-anthropic-billing-header:"


# ---- content -------------------------------------------------------------------------


class CacheControl(Body):
    """Where a prefix to keep ends; this server finds prefixes by itself."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        return check_is_text(given, ("image", "document", "search_result"), "images or documents")


class ThinkingBlock(Body):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class Caller(Body):
    """Who made a call: the model itself."""

    type: Literal["direct"]


class ToolUseBlock(Body):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]
    caller: Caller = Caller(type="direct")
    cache_control: CacheControl | None = None


_as_blocks = listed("text", "blocks")
Texts = Annotated[
    list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])
]


class ToolResultBlock(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1)
    content: Texts = Field(default_factory=list)
    is_error: bool = False
    cache_control: CacheControl | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("type=text")]
    | Annotated[ThinkingBlock, Tag("type=thinking")]
    | Annotated[ToolUseBlock, Tag("type=tool_use")]
    | Annotated[ToolResultBlock, Tag("type=tool_result")],
    by_type("the model takes text, thinking, tool_use and tool_result, no images or documents"),
]
_MAY_SAY = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}


class Message(Body):
    """One side's turn, or a part of it."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])
    ]


# ---- settings ------------------------------------------------------------------------


class Tool(Body):
    """A function that the model may call. Those at the end change no answer."""

    type: Literal["custom"] = "custom"
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    description: str = ""
    input_schema: dict[str, Any]
    cache_control: CacheControl | None = None
    eager_input_streaming: bool = False
    strict: bool = False

    @field_validator("type", mode="before")
    @classmethod
    def _is_custom(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "custom":
            raise refused(f"is {given[:100]!r}: this server has tools of the client's only")
        return given


class ToolChoice(Body):
    """Whether the model must call, and what."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether the model thinks before it answers; for how long is its own choice."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1024, le=_MOST)
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How much is thought, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Edit(Body):
    """What is left out of the conversation: nothing."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Body):
    """What is left out of the conversation."""

    edits: list[Edit] = Field(default_factory=list)


class CountRequest(Body):
    """A prompt. `cache_control` and `speed` change no answer."""

    model: str
    messages: list[Message] = Field(min_length=1)
    system: Texts = Field(default_factory=list)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking = Thinking(type="disabled")
    output_config: OutputConfig = OutputConfig()
    context_management: ContextManagement = ContextManagement()
    cache_control: CacheControl | None = None
    speed: Literal["standard", "fast"] = "standard"

    def ask(self) -> Ask:
        """What is asked. Raises ApiError."""
        choice, offered = self.tool_choice, [tool.name for tool in self.tools]
        check_names(offered, "tools[{}].name")
        if choice.type in ("any", "tool") and not offered:
            raise invalid("tool_choice", "asks for a call, and there are no tools")
        if (choice.name is not None) != (choice.type == "tool"):
            problem = "is missing" if choice.type == "tool" else f"is not for {choice.type!r}"
            raise invalid("tool_choice.name", problem)
        if choice.name is not None and choice.name not in offered:
            raise invalid("tool_choice.name", f"{choice.name!r} is no tool")
        functions = [
            Function(
                name=tool.name,
                description=tool.description,
                strict=tool.strict,
                parameters=tool.input_schema,
            )
            for tool in self.tools
            if choice.type != "none"
        ]
        forced = {"any": offered, "tool": [choice.name or ""]}.get(choice.type, [])
        form = self.output_config.format
        return Ask(
            self._messages(),
            ("input_schema", "output_config.format.schema", "messages"),
            functions=functions,
            forced=forced,
            one_call=choice.disable_parallel_tool_use,
            schema=form.schema_ if form is not None else None,
            thinks=self.thinking.type != "disabled",
            effort=self.output_config.effort,
            continue_last=self.messages[-1].role == "assistant",
        )

    def _messages(self) -> list[dict[str, Any]]:
        turns = Turns()
        for text in (block.text for block in self.system):
            if not text.startswith(_BILLING):
                turns.add_text("system", text)
        for at, message in enumerate(self.messages):
            if not message.content:
                raise invalid(f"messages[{at}].content", "is empty")
            for number, block in enumerate(message.content):
                where = f"messages[{at}].content[{number}]"
                if block.type not in _MAY_SAY[message.role]:
                    raise invalid(where, f"is {block.type}, which is not for {message.role}")
                _add(turns, message.role, block, where)
        if turns.open_calls:
            raise invalid("messages", f"lack the tool_result of {next(iter(turns.open_calls))!r}")
        return turns.messages()


def _add(
    turns: Turns, role: Literal["user", "assistant", "system"], block: Any, where: str
) -> None:
    if isinstance(block, TextBlock):
        turns.add_text(role, block.text)
    elif isinstance(block, ThinkingBlock):
        turns.add_reasoning(block.thinking)
    elif isinstance(block, ToolUseBlock):
        turns.add_call(block.id, block.name, block.input)
    elif isinstance(block, ToolResultBlock):
        if block.tool_use_id not in turns.open_calls:
            raise invalid(f"{where}.tool_use_id", f"is {block.tool_use_id!r}: no call waits for it")
        text = "\n".join(each.text for each in block.content)
        turns.add_result(block.tool_use_id, f"Error: {text}" if block.is_error else text)


class MessagesRequest(CountRequest):
    """A prompt, and how it is answered. Those at the end change no answer."""

    max_tokens: int = Field(ge=1, le=_MOST)
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=1024)]] = Field(
        [], max_length=MOST_STOPS
    )
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=_MOST)
    stream: bool = False
    metadata: Any = None
    service_tier: Literal["auto", "standard_only"] = "auto"
