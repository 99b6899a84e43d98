"""From what /v1/messages and /v1/responses are asked to a task of the generator's."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import PydanticCustomError

from zmoe.config import Sampling
from zmoe.errors import InputError
from zmoe.server.errors import invalid
from zmoe.server.front import Front
from zmoe.server.generation import Task
from zmoe.server.prompts import Prompt
from zmoe.server.tool_grammar import forced_calls, json_text

_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # for templates, which know three


def refused(problem: str) -> PydanticCustomError:
    """What a validator raises: `problem` follows the name of the field."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem})


def type_tag(given: Any) -> str:
    """Tells the types of objects apart for pydantic; the names of fields leave it out."""
    kind = given.get("type") if isinstance(given, Mapping) else getattr(given, "type", None)
    return f"type={kind}"


@dataclass(frozen=True)
class Ask:
    """What is asked.

    `messages` are for the chat template, and the last one is to be gone on with if
    `continue_last`. `tools` are OpenAI's definitions of those that the model may call: it must
    call one of `forced`, unless that is empty, and with `one_call` no more than one. `schema`
    (JSON Schema) limits the text, and `schema_field` is its name. `thinking` are arguments of the
    template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    forced: Collection[str] = ()
    one_call: bool = False
    schema: Mapping[str, Any] | None = None
    schema_field: str = ""
    thinking: Mapping[str, Any] = field(default_factory=dict)
    continue_last: bool = False

    def prompt(self, front: Front) -> Prompt:
        """The prompt. Raises ApiError."""
        return front.prompts.of_chat(
            self.messages,
            tools=self.tools,
            kwargs=self.thinking if front.tokenizer.has_chat_template else None,
            continue_last=self.continue_last,
        )

    async def task(self, front: Front, sampling: Sampling, stop: Sequence[str] = ()) -> Task:
        """The task. Raises ApiError."""
        grammar = ""
        if self.forced:
            grammar = forced_calls(self.tools, self.forced, parallel=not self.one_call)
            await _check(front, grammar, "tools")
        elif self.schema is not None:
            if self.tools:
                raise invalid(self.schema_field, "cannot be combined with tools")
            grammar = json_text(self.schema)
            await _check(front, grammar, self.schema_field)
        return Task(
            self.prompt(front),
            sampling,
            stop=tuple(stop),
            grammar=grammar,
            tools=self.tools or None,
            forced=bool(self.forced),
        )


async def _check(front: Front, grammar: str, param: str) -> None:
    try:
        await asyncio.to_thread(front.grammars.check, grammar)
    except InputError as error:
        raise invalid(param, f"cannot be compiled: {error}") from None


def effort_of(name: str) -> dict[str, Any]:
    """What tells a chat template how much to think."""
    if name == "none":
        return {"enable_thinking": False}
    return {"enable_thinking": True, "reasoning_effort": _EFFORTS.get(name, name)}


def check_names(names: Sequence[str], param: str) -> None:
    """Raise ApiError where two tools have one name; `param` is the field of a name, with {}."""
    for at, name in enumerate(names):
        if name in names[:at]:
            raise invalid(param.format(at), f"is {name!r}, as that of another tool")
