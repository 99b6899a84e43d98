"""From tokens to text, thoughts and tool calls, whatever the steps in which they come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.unit.server.texts import TOOLS, Script, said, tokenizer
from zmoe.config import Sampling
from zmoe.server.calls import ForcedCalls, ToolCall, add_calls
from zmoe.server.generation import Generator, Task, run_together
from zmoe.server.prompts import Prompt

SIZES = [1, 2, 3, 7, 100]  # tokens that come at once


@pytest.mark.parametrize("size", SIZES)
def test_the_text_is_what_the_model_says(size: int) -> None:
    found, choice = said("To be, or not to be: €100 für die 火.", size=size)
    assert found.content == "To be, or not to be: €100 für die 火."
    assert (choice.finish_reason, choice.stop_string) == ("stop", None)
    assert choice.completion_tokens == len(found.tokens) > 10


def test_the_end_token_is_no_part_of_the_text() -> None:
    found, choice = said("king", finish="length")
    stopped, _ = said("king")
    assert found == stopped and choice.finish_reason == "length"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("stops", "text", "string"),
    [
        (["or not"], "To be, ", "or not"),
        (["t to b"], "To be, or no", "t to b"),  # neither end is a token's
        (["xyz", "be,", "e, o"], "To ", "be,"),  # the first one in the text
        (["o"], "T", "o"),
        (["be: tha"], "To be, or not to ", "be: tha"),
        (["question."], "To be, or not to be: that is the ", "question."),
        (["question.!"], "To be, or not to be: that is the question.", None),
    ],
)
def test_stop_strings(stops: list[str], text: str, string: str | None, size: int) -> None:
    spoken = "To be, or not to be: that is the question."
    found, choice = said(spoken, size=size, stop=tuple(stops))
    assert found.content == text
    assert (choice.finish_reason, choice.stop_string) == ("stop", string)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_are_told_apart(size: int, opened: bool) -> None:
    """The template may have opened them, or the model does; stop strings are for the text."""
    text = ("" if opened else "<think>") + "Is it stop? Yes.</think>Then do stop it."
    tokens = tokenizer(thinks=True)
    state = "reasoning" if opened else "normal"
    found, choice = said(text, tokens, size=size, state=state, stop=("stop",))
    assert (found.reasoning, found.content) == ("Is it stop? Yes.", "Then do ")
    assert choice.stop_string == "stop"
    assert 5 < choice.reasoning_tokens < choice.completion_tokens


def test_thoughts_without_end() -> None:
    found, choice = said("I wonder", tokenizer(thinks=True), state="reasoning", finish="length")
    assert (found.reasoning, found.content, choice.finish_reason) == ("I wonder", "", "length")
    assert choice.reasoning_tokens == choice.completion_tokens


@pytest.mark.parametrize("size", SIZES)
def test_a_raw_text_keeps_everything(size: int) -> None:
    text = "<think>so</think><tool_call>{}</tool_call>"
    tokens = tokenizer("json_tools", thinks=True)
    found, choice = said(text, tokens, size=size, is_raw=True, tools=TOOLS)
    assert (found.content, found.reasoning, found.tool_calls) == (text, "", [])
    assert choice.finish_reason == "stop"


def test_a_raw_text_keeps_its_first_blank() -> None:
    """mlx-lm's detokenizers take it away, as for an answer that begins."""
    assert said(" there", is_raw=True)[0].content == " there"
    assert said(" there")[0].content == "there"


CALLS = {
    "json_tools": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n'
    "</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    "glm47": "<tool_call>weather<arg_key>city</arg_key><arg_value>Ulm</arg_value>"
    "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Ulm", "days": 2}',
    "pythonic": '<|tool_call_start|>[weather(city="Ulm", days=2)]<|tool_call_end|>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    '<|tool_call_argument_begin|>{"city": "Ulm", "days": 2}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parser", CALLS)
