"""Anthropic's client against a server: messages and the count of their tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent, ToolUseBlock
from pydantic import TypeAdapter

from tests.server.serving import Server

LOOK: Any = {
    "name": "look",
    "description": "Look at something",
    "input_schema": {
        "type": "object",
        "properties": {"at": {"enum": ["sky", "sea"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
HELLO: Any = [{"role": "user", "content": "Hello there"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: anthropic.Anthropic, messages: Any = HELLO, **fields: Any) -> Message:
    """A message, as the official types have it, from a request of the fields."""
    given = {"model": "zmoe-tiny", "max_tokens": 24, "extra_body": GREEDY} | fields
    return Message.model_validate(client.messages.create(messages=messages, **given).to_dict())


def text_of(message: Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_a_stream_makes_the_message(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    assert whole.role == "assistant" and whole.model == "zmoe-tiny" and text_of(whole)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 24)
    with client.messages.stream(
        model="zmoe-tiny", max_tokens=24, messages=HELLO, extra_body=GREEDY
    ) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        streamed = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert text_of(streamed) == text_of(whole)
    assert streamed.stop_reason == whole.stop_reason
    assert prompt_tokens(streamed) == prompt_tokens(whole)


def test_every_event_has_its_name_and_type(server: Server) -> None:
    fits: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    body = {"model": "zmoe-tiny", "max_tokens": 4, "messages": HELLO, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().strip().split("\n\n")
    for each in events:
        name, data = each.split("\n")
        found = json.loads(data.removeprefix("data: "))
        assert name == f"event: {found['type']}"
        fits.validate_python(found)


def prompt_tokens(message: Message) -> int:
    usage = message.usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be kind."},
        {"system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [LOOK], "tool_choice": {"type": "any"}},
        {"messages": [*HELLO, {"role": "assistant", "content": "My name is"}]},
    ],
)
def test_tokens_are_counted_as_they_are_used(
    client: anthropic.Anthropic, fields: dict[str, Any]
) -> None:
    counted = client.messages.count_tokens(**{"model": "zmoe-tiny", "messages": HELLO, **fields})
    used = ask(client, **{"messages": HELLO, **fields, "max_tokens": 1})
    assert counted.input_tokens == prompt_tokens(used) > 10


def test_a_prefix_is_read_from_the_cache(client: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": "All the world's a stage. " * 40}]
    first = ask(client, long)
    again = ask(client, [*long, {"role": "assistant", "content": text_of(first)}, *HELLO])
    cached = again.usage.cache_read_input_tokens
    assert cached is not None and 64 <= cached <= prompt_tokens(first)
    assert again.usage.input_tokens < 100


def test_stop_sequences(client: anthropic.Anthropic) -> None:
    text = text_of(ask(client))
    middle = text[len(text) // 2 :][:3]
    stopped = ask(client, stop_sequences=["no such text", middle])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", middle)
    assert text_of(stopped) == text[: text.index(middle)]


def test_an_answer_that_has_begun_goes_on(client: anthropic.Anthropic) -> None:
    """The text that follows begins with its blank, so that it can be appended."""
    prefix = "My name is"
    message = ask(client, [*HELLO, {"role": "assistant", "content": prefix}], max_tokens=6)
    assert text_of(message).startswith((" ", ",", "'", "\n"))


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_with_tools(client: anthropic.Anthropic, streams: bool) -> None:
    messages: Any = list(HELLO)
    for turn in range(2):
        fields: Any = {
            "model": "zmoe-tiny",
            "max_tokens": 400,
            "tools": [LOOK],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        }
        if streams:
            with client.messages.stream(messages=messages, **fields) as stream:
                message: Any = stream.get_final_message()
        else:
            message = client.messages.create(messages=messages, **fields)
        (use,) = message.content
        assert isinstance(use, ToolUseBlock) and message.stop_reason == "tool_use"
        assert use.name == "look" and use.input["at"] in ("sky", "sea")
        result = {"type": "tool_result", "tool_use_id": use.id, "content": f"Nothing {turn}"}
        messages += [{"role": "assistant", "content": message.content}]
        messages += [{"role": "user", "content": [result, {"type": "text", "text": "Go on"}]}]
    fields["tool_choice"] = {"type": "none"}
    assert text_of(ask(client, messages, **fields | {"max_tokens": 8}))


def test_parallel_calls(client: anthropic.Anthropic) -> None:
    hear = {**LOOK, "name": "hear"}
    choice = {"type": "any"}
    message = ask(client, tools=[LOOK, hear], tool_choice=choice, max_tokens=600, extra_body={})
    assert message.stop_reason in ("tool_use", "max_tokens")
    uses = [block for block in message.content if isinstance(block, ToolUseBlock)]
    assert uses and len({use.id for use in uses}) == len(uses)
    named = {"type": "tool", "name": "hear", "disable_parallel_tool_use": True}
    message = ask(client, tools=[LOOK, hear], tool_choice=named, max_tokens=400)
    assert [use.name for use in message.content if isinstance(use, ToolUseBlock)] == ["hear"]


def test_a_schema_of_the_answer(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "schema": schema}}
    found = json.loads(text_of(ask(client, output_config=form, max_tokens=400)))
    assert found in ({"sum": 1}, {"sum": 2})


def test_what_claude_code_sends(server: Server) -> None:
    """Its headers and fields, with a Bearer token in the place of a key."""
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "zmoe-tiny",
        "max_tokens": 8,
        "stream": True,
        "system": [{"type": "text", "text": "You are Claude Code.", **cached}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello", **cached}]},
        ],
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "authorization": "Bearer none",
    }
    answer = httpx.post(f"{server.url}/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200 and "event: message_stop" in answer.text


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": "8"}, 400, "invalid_request_error", "max_tokens"),
    ({"model": "other"}, 404, "not_found_error", "model"),
    ({"messages": []}, 400, "invalid_request_error", "messages"),
    ({"messages": "Hello"}, 400, "invalid_request_error", "messages"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_request_error", "messages[0].content"),
    (
        {"messages": [{"role": "tool", "content": ""}]},
        400,
        "invalid_request_error",
        "messages[0].role",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "invalid_request_error",
        "no images",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 200000}]},
        400,
        "invalid_request_error",
        "tokens",
    ),
    ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
    ({"top_p": 0}, 400, "invalid_request_error", "top_p"),
    ({"top_k": -1}, 400, "invalid_request_error", "top_k"),
    ({"stop_sequences": ["x"] * 1000}, 400, "invalid_request_error", "stop_sequences"),
    ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences[0]"),
    ({"container": "x"}, 400, "invalid_request_error", "container"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1}}, 400, "invalid_request_error", "budget"),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        400,
        "invalid_request_error",
        "web_search_20250305",
    ),
    ({"tools": [LOOK], "tool_choice": {"type": "auto"}}, 400, "invalid_request_error", "tools"),
    (
        {
            "tools": [{**LOOK, "input_schema": {"type": "object", "properties": {"a": 1}}}],
            "tool_choice": {"type": "any"},
        },
        400,
        "invalid_request_error",
        "tools[0].input_schema",
    ),
]


@pytest.mark.parametrize(("fields", "status", "kind", "named"), BAD)
@pytest.mark.parametrize("streams", [False, True])
def test_bad_input(
    server: Server, fields: dict[str, Any], status: int, kind: str, named: str, streams: bool
) -> None:
    body = {"model": "zmoe-tiny", "max_tokens": 4, "messages": HELLO, "stream": streams} | fields
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found["type"] == "error" and found["error"]["type"] == kind
    assert named in found["error"]["message"] and "\n" not in found["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "kind"),
    [
        ("POST", "/v1/messages", b"{", {}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"[]", {}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b" " * (9 << 20), {}, 413, "request_too_large"),
        ("GET", "/v1/messages", b"", {}, 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", b"{}", {}, 404, "not_found_error"),
        ("POST", "/v1/messages", b"{}", {"origin": "http://evil.example"}, 403, "permission_error"),
        (
            "POST",
            "/v1/messages/count_tokens",
            b"{}",
            {"anthropic-version": "2020-01-01"},
            400,
            "invalid_request_error",
        ),
    ],
)
def test_errors_in_anthropics_form(
    server: Server,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    kind: str,
) -> None:
    answer = httpx.request(method, server.url + path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind


def test_the_snippet_of_the_docs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "anthropic.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(snippet.replace("http://127.0.0.1:8080", server.url), {})
    assert capsys.readouterr().out.strip()
