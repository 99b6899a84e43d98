"""Answers by a schema beside calls in the model's own form."""

from __future__ import annotations

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.unit.server.texts import TOOLS, said, tokenizer
from zmoe.server.grammar import Grammars
from zmoe.server.tools import answer_or_calls_grammar

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "{}"}}</tool_call>'
MISTRAL = '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}'
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


def fits(tokens: TokenizerWrapper, text: str) -> bool:
    """Whether the grammar allows `text`, and its end."""
    grammars = Grammars(tokens)
    grammar = answer_or_calls_grammar(SCHEMA, tokens, grammars)
    grammars.check(grammar)
    constraint = grammars.start(grammar)
    for token in [*tokens.encode(text), 0]:
        mask = constraint.mask()
        assert mask is not None
        if not mask[token // 32] >> token % 32 & 1:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("parser", "text", "expected"), TEXTS)
def test_an_answer_or_calls(parser: str, text: str, expected: bool, special: bool) -> None:
    """Whether or not the markers are special tokens."""
    tokens = tokenizer(parser)
    if special:
        markers = [tokens.tool_call_start, tokens.tool_call_end]
        tokens.add_special_tokens({"additional_special_tokens": [m for m in markers if m]})
        assert len(tokens.encode(tokens.tool_call_start)) == 1
    assert fits(tokens, text) is expected


def test_such_calls_are_told_from_the_answer() -> None:
    tokens = tokenizer("json_tools")
    found, choice = said(CALL, tokens, tools=TOOLS, grammar="g")
    assert (len(found.tool_calls), found.content) == (1, "")
    assert choice.finish_reason == "tool_calls"
    found, choice = said('{"a": 1}', tokens, tools=TOOLS, grammar="g")
    assert (found.tool_calls, found.content, choice.finish_reason) == ([], '{"a": 1}', "stop")
