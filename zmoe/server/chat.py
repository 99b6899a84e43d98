"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zmoe.config import Sampling
from zmoe.server.front import Front
from zmoe.server.generation import Choice, Task
from zmoe.server.http import (
    Body,
    error_body,
    event,
    event_stream,
    json_answer,
    read_body,
    until_disconnect,
)


class ChatMessage(Body):
    role: str
    content: str | None = None


class ChatRequest(Body):
    messages: list[ChatMessage]
    model: str | None = None
    max_tokens: int = 100
    temperature: float = 1.0
    stream: bool = False


def routes(front: Front) -> list[Route]:
    """The endpoint."""

    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        front.check_model(body.model)
        front.check_ready()
        prompt = front.prompts.of_chat([m.model_dump(exclude_none=True) for m in body.messages])
        task = Task(prompt, Sampling(max_tokens=body.max_tokens, temp=body.temperature))
        choice = front.generator.start(task)
        if body.stream:
            return await event_stream(
                _chunks(front, choice), lambda error: event(error_body(error))
            )
        return await until_disconnect(request, _whole(front, choice))

    return [Route("/v1/chat/completions", chat, methods=["POST"])]


async def _chunks(front: Front, choice: Choice) -> AsyncGenerator[bytes, None]:
    begun = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
    begun |= {"object": "chat.completion.chunk", "model": front.model}
    async for delta in choice:
        found: dict[str, Any] = {"content": delta.content}
        reason = choice.finish_reason
        yield event(begun | {"choices": [{"index": 0, "delta": found, "finish_reason": reason}]})
    yield event("[DONE]")


async def _whole(front: Front, choice: Choice) -> Response:
    content = ""
    async for delta in choice:
        content += delta.content
    message = {"role": "assistant", "content": content}
    return json_answer(
        {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": front.model,
            "choices": [{"index": 0, "message": message, "finish_reason": choice.finish_reason}],
        }
    )
