"""What OpenAI's endpoints answer to bad input: the status, and the field at fault."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.serving import Server

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}


def schema(found: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": found}}


def deep(levels: int) -> Any:
    found: Any = {"type": "string"}
    for _ in range(levels):
        found = {"type": "array", "items": found}
    return found


def ask(server: Server, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{server.url}{path}", content=raw, timeout=120)
    return answer.status_code, answer.json()


def check(server: Server, path: str, body: Any, param: str | None, words: str, status: int) -> None:
    found, answer = ask(server, path, body)
    assert found == status, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"], error
    if param is not None:  # the message can be read without the rest
        assert param in error["message"] or error["param"] == "model"
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 700


BODIES: list[tuple[bytes, str | None, str]] = [
    (b"", None, "not JSON"),
    (b"{", None, "not JSON"),
    (b"[]", None, "not a JSON object"),
    (b'{"messages":"\xff"}', None, "not JSON"),
    (b'{"messages":"\xed\xa0\x80"}', None, "not JSON"),
    (b'{"temperature":NaN}', None, "NaN"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "messages", "surrogate"),
    (b'{"\\udfff":1}', "\\udfff", "surrogate"),
    (b'{"n":' + b"9" * 5000 + b"}", None, "not JSON"),
    (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested"),
    (b'{"metadata":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", "messages", "missing"),
]


@pytest.mark.parametrize(("body", "param", "words"), BODIES)
def test_bodies(server: Server, body: bytes, param: str | None, words: str) -> None:
    check(server, "/v1/chat/completions", body, param, words, 400)


def test_long_bodies(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b" " * (10 << 20))
    assert answer.status_code == 413 and "8 MiB" in answer.json()["error"]["message"]


CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "missing"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": "Hi"}, "messages", "list"),
    ({"messages": ["Hi"]}, "messages[0]", "dictionary"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role", "'user'"),
    ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content", "missing"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "neither"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content", "no images"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]", "wrong"),
    ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "not supported"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].tool_call_id", "missing"),
    (
        {"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]},
        "messages[0].tool_calls",
        "role user",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        "messages[0].tool_calls[0].function.arguments",
        "no JSON object",
    ),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "1024"),
    ({"foo": 1}, "foo", "not supported"),
    ({"functions": []}, "functions", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"n": 0}, "n", "greater"),
    ({"n": 129}, "n", "128"),
    ({"n": 2.5}, "n", "integer"),
    ({"max_tokens": 0}, "max_tokens", "greater"),
    ({"max_tokens": 2**80}, "max_tokens", "less"),
    ({"max_tokens": "8"}, "max_tokens", "integer"),
    ({"max_tokens": 8, "max_completion_tokens": 9}, "max_tokens", "differs"),
    ({"temperature": -0.1}, "temperature", "0"),
    ({"temperature": 2.1}, "temperature", "2"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 1.5}, "min_p", "[0, 1]"),
    ({"presence_penalty": 3}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2 to 2"),
    ({"repetition_penalty": 1000}, "repetition_penalty", "100"),
    ({"repetition_context_size": 0}, "repetition_context_size", "1"),
    ({"logit_bias": [1]}, "logit_bias", "no object"),
    ({"logit_bias": {"king": 1}}, "logit_bias", "'king'"),
    ({"logit_bias": {"1024": 1}}, "logit_bias", "1024"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "101"),
    ({"logit_bias": {str(at): 1 for at in range(1025)}}, "logit_bias", "at most 1024"),
    ({"seed": 2**64}, "seed", "less"),
    ({"seed": "x"}, "seed", "integer"),
    ({"stop": ["x"] * 1000}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "1 to 1024"),
    ({"stop": "x" * 1025}, "stop", "1 to 1024"),
    ({"stop": [1]}, "stop", "neither"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "not asked for"),
    ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "not supported"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        {"response_format": schema({"type": "objekt"})},
        "response_format.json_schema.schema",
        "objekt",
    ),
    (
        {"response_format": schema({"not": {}})},
        "response_format.json_schema.schema",
        "Unimplemented",
    ),
    (
        {"response_format": schema({"$ref": "http://other.example/schema"})},
        "response_format.json_schema.schema",
        "compiled",
    ),
    ({"response_format": schema(deep(400))}, "response_format.json_schema.schema", "compiled"),
    (
        {"response_format": schema({"enum": ["x" * 9] * 9000})},
        "response_format.json_schema.schema",
        "65536",
    ),
    ({"grammar": "start: king"}, "grammar", "king"),
    ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "grammar", "nested"),
    ({"grammar": 'start: "a"', "ignore_eos": True}, "ignore_eos", "grammar"),
    (
        {"grammar": 'start: "a"', "response_format": {"type": "json_object"}},
        "grammar",
        "response_format",
    ),
    ({"tools": [TOOL]}, "tools", "a tool_choice that asks"),  # zmoe-tiny has no form for calls
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"tools": [TOOL, TOOL], "tool_choice": "none"}, "tools[1].function.name", "another"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "pattern",
    ),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice.type", "'required'"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
        "no tool",
    ),
    (
        {
            "tools": [TOOL, {**TOOL, "function": {"name": "g", "parameters": {"type": "strin"}}}],
            "tool_choice": "required",
        },
        "tools[1].function.parameters",
        "strin",
    ),
    (
        {
            "tools": [TOOL],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "tool_choice",
        "grammar",
    ),
    ({"reasoning_effort": "high"}, "reasoning_effort", "does not change"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "tokenize"),
    ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs", "thinking"),
    ({"continue_final_message": True}, "continue_final_message", "assistant"),
    ({"add_generation_prompt": False}, "add_generation_prompt", "true"),
    ({"store": True}, "store", "False"),
    ({"verbosity": "low"}, "verbosity", "medium"),
    ({"service_tier": "flex"}, "service_tier", "auto"),
    ({"modalities": ["audio"]}, "modalities[0]", "text"),
]


@pytest.mark.parametrize(("fields", "param", "words"), CHATS)
def test_chats(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, **fields}
    check(server, "/v1/chat/completions", body, param, words, 400)
    if "stream_options" not in fields and "stream" not in fields:  # nor does a stream begin
        check(server, "/v1/chat/completions", {**body, "stream": True}, param, words, 400)


TEXTS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "missing"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": 3}, "prompt", "neither"),
    ({"prompt": [1, "a"]}, "prompt", "'a'"),
    ({"prompt": ["a", 1]}, "prompt[1]", "neither"),
    ({"prompt": [[1], []]}, "prompt[1]", "empty"),
    ({"prompt": [1024]}, "prompt", "0 to 1023"),
    ({"prompt": [-1]}, "prompt", "0 to 1023"),
    ({"prompt": [True]}, "prompt", "True"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt", "128"),
    ({"prompt": [1] * 1024}, "prompt", "1023"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
    ({"prompt": "a", "echo": True, "logprobs": 0}, "logprobs", "echo"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "20"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
    ({"prompt": "a", "messages": MESSAGES}, "messages", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "words"), TEXTS)
def test_completions(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    check(server, "/v1/completions", {"max_tokens": 4, **fields}, param, words, 400)


def test_other_endpoints(server: Server) -> None:
    for path, body, param, words in (
        ("/tokenize", {}, "prompt", "messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt", "both"),
        ("/tokenize", {"prompt": 3}, "prompt", "string"),
        ("/detokenize", {"tokens": [4096]}, "tokens", "1023"),
        ("/detokenize", {}, "tokens", "missing"),
    ):
        check(server, path, body, param, words, 400)


def test_unknown_models_and_paths(server: Server) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        body = {"messages": MESSAGES, "prompt": "a", "tokens": []}
        wanted = {"/v1/completions": ("prompt",), "/detokenize": ("tokens",)}.get(
            path, ("messages",)
        )
        given = {name: body[name] for name in wanted} | {"model": "other"}
        check(server, path, given, "model", "'other'", 404)
    status, answer = ask(server, "/v1/embeddings", {"input": "a"})
    assert status == 404 and "embedding" in answer["error"]["message"]


def test_the_server_goes_on(server: Server) -> None:
    status, answer = ask(server, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2})
    assert status == 200 and answer["usage"]["completion_tokens"] <= 2
