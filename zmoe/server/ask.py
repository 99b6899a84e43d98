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
    check_strict,
    strict_grammar,
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
        of_function, of_text, of_prompt = self.names
        grammar = await asyncio.to_thread(
            answer_grammar,
            front,
            functions=dict(enumerate(self.functions)),
            forced=self.forced,
            one_call=self.one_call,
            schema=None if self.schema is None else (of_text, self.schema),
            names=(of_function, "strict"),
        )
        prompt = await self.prompt(front)
        room = front.room(len(prompt.ids), of_prompt)
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
        told = {"name", "description", "parameters"}
        return [
            {"type": "function", "function": each.model_dump(include=told, exclude_unset=True)}
            for each in self.functions
        ]


def answer_grammar(
    front: Front,
    *,
    functions: Mapping[int, Function],
    forced: Collection[str],
    one_call: bool,
    schema: tuple[str, Mapping[str, Any]] | None,
    names: tuple[str, str],
) -> str:
    """The grammar of an answer, empty where it may be anything.

    `functions` may be called, by place in `tools`, and one of `forced` must be, unless that is
    empty. `schema` is that of a text which is no call, and the field that it comes from; `names`
    are a tool's fields of parameters and of strictness. Raises ApiError.
    """
    tokenizer, grammars = front.tokenizer, front.grammars
    if forced:
        functions = {at: f for at, f in functions.items() if f.name in forced}
        check_parameters(grammars, functions, names[0])
        grammar = calls_grammar(list(functions.values()), 1 if one_call else MOST_CALLS)
        return _checked(front, grammar, "tools")
    if functions and not tokenizer.has_tool_calling:
        raise invalid(
            "tools",
            "are not known to this model's chat template: a tool_choice that asks for a call "
            "makes calls by a grammar",
        )
    strict = {at: function for at, function in functions.items() if function.strict}
    check_strict(strict, tokenizer, names[1])
    check_parameters(grammars, strict, names[0])
    offered = list(functions.values())
    if schema is not None and functions:
        grammar = answer_or_calls_grammar(schema[1], offered, tokenizer, grammars)
        return _checked(front, grammar, schema[0])
    if schema is not None:
        return _checked(front, json_grammar(schema[1]), schema[0])
    if strict:
        return _checked(front, strict_grammar(offered, tokenizer, grammars), "tools")
    return ""


def _checked(front: Front, grammar: str, param: str) -> str:
    try:
        front.grammars.check(grammar)
    except InputError as error:
        raise invalid(param, f"cannot be compiled: {error}") from None
    return grammar
