"""Anthropic's API apart from a server: what a request asks, and the events of an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from starlette.responses import StreamingResponse

from tests.unit.server.texts import TOOLS, events_told, spoken, tokenizer
from zmoe.server import http
from zmoe.server.anthropic import PING, Answer, error_event
from zmoe.server.anthropic_request import MessagesRequest
from zmoe.server.errors import ApiError
from zmoe.server.pieces import Event

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
LOOK = {"name": "look", "input_schema": {"type": "object"}}


def request(**fields: Any) -> MessagesRequest:
    given = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
    return MessagesRequest.model_validate(given | fields)


def answer(
    *given: Any, body: MessagesRequest | None = None, **settings: Any
) -> tuple[list[Event], dict[str, Any]]:
    """The events of an answer and the whole message; takes what spoken() does."""
    choice, _ = spoken(*given, **settings)
    teller = Answer("m", choice, body or request())
    return events_told(choice, teller), teller.message


def kinds(events: list[Event]) -> list[str]:
    """The types of events, those of deltas once each."""
    found: list[str] = []
    for each in events:
        kind = each["type"].removeprefix("content_block_")
        kind = each["delta"]["type"] if kind == "delta" else kind
        if kind != (found or [""])[-1] or not kind.endswith("_delta"):
            found.append(kind)
    return found


def test_the_events_of_thoughts_text_and_calls() -> None:
    """They are in Anthropic's order, fit its types, and make the message that is not streamed."""
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
    text = f"<think>\nWhere?\n</think>\n\nI look.\n{call}{call}\n"
    events, message = answer(text, tokenizer("json_tools", thinks=True), tools=TOOLS)
    assert kinds(events) == [
        *("message_start", "start", "thinking_delta", "signature_delta", "stop"),
        *("start", "text_delta", "stop"),
        *("start", "input_json_delta", "stop") * 2,
        *("message_delta", "message_stop"),
    ]
    indices = [each["index"] for each in events if each["type"] == "content_block_start"]
    assert indices == [0, 1, 2, 3]
    snapshot, buffers = None, {}
    for each in events:
        fitting = EVENTS.validate_python(each)
        if each["type"] != "message_stop":
            snapshot = accumulate_event(event=fitting, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    assert [block.type for block in snapshot.content] == ["thinking", "text", *["tool_use"] * 2]
    assert Message.model_validate(message).stop_reason == "tool_use"
    assert message["content"][0]["thinking"].strip() == "Where?"
    assert message["content"][1]["text"].strip() == "I look."
    assert message["content"][3]["input"] == {"city": "Ulm"}
    for streamed, whole in zip(snapshot.content, message["content"]):
        told = {name: value for name, value in whole.items() if value is not None}
        assert streamed.model_dump(exclude_none=True) == told


@pytest.mark.parametrize("cut", [0, 6])
def test_forced_calls_are_told_as_they_are_written(cut: int) -> None:
    """A call that is cut off is in the stream, and in no message, which needs its whole input."""
    text = '[{"name": "weather", "arguments": {"city": "Ulm"}}, '
    text += '{"name": "weather", "arguments": {"city": "Oslo", "days": 12}}]'
    events, message = answer(
        text[: len(text) - cut], finish="length" if cut else "stop", forced=True, grammar="g"
    )
    calls = ("start", "input_json_delta", "stop")
    assert kinds(events) == ["message_start", *calls * 2, "message_delta", "message_stop"]
    pieces = [
        each["delta"]["partial_json"] for each in events if each["type"] == "content_block_delta"
    ]
    assert len(pieces) > 8
    whole = '{"city": "Ulm"}{"city": "Oslo", "days": 12}'
    assert "".join(pieces) == (whole[: 2 - cut] if cut else whole)
    given = [block["input"] for block in message["content"]]
    assert given == [{"city": "Ulm"}, {"city": "Oslo", "days": 12}][: 1 if cut else 2]
    assert message["stop_reason"] == ("model_context_window_exceeded" if cut else "tool_use")
    for each in events:
        EVENTS.validate_python(each)


def test_thoughts_may_be_left_out() -> None:
    body = request(thinking={"type": "adaptive", "display": "omitted"})
    events, message = answer("<think>Hm.</think>Yes.", tokenizer(thinks=True), body=body)
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert kinds(events)[1:4] == ["start", "signature_delta", "stop"]
    assert "Hm" not in json.dumps(events) and message["content"][1]["text"] == "Yes."


@pytest.mark.parametrize(
    ("finish", "limit", "stop", "reason"),
    [
        ("stop", 100, (), "end_turn"),
        ("stop", 100, ("king",), "stop_sequence"),
        ("length", 2, (), "max_tokens"),
        ("length", 100, (), "model_context_window_exceeded"),
    ],
)
def test_the_reason_to_stop(finish: str, limit: int, stop: tuple[str, ...], reason: str) -> None:
    body = request(max_tokens=limit)
    events, message = answer("the king", finish=finish, body=body, stop=stop)
    assert message["stop_reason"] == reason
    assert message["stop_sequence"] == (stop[0] if stop else None)
    assert events[-2]["delta"] == {
        "stop_reason": message["stop_reason"],
        "stop_sequence": message["stop_sequence"],
    }


def test_nothing_is_a_message_without_content() -> None:
    events, message = answer("")
    assert kinds(events) == ["message_start", "message_delta", "message_stop"]
    assert message["content"] == []


def test_the_messages_of_a_conversation() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "sky"}}
    result = {"type": "tool_result", "tool_use_id": "t1"}
    cached = {"cache_control": {"type": "ephemeral"}}
    body = request(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "Be kind.", **cached},
        ],
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "user", "content": [{"type": "text", "text": "there"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    use,
                ],
            },
            {
                "role": "user",
                "content": [
                    {**result, "content": [{"type": "text", "text": "No sky"}], "is_error": True},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
        tools=[LOOK],
    )
    ask = body.ask()
    function = {"name": "look", "arguments": {"at": "sky"}}
    assert list(ask.messages) == [
        {"role": "system", "content": "Be kind.\nBe brief."},
        {"role": "user", "content": "Hi\nthere"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: No sky"},
        {"role": "user", "content": "Well?"},
    ]
    assert not ask.continue_last and ask.thinks is False and not ask.forced


@pytest.mark.parametrize(
    ("choice", "forced", "offered", "one_call"),
    [
        ({"type": "auto"}, [], 2, False),
        ({"type": "auto", "disable_parallel_tool_use": True}, [], 2, True),
        ({"type": "any"}, ["look", "hear"], 2, False),
        ({"type": "tool", "name": "hear"}, ["hear"], 2, False),
        ({"type": "none"}, [], 0, False),
    ],
)
def test_tool_choices(
    choice: dict[str, Any], forced: list[str], offered: int, one_call: bool
) -> None:
    ask = request(tools=[LOOK, LOOK | {"name": "hear"}], tool_choice=choice).ask()
    assert (list(ask.forced), len(ask.functions), ask.one_call) == (forced, offered, one_call)


USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [USE]}, "messages"),
        ({"messages": [USE, {"role": "user", "content": "Well?"}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
                ]
            },
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [LOOK], "tool_choice": {"type": "any", "name": "look"}}, "tool_choice.name"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
    ],
)
def test_contradictions(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        request(**fields).ask()
    assert raised.value.status == 400
    assert raised.value.param == param and param in raised.value.message


def test_pings_while_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are Anthropic's, before the first event, too; what goes wrong later is an event."""
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.01)
    gate = asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        await gate.wait()
        yield http.event({"type": "message_start"}, "message_start")
        raise ApiError(503, "the cluster has ended")

    async def run() -> list[str]:
        answer = await http.event_stream(events(), error_event, PING)
        assert isinstance(answer, StreamingResponse)
        told = []
        async for each in answer.body_iterator:
            told.append(bytes(each).decode())  # type: ignore[arg-type]
            if len(told) == 2:
                gate.set()
        return told

    *pings, start, error = asyncio.run(run())
    assert len(pings) >= 2 and set(pings) == {'event: ping\ndata: {"type": "ping"}\n\n'}
    assert start.startswith("event: message_start\n")
    name, data = error.strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the cluster has ended"},
    }
