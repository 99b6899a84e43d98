"""/v1/responses apart from a server: what a request asks, its events, and what is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.unit.server.texts import TOOLS, Script, events_told, spoken, tokenizer
from zmoe.config import Sampling
from zmoe.server.errors import ApiError
from zmoe.server.generation import Generator, Task
from zmoe.server.pieces import Event
from zmoe.server.prompts import Prompt
from zmoe.server.responses import Answer, to_keep
from zmoe.server.responses_request import ResponsesRequest
from zmoe.server.responses_store import ResponseStore
from zmoe.server.security import SALT

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LOOK = {"type": "function", "name": "look"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": "sky"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "Blue"}


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"input": "Hi"} | fields)


def answer(
    *given: Any, **settings: Any
) -> tuple[list[Event], dict[str, Any], list[dict[str, Any]]]:
    """The events of an answer, the response, and what is kept; takes what spoken() does."""
    choice, _ = spoken(*given, **settings)
    kept: list[dict[str, Any]] = []
    teller = Answer("m", choice, request(), kept.append)
    return events_told(choice, teller), teller.response, kept


def test_the_events_of_thoughts_text_and_calls() -> None:
    """They are in OpenAI's order, fit its types, and make the response that is not streamed."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
    text = f"<think>\nWhere?\n</think>\n\nI look.\n{call}{call}\n"
    events, response, kept = answer(text, tokenizer("json_tools", thinks=True), tools=TOOLS)
    kinds: list[str] = []
    for each in events:
        kind = each["type"].removeprefix("response.")
        if not (kind.endswith(".delta") and kinds[-1] == kind):
            kinds.append(kind)
    item, part = ("output_item.added", "output_item.done"), ("content_part.added",)
    assert kinds == [
        *("created", "in_progress"),
        *(item[0], *part, "reasoning_text.delta", "reasoning_text.done", "content_part.done"),
        *(item[1], item[0], *part, "output_text.delta", "output_text.done", "content_part.done"),
        item[1],
        *(item[0], "function_call_arguments.delta", "function_call_arguments.done", item[1]) * 2,
        "completed",
    ]
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    for each in events:
        EVENTS.validate_python(each)
        Response.model_validate(each.get("response", response))
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == response["output"] == events[-1]["response"]["output"]
    assert [each["type"] for each in done] == ["reasoning", "message", *["function_call"] * 2]
    added = [each["item"] for each in events if each["type"] == "response.output_item.added"]
    assert {each["status"] for each in added} == {"in_progress"}
    assert [each.get("content", each.get("arguments")) for each in added] == [[], [], "", ""]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    for name, at in (("reasoning_text", 0), ("output_text", 1)):
        deltas = [e["delta"] for e in events if e["type"] == f"response.{name}.delta"]
        assert "".join(deltas) == done[at]["content"][0]["text"]
    assert done[0]["content"][0]["text"].strip() == "Where?"
    assert done[1]["content"][0]["text"].strip() == "I look."
    assert [json.loads(each["arguments"]) for each in done[2:]] == [{"city": "Ulm"}] * 2
    details = response["usage"]["output_tokens_details"]
    assert 0 < details["reasoning_tokens"] < response["usage"]["output_tokens"]
    assert kept == [response]


@pytest.mark.parametrize("cut", [0, 6])
def test_forced_calls_are_told_as_they_are_written(cut: int) -> None:
    """A call that is cut off is not kept, since no result can follow it."""
    text = '[{"name": "weather", "arguments": {"city": "Oslo", "days": 12}}]'
    events, response, kept = answer(
        text[: len(text) - cut], finish="length" if cut else "stop", forced=True, grammar="g"
    )
    (call,) = response["output"]
    pieces = [each["delta"] for each in events if each["type"].endswith("arguments.delta")]
    assert len(pieces) > 5 and "".join(pieces) == call["arguments"]
    assert '{"city": "Oslo", "days": 12}'.startswith(call["arguments"])
    assert call["status"] == ("incomplete" if cut else "completed")
    assert events[-2]["item"] == call and events[-3]["arguments"] == call["arguments"]
    for each in events:
        EVENTS.validate_python(each)
    Response.model_validate(response)
    assert len(to_keep(response)) == (0 if cut else 1) and kept


def test_an_answer_that_is_cut_off() -> None:
    events, response, _ = answer("the king", finish="length")
    assert events[-1]["type"] == "response.incomplete"
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_nothing_is_a_message_without_text() -> None:
    events, response, _ = answer("")
    assert response["status"] == "completed" and len(events) == 8
    assert [part["text"] for part in response["output"][0]["content"]] == [""]


