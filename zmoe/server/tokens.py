"""The model's tokens: POST /tokenize and /detokenize; and the embeddings that there are not."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server.chat_messages import ChatMessage, ChatPrompt
from zmoe.server.errors import ApiError, invalid
from zmoe.server.front import Front
from zmoe.server.http import Body, read_body
from zmoe.server.openapi import operation


class TokenizeRequest(ChatPrompt):
    """A text, or the messages of a chat, whose tokens are wanted."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """Tokens whose text is wanted."""

    model: str | None = None
    tokens: list[int]


def routes(front: Front) -> list[Route]:
    """The endpoints."""

    @operation("The token ids of a text, or of a chat", TokenizeRequest)
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest)
        front.check_model(body.model)
        if (body.prompt is None) == (not body.messages):
            raise invalid("prompt", "or messages is needed, and not both")
        if body.prompt is None:
            ids = (await body.prompt_of_chat(front, with_tools=bool(body.tools))).ids
        else:
            ids = await front.apart(_encode, front, body)
        found: dict[str, Any] = {"count": len(ids), "tokens": ids}
        found["max_model_len"] = front.context
        if body.return_token_strs:
            found["token_strs"] = front.tokenizer.convert_ids_to_tokens(ids)
        return JSONResponse(found)

    @operation("The text of token ids", DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest)
        front.check_model(body.model)
        return JSONResponse({"prompt": await front.apart(_decode, front, body.tokens)})

    async def embeddings(_: Request) -> Response:
        raise ApiError(
            404,
            "POST /v1/embeddings: this server generates text, and a model of text has no "
            "embeddings for others to use: ask a server of an embedding model",
            code="not_supported",
        )

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]


def _encode(front: Front, body: TokenizeRequest) -> list[int]:
    return list(front.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens))


def _decode(front: Front, tokens: list[int]) -> str:
    return str(front.tokenizer.decode(front.prompts.of_ids(tokens, "tokens").ids)) if tokens else ""
