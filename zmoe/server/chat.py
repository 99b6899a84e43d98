"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server.ask import answer_grammar
from zmoe.server.calls import ToolCall
from zmoe.server.chat_messages import ChatPrompt
from zmoe.server.choices import endpoint, head_of
from zmoe.server.errors import invalid
from zmoe.server.fields import CompletionFields, usage
from zmoe.server.front import Front
from zmoe.server.generation import Delta, Task, run_together
from zmoe.server.http import event
from zmoe.server.token_texts import chat_logprobs
from zmoe.server.tools import ToolChoice, callable_tools


class ChatRequest(ChatPrompt, CompletionFields):
    """The body of a request."""

    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: list[Literal["text"]] = Field(default_factory=list)
    verbosity: Literal["medium"] = "medium"
    prediction: Any = None  # what the text may be like, which makes nothing faster here

    async def tasks(self, front: Front) -> list[Task]:
        """What is to be generated, one task per choice. Raises ApiError."""
        self.check()
        limit = self.max_completion_tokens or self.max_tokens
        if self.max_tokens not in (None, limit):
            raise invalid("max_tokens", "differs from max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        functions = callable_tools(self.tools, self.tool_choice)
        forced = self.tool_choice is not None and self.tool_choice.type in ("required", "function")
        one_call = (forced and self.tool_choice_is_named) or not self.parallel_tool_calls
        schema, grammar = self.answer_schema(), self.grammar
        if forced and (schema is not None or grammar):
            raise invalid("tool_choice", "cannot ask for a call of an answer by a grammar")
        if functions and grammar:
            raise invalid("grammar", "cannot be combined with tools, but for tool_choice none")
        if grammar:
            await self.check_grammar(front, grammar, "grammar")
        else:
            grammar = await asyncio.to_thread(
                answer_grammar,
                front,
                functions=functions,
                forced=[function.name for function in functions.values()] if forced else (),
                one_call=one_call,
                schema=schema,
                names=("function.parameters", "function.strict"),
            )
        if grammar and self.ignore_eos:
            raise invalid("ignore_eos", "cannot be combined with a grammar, which ends the text")
        prompt = await self.prompt_of_chat(front, with_tools=bool(functions))
        top = (self.top_logprobs or 0) if self.logprobs else None
        return [
            Task(
                prompt,
                sampling,
                stop=tuple(self.stop),
                grammar=grammar,
                tools=self.tools_for_template() if functions else None,
                forced=forced,
                one_call=one_call,
            )
            for sampling in self.samplings(front, prompt, "messages", max_tokens=limit, top=top)
        ]

    @property
    def tool_choice_is_named(self) -> bool:
        """Whether the model must call one certain function."""
        return self.tool_choice is not None and self.tool_choice.type == "function"


def routes(front: Front) -> list[Route]:
    """The endpoint."""

    async def begin(body: ChatRequest) -> _Answer:
        return _Answer(front, body, await body.tasks(front))

    return [endpoint(front, "/v1/chat/completions", "Answer a chat", ChatRequest, begin)]


class _Answer:
    def __init__(self, front: Front, body: ChatRequest, tasks: Sequence[Task]) -> None:
        self._front, self._body, self._prompt = front, body, tasks[0].prompt
        self._choices = [front.generator.start(task) for task in tasks]
        self._head = head_of(front, "chatcmpl")

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """See choices.Answer."""
        options = self._body.stream_options
        has_usage = options is not None and options.include_usage
        head = self._head | {"object": "chat.completion.chunk"}
        if has_usage:
            head["usage"] = None
        calls = [0] * len(self._choices)
        begun: set[int] = set()
        async with aclosing(run_together([self._choices])) as news:
            async for place, delta in news:
                if place not in begun:
                    ids = {} if begun else self._prompt_ids()
                    begun.add(place)
                    first = {"role": "assistant", "content": ""}
                    yield event(head | ids | {"choices": [_chunk(place, first)]})
                found = _delta(delta, calls[place])
                calls[place] += sum(call.begins for call in delta.tool_calls)
                extra = self._extra(delta)
                if found or (extra and delta.tokens):
                    yield event(head | {"choices": [_chunk(place, found) | extra]})
                if delta.finish_reason is not None:
                    end = _chunk(place, {}, delta.finish_reason)
                    yield event(head | {"choices": [end]})
        if has_usage:
            yield event(head | {"choices": [], "usage": usage([self._choices])})
        yield event("[DONE]")

    async def whole(self) -> Response:
        """See choices.Answer."""
        sums = [Delta() for _ in self._choices]
        async with aclosing(run_together([self._choices])) as news:
            async for place, delta in news:
                sums[place].add(delta)
        choices = [
            {"index": place, "message": _message(found), "finish_reason": choice.finish_reason}
            | {"logprobs": None}
            | self._extra(found)
            for place, (choice, found) in enumerate(zip(self._choices, sums))
        ]
        answer = {"object": "chat.completion", "choices": choices, "usage": usage([self._choices])}
        return JSONResponse(self._head | self._prompt_ids() | answer)

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt.ids} if self._body.return_token_ids else {}

    def _extra(self, delta: Delta) -> dict[str, Any]:
        """What was asked for besides the text."""
        found: dict[str, Any] = {}
        if self._body.logprobs:
            found["logprobs"] = chat_logprobs(self._front.grammars, delta)
        if self._body.return_token_ids:
            found["token_ids"] = delta.tokens
        return found


def _chunk(place: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": place, "delta": delta, "logprobs": None, "finish_reason": reason}


def _delta(delta: Delta, calls: int) -> dict[str, Any]:
    """The delta of a chunk, behind `calls` calls."""
    found: dict[str, Any] = {}
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.content:
        found["content"] = delta.content
    if delta.tool_calls:
        found["tool_calls"] = []
        for call in delta.tool_calls:
            calls += call.begins
            piece = _call(call) if call.begins else {"function": {"arguments": call.arguments}}
            found["tool_calls"].append({"index": calls - 1} | piece)
    return found


def _message(found: Delta) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "refusal": None, "annotations": []}
    whole = [_call(call) for call in found.tool_calls if call.ends]
    message["content"] = found.content if found.content or not whole else None
    if found.reasoning:
        message["reasoning_content"] = found.reasoning
    if whole:
        message["tool_calls"] = whole
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
