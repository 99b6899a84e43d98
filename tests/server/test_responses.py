"""OpenAI's client against a server: /v1/responses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.serving import Server

LOOK: Any = {
    "type": "function",
    "name": "look",
    "description": "Look at something",
    "parameters": {
        "type": "object",
        "properties": {"at": {"enum": ["sky", "sea"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
    "strict": True,
}
HELLO = "Hello there"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: openai.OpenAI, given: Any = HELLO, **fields: Any) -> Response:
    """A response, as the official types have it, from a request of the fields."""
    settings = {"model": "zmoe-tiny", "max_output_tokens": 24, "temperature": 0} | fields
    return Response.model_validate(client.responses.create(input=given, **settings).to_dict())


def test_a_stream_makes_the_response(client: openai.OpenAI) -> None:
    whole = ask(client)
    assert whole.output_text and whole.status == "incomplete"
    assert whole.incomplete_details and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and whole.usage.output_tokens == 24
    with client.responses.stream(
        model="zmoe-tiny", input=HELLO, max_output_tokens=24, temperature=0
    ) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    assert last.response.usage.total_tokens == whole.usage.total_tokens


def test_every_event_has_its_name_and_type(server: Server) -> None:
    fits: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    body = {"input": HELLO, "max_output_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().strip().split("\n\n")
    for each in events:
        name, data = each.split("\n")
        found = json.loads(data.removeprefix("data: "))
        assert name == f"event: {found['type']}"
        fits.validate_python(found)


def test_a_conversation_that_the_server_keeps(client: openai.OpenAI) -> None:
    """It is the one that the client sends in full, and its prefix is in the cache."""
    asked = "All the world's a stage. " * 40
    first = ask(client, asked)
    second = ask(client, "And now?", previous_response_id=first.id)
    items: Any = [{"role": "user", "content": asked}, *first.output]
    in_full = ask(client, [*items, {"role": "user", "content": "And now?"}], store=False)
    assert second.previous_response_id == first.id
    assert second.output_text == in_full.output_text
    assert second.usage and in_full.usage and first.usage
    assert second.usage.input_tokens == in_full.usage.input_tokens > first.usage.input_tokens
    assert 64 <= second.usage.input_tokens_details.cached_tokens <= first.usage.input_tokens
    third = ask(client, "And then?", previous_response_id=second.id)
    assert third.usage and third.usage.input_tokens > second.usage.total_tokens


def test_instructions_are_those_of_the_request(client: openai.OpenAI) -> None:
    def tokens(**fields: Any) -> int:
        usage = ask(client, "And now?", max_output_tokens=1, **fields).usage
        assert usage is not None
        return usage.input_tokens

    with_them = ask(client, instructions="Be kind. " * 9, max_output_tokens=4)
    without = ask(client, max_output_tokens=4)
    assert with_them.output_text and without.output_text
    added = tokens(previous_response_id=with_them.id) - tokens(previous_response_id=without.id)
    assert abs(added) < 9  # what the answers differ by


def test_stored_responses(client: openai.OpenAI) -> None:
    kept = ask(client, metadata={"of": "a test"})
    assert client.responses.retrieve(kept.id) == kept and kept.metadata == {"of": "a test"}
    with client.responses.stream(model="zmoe-tiny", input=HELLO, max_output_tokens=4) as stream:
        events: Any = list(stream)
    streamed = events[-1].response
    assert client.responses.retrieve(streamed.id).output_text == streamed.output_text
    client.responses.delete(kept.id)
    for lost in (kept.id, ask(client, store=False).id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(lost)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(lost)
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, previous_response_id=lost)
        assert raised.value.param == "previous_response_id"


@pytest.mark.parametrize("keeps", [False, True])
def test_a_conversation_with_tools(client: openai.OpenAI, keeps: bool) -> None:
    items: Any = [{"role": "user", "content": HELLO}]
    fields: Any = {"tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False}
    fields |= {"model": "zmoe-tiny", "max_output_tokens": 400}
    last: str | None = None
    for turn in range(2):
        earlier = {"previous_response_id": last} if last else {}
        with client.responses.stream(input=items, **earlier, **fields) as stream:
            response = stream.get_final_response()
        last = response.id if keeps else None
        (call,) = response.output
        assert isinstance(call, ResponseFunctionToolCall) and call.name == "look"
        assert json.loads(call.arguments)["at"] in ("sky", "sea")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": f"No {turn}"}
        items = [output] if keeps else [*items, call, output]
    earlier = {"previous_response_id": last} if last else {}
    fields |= {"tool_choice": "none", "max_output_tokens": 8}
    assert ask(client, items, **earlier, **fields).output_text


def test_which_tools_are_called(client: openai.OpenAI) -> None:
    tools = [LOOK, {**LOOK, "name": "hear"}]
    for choice in (
        {"type": "function", "name": "hear"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "hear"}],
        },
    ):
        response = ask(client, tools=tools, tool_choice=choice, max_output_tokens=600)
        names = {each.name for each in response.output if each.type == "function_call"}
        assert names == {"hear"}


class Sum(BaseModel):
    """What an answer is to be."""

    right: bool


def test_a_schema_of_the_answer(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="zmoe-tiny", input=HELLO, text_format=Sum, max_output_tokens=400
    ).output_parsed
    assert isinstance(parsed, Sum)


def test_what_codex_sends(client: openai.OpenAI) -> None:
    items: Any = [
        {"type": "message", "role": "developer", "content": [_text("Be brief.")]},
        {"type": "message", "role": "user", "content": [_text(HELLO)]},
    ]
    with client.responses.stream(
        model="zmoe-tiny",
        instructions="You are a coding agent.",
        input=items,
        tools=[LOOK],
        tool_choice="none",
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="0199",
        max_output_tokens=8,
    ) as stream:
        events: Any = list(stream)
    assert events[-1].response.output_text


def _text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other"}, 404, "model"),
    ({"input": None}, 400, "input"),
    ({"input": 5}, 400, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0]"),
    ({"input": [{"role": "user", "content": 5}]}, 400, "input[0].content"),
    ({"input": [{"role": "boss", "content": "x"}]}, 400, "input[0].role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "input[0].content[0].type",
    ),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
        400,
        "input[0].arguments",
    ),
    ({"input": "x" * 200000}, 400, "input"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"background": True}, 400, "background"),
    ({"conversation": "x"}, 400, "conversation"),
    ({"include": ["message.output_text.logprobs"]}, 400, "include[0]"),
    ({"text": {"verbosity": "low"}}, 400, "text.verbosity"),
    ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
    ({"tools": [{**LOOK, "name": "a b"}]}, 400, "tools[0].name"),
    ({"tools": [LOOK]}, 400, "tools"),
    ({"tools": [LOOK], "tool_choice": {"type": "mcp"}}, 400, "tool_choice.type"),
    (
        {"tools": [{**LOOK, "parameters": {"properties": {"a": 1}}}], "tool_choice": "required"},
        400,
        "tools[0].parameters",
    ),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wrong"}}}},
        400,
        "text.format.schema",
    ),
    ({"previous_response_id": "resp_0"}, 400, "previous_response_id"),
]


@pytest.mark.parametrize(("fields", "status", "param"), BAD)
@pytest.mark.parametrize("streams", [False, True])
def test_bad_input(
    server: Server, fields: dict[str, Any], status: int, param: str, streams: bool
) -> None:
    body = {"input": HELLO, "max_output_tokens": 4, "stream": streams} | fields
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/responses", 405),
        ("GET", "/v1/responses/resp_0", 404),
        ("DELETE", "/v1/responses/resp_0", 404),
        ("GET", "/v1/responses/resp_0?stream=true", 400),
        ("POST", "/v1/responses/resp_0/cancel", 404),
        ("POST", "/v1/responses/compact", 404),
    ],
)
def test_errors_in_openais_form(server: Server, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_405_tells_all_methods_of_the_path(server: Server) -> None:
    answer = httpx.put(f"{server.url}/v1/responses/resp_0")
    assert answer.status_code == 405 and answer.headers["allow"] == "DELETE, GET, HEAD"


def test_the_snippet_of_the_docs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "responses.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(snippet.replace("http://127.0.0.1:8080", server.url), {})
    assert capsys.readouterr().out.strip()