def test_calls_of_several_models(parser: str, size: int) -> None:
    text = "I look. " + CALLS[parser]
    found, choice = said(text, tokenizer(parser), size=size, tools=TOOLS)
    assert found.content == "I look. "
    (call,) = found.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Ulm", "days": 2})
    assert call.id and choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("size", SIZES)
def test_calls_one_after_the_other(size: int) -> None:
    text = CALLS["json_tools"] + CALLS["json_tools"] + " Now."
    found, choice = said(text, tokenizer("json_tools"), size=size, tools=TOOLS)
    assert [call.name for call in found.tool_calls] == ["weather", "weather"]
    assert len({call.id for call in found.tool_calls}) == 2
    assert (found.content.strip(), choice.finish_reason) == ("Now.", "tool_calls")

    found, choice = said(text, tokenizer("json_tools"), size=size, tools=TOOLS, one_call=True)
    assert (len(found.tool_calls), found.content) == (1, "")
    assert choice.finish_reason == "tool_calls"


def test_what_is_no_call_is_text() -> None:
    tokens = tokenizer("json_tools")
    wrong = "<tool_call>weather?</tool_call> Hm."
    found, choice = said(wrong, tokens, tools=TOOLS)
    assert (found.content, found.tool_calls, choice.finish_reason) == (wrong, [], "stop")
    # Nor is one where the client has no tools, or that is cut off.
    found, _ = said(CALLS["json_tools"], tokens)
    assert (found.content, found.tool_calls) == (CALLS["json_tools"], [])
    found, choice = said('<tool_call>{"name": "wea', tokens, tools=TOOLS, finish="length")
    assert (found.content, choice.finish_reason) == ('<tool_call>{"name": "wea', "length")


def test_a_held_back_stop_string_comes_before_the_call() -> None:
    text = "END" + CALLS["json_tools"]
    found, _ = said(text, tokenizer("json_tools"), tools=TOOLS, stop=("ENDED",))
    assert found.content == "END" and found.tool_calls


