"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server.anthropic_request import CountRequest, MessagesRequest
from zmoe.server.calls import ToolCall
from zmoe.server.errors import ApiError, anthropic_error_body, invalid
from zmoe.server.front import Front
from zmoe.server.generation import Choice
from zmoe.server.http import event, event_stream, read_body, until_disconnect
from zmoe.server.openapi import operation
from zmoe.server.pieces import Event, Piece, events_of

_VERSIONS = ("2023-06-01", "2026-10-21")  # alike here: settings of the sampling are taken in both
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING = event({"type": "ping"}, "ping")


def routes(front: Front) -> list[Route]:
    """The endpoints."""

    @operation("Answer a chat, as Anthropic's API does", MessagesRequest)
    async def messages(request: Request) -> Response:
        _check_version(request)
        body = await read_body(request, MessagesRequest)
        front.check_model(body.model)
        front.check_ready()
        task = await body.ask().task(
            front,
            max_tokens=body.max_tokens,
            stop=body.stop_sequences,
            temp=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
        )
        choice = front.generator.start(task)
        answer = Answer(front.model, choice, body)
        events = events_of(choice, answer)
        if body.stream:
            return await event_stream(_encoded(events), error_event, PING)
        return await until_disconnect(request, _whole(events, answer))

    @operation("How many tokens a chat has", CountRequest)
    async def count_tokens(request: Request) -> Response:
        _check_version(request)
        body = await read_body(request, CountRequest)
        front.check_model(body.model)
        prompt = await body.ask().prompt(front)
        return JSONResponse({"input_tokens": len(prompt.ids)})

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def _check_version(request: Request) -> None:
    version = request.headers.get("anthropic-version")
    if version is not None and version not in _VERSIONS:
        known = " or ".join(_VERSIONS)
        raise invalid("anthropic-version", f"is {version[:100]!r}: expected {known}")


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that cannot go on."""
    return event(anthropic_error_body(error), "error")


async def _encoded(events: AsyncGenerator[Event]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        async for each in events:
            yield event(each, each["type"])


async def _whole(events: AsyncGenerator[Event], answer: Answer) -> Response:
    async with aclosing(events):
        async for _ in events:
            pass
    return JSONResponse(answer.message)


class Answer:
    """A Teller; at the end it has the whole `message`."""

    def __init__(self, model: str, choice: Choice, body: MessagesRequest) -> None:
        self._choice, self._max_tokens = choice, body.max_tokens
        self._hides_thoughts = body.thinking.display == "omitted"
        self._open = ""  # the kind of the block that has not ended
        self._arguments = ""  # of the call that has not ended
        self.message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": {},
        }

    def begin(self) -> list[Event]:
        """See Teller."""
        self.message["usage"] = self._usage()
        return [{"type": "message_start", "message": {**self.message, "content": []}}]

    def add(self, piece: Piece | ToolCall) -> list[Event]:
        """See Teller."""
        if isinstance(piece, ToolCall):
            return self._call(piece)
        events = []
        if self._open != piece.kind:
            block: dict[str, Any] = {"type": "text", "text": "", "citations": None}
            if piece.kind == "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            events = self._start(piece.kind, block)
        name = "text" if piece.kind == "text" else "thinking"
        if name == "text" or not self._hides_thoughts:
            self.message["content"][-1][name] += piece.text
            events.append(self._delta({"type": f"{name}_delta", name: piece.text}))
        return events

    def end(self) -> list[Event]:
        """See Teller."""
        choice = self._choice
        reason = _REASONS[choice.finish_reason or "stop"]
        if choice.stop_string is not None:
            reason = "stop_sequence"
        elif reason == "max_tokens" and choice.completion_tokens < self._max_tokens:
            reason = "model_context_window_exceeded"
        ended = {"stop_reason": reason, "stop_sequence": choice.stop_string}
        self.message |= ended | {"usage": self._usage()}
        is_cut, events = self._open == "tool_use", self._stop()
        if is_cut:  # its input is no object, which the whole message would need
            del self.message["content"][-1]
        return [
            *events,
            {"type": "message_delta", "delta": ended, "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def _usage(self) -> dict[str, Any]:
        choice = self._choice
        return {
            "input_tokens": choice.prompt_tokens - choice.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.cached_tokens,
            "cache_creation": None,
            "output_tokens": choice.completion_tokens,
            "output_tokens_details": {"thinking_tokens": choice.reasoning_tokens},
            "service_tier": "standard",
            "server_tool_use": None,
            "inference_geo": None,
        }

    def _call(self, piece: ToolCall) -> list[Event]:
        events: list[Event] = []
        if piece.begins:
            block: dict[str, Any] = {
                "type": "tool_use",
                "id": piece.id,
                "name": piece.name,
                "input": {},
            }
            events = self._start("tool_use", block | {"caller": {"type": "direct"}})
            self._arguments = ""
        arguments = piece.arguments
        if piece.begins and piece.ends:  # a parser's, which may be anything
            arguments = _json(_object(arguments))
        self._arguments += arguments
        if arguments:
            events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
        if piece.ends:
            self.message["content"][-1]["input"] = json.loads(self._arguments)
            events += self._stop()
        return events

    def _start(self, kind: str, block: dict[str, Any]) -> list[Event]:
        events = self._stop()
        self.message["content"].append(block)
        self._open = kind
        return [*events, self._at("content_block_start", content_block=dict(block))]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return self._at("content_block_delta", delta=delta)

    def _stop(self) -> list[Event]:
        kind, self._open = self._open, ""
        events = [self._at("content_block_stop")] if kind else []
        if kind == "reasoning":  # which ends with one, and ours has none
            events.insert(0, self._delta({"type": "signature_delta", "signature": ""}))
        return events

    def _at(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "index": len(self.message["content"]) - 1, **more}


def _object(arguments: str) -> dict[str, Any]:
    """Those of a call as the object that this API wants; models may write anything."""
    try:
        found = json.loads(arguments)
    except ValueError:
        found = arguments
    return found if isinstance(found, dict) else {"arguments": found}


def _json(found: object) -> str:
    return json.dumps(found, ensure_ascii=False)