def test_an_answer_that_fails() -> None:
    script: Any = Script(tokenizer(), "the king")
    choice = Generator(script, tokenizer()).start(Task(Prompt([1]), Sampling()))
    told = Answer("m", choice, request(), lambda _: None)
    numbers = [each["sequence_number"] for each in told.begin()]
    last = told.failed(ApiError(503, "the cluster has ended"))
    EVENTS.validate_python(last)
    assert last["sequence_number"] == len(numbers)
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"] == "the cluster has ended"


def test_the_messages_of_a_conversation() -> None:
    body = request(
        instructions="Be kind.",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [
                {"type": "reasoning_text", "text": "Hm."}
            ]},
            {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [
                {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": None}
            ]},
            {**CALL, "id": "f", "status": "completed", "namespace": None},
            {**OUTPUT, "output": [{"type": "input_text", "text": "Blue"}]},
        ],
    )  # fmt: skip
    function = {"name": "look", "arguments": {"at": "sky"}}
    assert list(body.ask([]).messages) == [
        {"role": "system", "content": "Be kind.\nBe brief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "Blue"},
    ]


def test_earlier_items_come_behind_the_instructions() -> None:
    earlier = request(input=[{"role": "user", "content": "Hi"}, CALL]).input
    messages = request(instructions="Be kind.", input=[OUTPUT]).ask(earlier).messages
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("fields", "forced", "offered", "one_call"),
    [
        ({}, [], 2, False),
        ({"parallel_tool_calls": False}, [], 2, True),
        ({"tool_choice": "none"}, [], 0, False),
        ({"tool_choice": "required"}, ["look", "hear"], 2, False),
        ({"tool_choice": {"type": "function", "name": "hear"}}, ["hear"], 2, True),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [LOOK]}},
            [],
            1,
            False,
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [LOOK]}},
            ["look"],
            1,
            False,
        ),
    ],
)
def test_tool_choices(
    fields: dict[str, Any], forced: list[str], offered: int, one_call: bool
) -> None:
    ask = request(tools=[LOOK, LOOK | {"name": "hear"}], **fields).ask([])
    assert (list(ask.forced), len(ask.functions), ask.one_call) == (forced, offered, one_call)


def test_efforts() -> None:
    def told(**reasoning: str) -> tuple[bool | None, str | None]:
        ask = request(reasoning=reasoning).ask([])
        return ask.thinks, ask.effort

    assert told() == (None, None)
    assert told(effort="none") == (False, None)
    assert told(effort="high", summary="auto") == (True, "high")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [CALL]}, "input"),
        ({"input": [OUTPUT]}, "input[0].call_id"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "required", "name": "x"}}, "tool_choice.name"),
        ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ],
)
def test_contradictions(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        request(**fields).ask([])
    assert raised.value.status == 400
    assert raised.value.param == param and param in raised.value.message


# ---- what is kept --------------------------------------------------------------------


def test_the_store_keeps_so_many() -> None:
    """Those that were used last, of whatever is asked."""
    store = ResponseStore(most=2)
    for id in ("a", "b"):
        store.put({"id": id}, [f"of {id}"])
    assert store.get("a") == ({"id": "a"}, ["of a"])
    store.put({"id": "c"}, [])
    with pytest.raises(ApiError) as raised:
        store.get("b", "previous_response_id")
    assert (raised.value.status, raised.value.param) == (400, "previous_response_id")
    assert store.get("a")[1] == ["of a"] and store.get("c")[1] == []


def test_the_store_keeps_so_many_bytes() -> None:
    store = ResponseStore(most_bytes=1000)
    for id in range(100):
        store.put({"id": str(id)}, ["x" * 200])
    assert [id for id in range(100) if _has(store, str(id))] == [96, 97, 98, 99]
    store.put({"id": "large"}, ["x" * 1000])
    assert not _has(store, "large") and _has(store, "99")


def test_the_store_forgets() -> None:
    now = 0.0
    store = ResponseStore(kept=10, clock=lambda: now)
    store.put({"id": "a"}, [])
    store.put({"id": "b"}, [])
    now = 9
    assert _has(store, "a")
    now = 11
    assert _has(store, "a") and not _has(store, "b")
    store.delete("a")
    assert not _has(store, "a")
    with pytest.raises(ApiError):
        store.delete("a")


def test_the_store_tells_keys_apart() -> None:
    store, before = ResponseStore(), SALT.set(b"one key")
    try:
        store.put({"id": "a"}, [])
        assert _has(store, "a")
        SALT.set(b"another")
        assert not _has(store, "a")
    finally:
        SALT.reset(before)


def _has(store: ResponseStore, id: str) -> bool:
    try:
        store.get(id)
    except ApiError as error:
        assert error.status == 404
        return False
    return True
