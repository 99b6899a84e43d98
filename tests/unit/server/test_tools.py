"""Answers by a schema beside calls in the model's own form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.unit.server.texts import TOOLS, said, tokenizer
from zmoe.server.errors import ApiError
from zmoe.server.grammar import Grammars
from zmoe.server.tools import Function, answer_or_calls_grammar, check_strict, strict_grammar

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "{}"}}</tool_call>'
MISTRAL = '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}'
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Function(name="weather", parameters=PARAMETERS, strict=True)
ANSWER_OR_CALLS = partial(answer_or_calls_grammar, SCHEMA, [Function(name="weather")])
STRICT = partial(strict_grammar, [WEATHER, Function(name="look")])
TEXTS: list[tuple[str, str, bool]] = [
    ("json_tools", '{"a": 1}', True),
    ("json_tools", '{"a": "1"}', False),
    ("json_tools", "Well: ", False),
    ("json_tools", CALL, True),
    ("json_tools", f"{CALL}\n{CALL}", True),
    ("json_tools", f'{CALL}{{"a": 1}}', False),
    ("json_tools", CALL.removesuffix("</tool_call>"), False),
    ("mistral", MISTRAL, True),
    ("mistral", '{"a": 1}', True),
    ("mistral", f'{{"a": 1}}{MISTRAL}', False),
]


def fits(tokens: TokenizerWrapper, text: str, make: Callable[..., str] = ANSWER_OR_CALLS) -> bool:
    """Whether the grammar allows `text`, and its end."""
    grammars = Grammars(tokens)
    grammar = make(tokens, grammars)
    grammars.check(grammar)
    constraint = grammars.start(grammar)
    for token in [*tokens.encode(text), 0]:
        mask = constraint.mask()
        assert mask is not None
        if not mask[token // 32] >> token % 32 & 1:
            return False
        constraint.accept(token)
    return True


def marked(parser: str, special: bool, *more: str) -> TokenizerWrapper:
    """A tokenizer whose markers are special tokens, or text."""
    tokens = tokenizer(parser, thinks=bool(more))
    if special:
        markers = [tokens.tool_call_start, tokens.tool_call_end, *more]
        tokens.add_special_tokens({"additional_special_tokens": [m for m in markers if m]})
        assert len(tokens.encode(tokens.tool_call_start)) == 1
    return tokens


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("parser", "text", "expected"), TEXTS)
def test_an_answer_or_calls(parser: str, text: str, expected: bool, special: bool) -> None:
    """Whether or not the markers are special tokens."""
    assert fits(marked(parser, special), text) is expected


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("It rains, <tool_cal or so.\n", True),
        (CALL, True),
        (f"I look.\n{CALL}\n{CALL} So.", True),
        (CALL.replace(">{", ">\n{").replace("}<", "}\n<"), True),
        (CALL.replace("weather", "look"), True),  # which is not strict
        (CALL.replace("weather", "no-such"), False),
        (CALL.replace('"city"', '"town"'), False),
        ("I look. " + CALL.replace('"city"', '"town"'), False),
        (CALL + CALL.replace('"{}"', "3"), False),
        (CALL.removesuffix("</tool_call>"), False),
    ],
)
def test_strict_functions(text: str, expected: bool, special: bool) -> None:
    """The text may be anything, and a call what fits its function."""
    assert fits(marked("json_tools", special), text, STRICT) is expected
    thinking = marked("json_tools", special, "<think>", "</think>")
    assert fits(thinking, f"<think>Hm.</think>{text}", STRICT) is expected


def test_strict_functions_beside_an_answer_by_a_schema() -> None:
    grammar = partial(answer_or_calls_grammar, SCHEMA, [WEATHER])
    tokens = tokenizer("json_tools")
    assert fits(tokens, '{"a": 1}', grammar) and fits(tokens, CALL, grammar)
    assert not fits(tokens, "Well: ", grammar)
    assert not fits(tokens, CALL.replace('"{}"', "3"), grammar)


def test_a_model_whose_calls_cannot_be_kept_to_a_schema() -> None:
    functions = {2: Function(name="look"), 4: WEATHER}
    check_strict(functions, tokenizer("json_tools"), "strict")
    check_strict({2: functions[2]}, tokenizer("glm47"), "strict")
    with pytest.raises(ApiError, match="strict cannot be kept to") as raised:
        check_strict(functions, tokenizer("glm47"), "function.strict")
    assert raised.value.param == "tools[4].function.strict"


def test_such_calls_are_told_from_the_answer() -> None:
    tokens = tokenizer("json_tools")
    found, choice = said(CALL, tokens, tools=TOOLS, grammar="g")
    assert (len(found.tool_calls), found.content) == (1, "")
    assert choice.finish_reason == "tool_calls"
    found, choice = said('{"a": 1}', tokens, tools=TOOLS, grammar="g")
    assert (found.tool_calls, found.content, choice.finish_reason) == ([], '{"a": 1}', "stop")
