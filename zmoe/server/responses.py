"""POST /v1/responses, and GET and DELETE /v1/responses/{id}."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server.calls import ToolCall
from zmoe.server.errors import ApiError, invalid
from zmoe.server.front import Front
from zmoe.server.generation import Choice
from zmoe.server.http import event, event_stream, read_body, until_disconnect
from zmoe.server.openapi import operation
from zmoe.server.pieces import Event, Piece, events_of
from zmoe.server.responses_request import AnyItem, ResponsesRequest
from zmoe.server.responses_store import ResponseStore

_ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[AnyItem])


def routes(front: Front) -> list[Route]:
    """The endpoints."""
    store = ResponseStore()

    @operation("Answer a chat, or go on with one", ResponsesRequest)
    async def create(request: Request) -> Response:
        body = await read_body(request, ResponsesRequest)
        front.check_model(body.model)
        front.check_ready()
        earlier: list[Any] = []
        if body.previous_response_id is not None:
            _, earlier = store.get(body.previous_response_id, "previous_response_id")
        task = await body.ask(_ITEMS.validate_python(earlier)).task(
            front, max_tokens=body.max_output_tokens, temp=body.temperature, top_p=body.top_p
        )

        def keep(response: dict[str, Any]) -> None:
            given = [item.model_dump(exclude_none=True) for item in body.input]
            store.put(response, [*earlier, *given, *to_keep(response)])

        choice = front.generator.start(task)
        answer = Answer(front.model, choice, body, keep)
        events = events_of(choice, answer)
        if body.stream:
            return await event_stream(_encoded(events), lambda e: _encode(answer.failed(e)))
        return await until_disconnect(request, _whole(events, answer))

    @operation("An answer of before")
    async def retrieve(request: Request) -> Response:
        for name in request.query_params:
            raise invalid(name, "is not supported")
        return JSONResponse(store.get(request.path_params["id"])[0])

    @operation("Forget an answer")
    async def delete(request: Request) -> Response:
        id = request.path_params["id"]
        store.delete(id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    async def compact(_: Request) -> Response:
        raise ApiError(
            404,
            "POST /v1/responses/compact: this server does not compact conversations",
            code="not_supported",
        )

    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/compact", compact, methods=["POST"]),
        Route("/v1/responses/{id}", retrieve, methods=["GET"]),
        Route("/v1/responses/{id}", delete, methods=["DELETE"]),
    ]


async def _encoded(events: AsyncGenerator[Event]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        async for each in events:
            yield _encode(each)


def _encode(each: Event) -> bytes:
    return event(each, each["type"])


async def _whole(events: AsyncGenerator[Event], answer: Answer) -> Response:
    async with aclosing(events):
        async for _ in events:
            pass
    return JSONResponse(answer.response)


class Answer:
    """A Teller; at the end it has the whole `response`."""

    def __init__(
        self,
        model: str,
        choice: Choice,
        body: ResponsesRequest,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        """`keep` is called with the response at the end, if that is to be stored."""
        self._choice, self._keep = choice, keep
        self._sequence = 0
        self._open = ""  # the kind of the item that has not ended
        tool_choice = body.tool_choice.model_dump(exclude_unset=True)
        self.response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": model,
            "output": [],
            "frequency_penalty": 0.0,
            "parallel_tool_calls": body.parallel_tool_calls,
            "presence_penalty": 0.0,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort, "summary": body.reasoning.summary},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_unset=True)},
            "tool_choice": tool_choice if len(tool_choice) > 1 else body.tool_choice.type,
            "tools": [tool.model_dump() for tool in body.tools],
            "top_logprobs": 0,
            "top_p": body.top_p,
            "truncation": body.truncation,
            "usage": None,
            "user": body.user,
            "metadata": body.metadata,
        }

    def begin(self) -> list[Event]:
        """See Teller."""
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def add(self, piece: Piece | ToolCall) -> list[Event]:
        """See Teller."""
        if isinstance(piece, ToolCall):
            return self._call(piece)
        events = [] if piece.kind == self._open else [*self._close(), *self._start(piece.kind)]
        name = _NAMES[piece.kind]
        self.response["output"][-1]["content"][0]["text"] += piece.text
        return [*events, self._part(f"response.{name}.delta", delta=piece.text, **_EXTRA[name])]

    def end(self) -> list[Event]:
        """See Teller."""
        events = [] if self.response["output"] else self._start("text")
        is_whole = self._choice.finish_reason != "length"
        status = "completed" if is_whole else "incomplete"
        events += self._close(status)
        prompt, generated = self._choice.prompt_tokens, self._choice.completion_tokens
        self.response |= {
            "status": status,
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {
                    "cached_tokens": self._choice.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": self._choice.reasoning_tokens},
                "total_tokens": prompt + generated,
            },
        }
        if self.response["store"]:
            self._keep(self.response)
        return [*events, self._whole(f"response.{status}")]

    def failed(self, error: ApiError) -> Event:
        """The last event of a stream that cannot go on."""
        if self._open:
            self.response["output"][-1]["status"] = "incomplete"
        found = {"code": "server_error", "message": error.message}
        self.response |= {"status": "failed", "error": found}
        return self._whole("response.failed")

    def _start(self, kind: str) -> list[Event]:
        """Open an item with one part."""
        self._open, name = kind, _NAMES[kind]
        item: dict[str, Any] = {"status": "in_progress", "content": []}
        part: dict[str, Any] = {"type": name, "text": ""}
        if kind == "text":
            item |= {"id": _id("msg"), "type": "message", "role": "assistant"}
            part |= {"annotations": [], "logprobs": []}
        else:
            item |= {"id": _id("rs"), "type": "reasoning", "summary": []}
        self.response["output"].append(item | {"content": [part]})
        return [
            self._item("response.output_item.added", item=item),
            self._part("response.content_part.added", part=dict(part)),
        ]

    def _close(self, status: str = "completed") -> list[Event]:
        """End the item that is open."""
        if not self._open:
            return []
        kind, self._open = self._open, ""
        item = self.response["output"][-1]
        item["status"] = status
        if kind == "call":
            done = self._of_call("done", name=item["name"], arguments=item["arguments"])
            return [done, self._item("response.output_item.done", item=item)]
        name, part = _NAMES[kind], item["content"][0]
        return [
            self._part(f"response.{name}.done", text=part["text"], **_EXTRA[name]),
            self._part("response.content_part.done", part=part),
            self._item("response.output_item.done", item=item),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        events: list[Event] = []
        if call.begins:
            events, self._open = self._close(), "call"
            item = {"id": _id("fc"), "type": "function_call", "status": "in_progress"}
            item |= {"call_id": call.id, "name": call.name, "arguments": ""}
            self.response["output"].append(item)
            events.append(self._item("response.output_item.added", item=dict(item)))
        item = self.response["output"][-1]
        item["arguments"] += call.arguments
        if call.arguments:
            events.append(self._of_call("delta", delta=call.arguments))
        return [*events, *self._close()] if call.ends else events

    def _of_call(self, kind: str, **more: Any) -> Event:
        item = self.response["output"][-1]["id"]
        return self._item(f"response.function_call_arguments.{kind}", item_id=item, **more)

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response=self.response)

    def _item(self, kind: str, **more: Any) -> Event:
        return self._event(kind, output_index=len(self.response["output"]) - 1, **more)

    def _part(self, kind: str, **more: Any) -> Event:
        item = self.response["output"][-1]["id"]
        return self._item(kind, item_id=item, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        number, self._sequence = self._sequence, self._sequence + 1
        return {"type": kind, "sequence_number": number, **more}


def to_keep(response: dict[str, Any]) -> list[dict[str, Any]]:
    """The items of a response that a conversation can go on with: all but a call cut off."""
    return [
        item
        for item in response["output"]
        if item["type"] != "function_call" or item["status"] == "completed"
    ]


_NAMES = {"text": "output_text", "reasoning": "reasoning_text"}
_EXTRA: dict[str, dict[str, Any]] = {"output_text": {"logprobs": []}, "reasoning_text": {}}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
