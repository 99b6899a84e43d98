"""From what /v1/messages and /v1/responses are asked to a task of the generator's."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zmoe.config import Sampling
from zmoe.errors import InputError
from zmoe.server.errors import invalid
from zmoe.server.front import Front
from zmoe.server.generation import Task
from zmoe.server.grammar import json_grammar
from zmoe.server.prompts import Prompt
from zmoe.server.tools import (
    MOST_CALLS,
    Function,
    answer_or_calls_grammar,
    calls_grammar,
    check_parameters,
)

_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}  # templates know three


@dataclass(frozen=True)
class Ask:
    """What is asked.

    `messages` are for the chat template, and the last one is to be gone on with if
    `continue_last`. `functions` may be called; one of `forced` must be, unless that is empty, and
    no more than one call is made if `one_call`. `schema` (JSON Schema) limits text that is not a
    call. `thinks` and `effort` tell the template whether, and how much, the model is to think;
    None leaves that open. `names` are those of fields, in the client's API: of a function's
    schema, of the text's schema, of the conversation.
    """

    messages: Sequence[Mapping[str, Any]]
    names: tuple[str, str, str]
    functions: Sequence[Function] = ()
    forced: Collection[str] = ()
    one_call: bool = False
    schema: Mapping[str, Any] | None = None
    thinks: bool | None = None
    effort: str | None = None
    continue_last: bool = False

    async def prompt(self, front: Front) -> Prompt:
        """The prompt. Raises ApiError."""
        return await front.apart(
            front.prompts.of_chat,
            self.messages,
            tools=self._tools(),
            kwargs=front.prompts.kwargs_of_thinking(
                self.thinks, _EFFORTS.get(self.effort or "", self.effort)
            ),
            continue_last=self.continue_last,
        )

    async def task(
        self, front: Front, *, max_tokens: int | None, stop: Sequence[str] = (), **sampling: Any
    ) -> Task:
        """The task, of up to `max_tokens` tokens, None for as many as fit; `sampling` are other
        fields of Sampling. Raises ApiError.
        """
        grammar = await asyncio.to_thread(self._grammar, front)
        prompt = await self.prompt(front)
        room = front.room(len(prompt.ids), self.names[2])
        return Task(
            prompt,
            Sampling(max_tokens=min(max_tokens or room, room), **sampling),
            stop=tuple(stop),
            grammar=grammar,
            tools=self._tools() or None,
            forced=bool(self.forced),
            one_call=self.one_call,
        )

    def _tools(self) -> list[dict[str, Any]]:
        return [
            {"type": "function", "function": function.model_dump(exclude_unset=True)}
            for function in self.functions
        ]

    def _grammar(self, front: Front) -> str:
        of_function, of_text, _ = self.names
        if self.forced:
            forced = {at: f for at, f in enumerate(self.functions) if f.name in self.forced}
            check_parameters(front.grammars, forced, of_function)
            grammar = calls_grammar(list(forced.values()), 1 if self.one_call else MOST_CALLS)
            _check(front, grammar, "tools")
            return grammar
        if self.functions and not front.tokenizer.has_tool_calling:
            raise invalid(
                "tools",
                "are not known to this model's chat template: a tool_choice that asks for a call "
                "makes calls by a grammar",
            )
        if self.schema is None:
            return ""
        if self.functions:
            grammar = answer_or_calls_grammar(self.schema, front.tokenizer, front.grammars)
        else:
            grammar = json_grammar(self.schema)
        _check(front, grammar, of_text)
        return grammar


def _check(front: Front, grammar: str, param: str) -> None:
    try:
        front.grammars.check(grammar)
    except InputError as error:
        raise invalid(param, f"cannot be compiled: {error}") from None


def type_tag(given: Any) -> str:
    """Tells objects with a type apart for pydantic; the names of fields leave it out."""
    kind = given.get("type") if isinstance(given, Mapping) else getattr(given, "type", None)
    return f"type={kind}"
