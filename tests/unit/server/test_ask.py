"""What is asked of a model that may think, and of one that calls no tools by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.server.texts import tokenizer
from zmoe.server.ask import Ask
from zmoe.server.errors import ApiError
from zmoe.server.grammar import Grammars
from zmoe.server.prompts import Prompt, Prompts
from zmoe.server.tools import Function

NAMES = ("parameters", "text.format.schema", "input")
MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{{ messages[0].content }}|{{ (tools or []) | length }}"
THINKS = TEMPLATE + "|{{ enable_thinking }}|{{ reasoning_effort or 'any' }}"


class FrontStub:
    """A Front's prompts and grammars, without an engine."""

    def __init__(self, template: str, parser: str | None = None) -> None:
        self.tokenizer = tokenizer(parser, thinks=template is THINKS)
        self.tokenizer.chat_template, self.tokenizer.has_chat_template = template, True
        self.prompts, self.grammars = Prompts(self.tokenizer), Grammars(self.tokenizer)

    async def apart(self, function: Any, *args: Any, **kwargs: Any) -> Prompt:
        found: Prompt = function(*args, **kwargs)
        return found

    def room(self, tokens: int, param: str) -> int:
        return 100 - tokens

    def text(self, **asked: Any) -> str:
        prompt = asyncio.run(Ask(MESSAGES, NAMES, **asked).prompt(self))  # type: ignore[arg-type]
        return str(self.tokenizer.decode(prompt.ids))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"thinks": True}, "Hi|0|True|any"),
        ({"thinks": False}, "Hi|0|False|any"),
        ({"thinks": True, "effort": "xhigh"}, "Hi|0|True|high"),
        ({"thinks": True, "effort": "minimal"}, "Hi|0|True|low"),
        ({"effort": "medium", "functions": [Function(name="f")]}, "Hi|1|True|medium"),
    ],
)
def test_what_the_template_is_told(asked: dict[str, Any], text: str) -> None:
    assert FrontStub(THINKS).text(**asked) == text


def test_a_template_that_knows_nothing_of_thoughts_is_told_nothing() -> None:
    assert FrontStub(TEMPLATE).text(thinks=True, effort="high") == "Hi|0"


def task(front: FrontStub, **asked: Any) -> Any:
    ask = Ask(MESSAGES, NAMES, **asked)
    return asyncio.run(ask.task(front, max_tokens=None, temp=0.5))  # type: ignore[arg-type]


def test_a_task_takes_the_room_that_there_is() -> None:
    found = task(FrontStub(TEMPLATE))
    assert found.sampling.max_tokens == 100 - len(found.prompt.ids)
    assert found.sampling.temp == 0.5 and not found.grammar and found.tools is None


def test_tools_that_the_model_may_call() -> None:
    functions = [Function(name="f"), Function(name="g")]
    assert len(task(FrontStub(TEMPLATE, "json_tools"), functions=functions).tools) == 2
    with pytest.raises(ApiError) as raised:
        task(FrontStub(TEMPLATE), functions=functions)
    assert raised.value.param == "tools"
    forced = task(FrontStub(TEMPLATE), functions=functions, forced=["g"], one_call=True)
    assert forced.forced and forced.one_call
    assert "call_0" in forced.grammar and "call_1" not in forced.grammar


def test_an_answer_by_a_schema_or_calls() -> None:
    functions, schema = [Function(name="f")], {"type": "object"}
    alone = task(FrontStub(TEMPLATE, "json_tools"), schema=schema)
    assert alone.grammar and alone.is_plain
    either = task(FrontStub(TEMPLATE, "json_tools"), schema=schema, functions=functions)
    assert "<tool_call>" in either.grammar and not either.is_plain
    must = task(FrontStub(TEMPLATE), schema=schema, functions=functions, forced=["f"])
    assert "call_0" in must.grammar


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"schema": {"type": "wrong"}}, "text.format.schema"),
        ({"schema": {"type": "wrong"}, "functions": [Function(name="f")]}, "text.format.schema"),
        (
            {
                "functions": [
                    Function(name="f"),
                    Function(name="g", parameters={"properties": {"a": {"type": "wrong"}}}),
                ],
                "forced": ["g"],
            },
            "tools[1].parameters",
        ),
    ],
)
def test_what_cannot_be_made(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        task(FrontStub(TEMPLATE, "json_tools"), **asked)
    assert (raised.value.status, raised.value.param) == (400, param)