FORCED = '[{"name": "weather", "arguments": {"city": "<tool_call>}, {"}}, ' + (
    '{"name": "weather", "arguments": {"city": "]"}}]'
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("thinks", [True, False])
def test_forced_calls(size: int, thinks: bool) -> None:
    """They are a JSON array, and may hold what would else be a marker or a stop string."""
    settings: dict[str, Any] = {"tools": TOOLS, "forced": True, "grammar": "g", "stop": ("city",)}
    tokens = tokenizer("json_tools", thinks=thinks)
    text, state = ("Hm.</think>" + FORCED, "reasoning") if thinks else (FORCED, "normal")
    found, choice = said(text, tokens, size=size, state=state, **settings)
    assert found.reasoning == ("Hm." if thinks else "") and found.content == ""
    cities = [json.loads(call.arguments)["city"] for call in found.tool_calls]
    assert cities == ["<tool_call>}, {", "]"]
    assert choice.finish_reason == "tool_calls"

    cut, choice = said(text[:-10], tokens, size=size, state=state, finish="length", **settings)
    assert [call.ends for call in cut.tool_calls] == [True, False]
    assert cut.tool_calls[1].arguments == '{"cit'
    assert (cut.content, choice.finish_reason) == ("", "length")
    one, choice = said(text, tokens, size=size, state=state, one_call=True, **settings)
    assert (len(one.tool_calls), choice.finish_reason) == (1, "tool_calls")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_forced_calls_are_told_as_they_are_written(size: int) -> None:
    """In pieces that make the same calls, whatever the borders; what is known comes at once."""
    arguments = [r'{"a": {"b": "\\\"}", "c": ["{", "\\"]}}', "{}", r'{"é": "\u00e9\n"}']
    text = ", ".join(f'{{"name": "f.{at}", "arguments": {a}}}' for at, a in enumerate(arguments))
    calls: list[ToolCall] = []
    forced, told = ForcedCalls(), ""
    for at in range(0, len(text) + 2, size):
        pieces = forced.read(f"[{text}]"[at : at + size])
        told += "".join(piece.arguments for piece in pieces)
        add_calls(calls, pieces)
        written = f"[{text}]"[: at + size]
        if (behind := written.rfind('"arguments": ')) >= 0 and not calls[-1].ends:
            assert calls[-1].arguments == written[behind + len('"arguments": ') :]
    assert [call.arguments for call in calls] == arguments and told == "".join(arguments)
    assert [call.name for call in calls] == ["f.0", "f.1", "f.2"]
    assert len({call.id for call in calls}) == 3 and all(call.ends for call in calls)


def test_a_grammar_begins_behind_the_thoughts() -> None:
    tokens = tokenizer(thinks=True)
    for state, after in (("reasoning", tuple(tokens.think_end_tokens)), ("normal", ())):
        script: Any = Script(tokens, "{}")
        task = Task(Prompt([1], state=state), Sampling(), grammar="g")

        async def run(script: Any = script, task: Task = task) -> None:
            async for _ in Generator(script, tokens).start(task):
                pass

        asyncio.run(run())
        assert script.asked[0]["grammar_after"] == after


class Late(Script):
    """Says when it was begun, and can fail."""

    def __init__(self, name: str, log: list[str], fails: bool = False) -> None:
        super().__init__(tokenizer(), "To be or not")
        self.name, self.log, self.fails = name, log, fails

    async def generate(self, *given: Any, **settings: Any) -> Any:
        self.log.append(f"{self.name} begins")
        async for output in super().generate(*given, **settings):
            self.log.append(f"{self.name} goes on")
            yield output
            if self.fails:
                raise RuntimeError("lost")


def test_others_of_a_group_begin_behind_the_first_delta() -> None:
    log: list[str] = []
    links: list[Any] = [Late(name, log) for name in "abc"]
    task = Task(Prompt([1]), Sampling())
    a, b, c = (Generator(link, tokenizer()).start(task) for link in links)

    async def run() -> list[str]:
        texts = ["", "", ""]
        async for place, delta in run_together([[a, b], [c]]):
            texts[place] += delta.content
        return texts

    assert asyncio.run(run()) == ["To be or not"] * 3
    assert log.index("b begins") > log.index("a goes on") > log.index("c begins")
    assert [link.closed for link in links] == [1, 1, 1]


def test_only_the_last_delta_has_the_reason() -> None:
    """Also where all have come before the first one is read."""
    links: list[Any] = [Script(tokenizer(), "To be or not to be") for _ in range(2)]
    choices = [Generator(link, tokenizer()).start(Task(Prompt([1]), Sampling())) for link in links]

    async def run() -> list[list[str | None]]:
        reasons: list[list[str | None]] = [[], []]
        async for place, delta in run_together([choices]):
            while any(choice.finish_reason is None for choice in choices):
                await asyncio.sleep(0)
            reasons[place].append(delta.finish_reason)
        return reasons

    for reasons in asyncio.run(run()):
        assert len(reasons) > 2 and reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_one_that_fails_ends_all() -> None:
    log: list[str] = []
    links: list[Any] = [Late("a", log), Late("b", log, fails=True), Late("c", log)]
    task = Task(Prompt([1]), Sampling())
    choices = [Generator(link, tokenizer()).start(task) for link in links]

    async def run() -> None:
        async for _ in run_together([choices]):
            pass

    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(run())
    assert [link.closed for link in links] == [1, 1, 1]
    assert log.count("a goes on") < 12


@pytest.mark.parametrize("count", [1, 3])
def test_all_end_when_nobody_wants_the_rest(count: int) -> None:
    links: list[Any] = [Script(tokenizer(), "To be or not to be") for _ in range(count)]
    task = Task(Prompt([1]), Sampling())
    choices = [Generator(link, tokenizer()).start(task) for link in links]

    async def run() -> None:
        news = run_together([choices])
        seen = set()
        async for place, _ in news:
            seen.add(place)
            if len(seen) == count:
                break
        await news.aclose()
        assert [link.closed for link in links] == [1] * count

    asyncio.run(run())
    assert all(choice.finish_reason is None for choice in choices)
