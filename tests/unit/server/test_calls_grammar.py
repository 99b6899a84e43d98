"""The grammar of forced calls takes the calls that a client can use, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmoe.checkpoint.hub import resolve_model
from zmoe.config import DEFAULT_MODEL
from zmoe.engine.prompt import open_tokenizer
from zmoe.server.grammar import Grammars
from zmoe.server.tools import Function, calls_grammar

POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/coordinate"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"coordinate": {"type": "integer"}},
}
FUNCTIONS = [
    Function(name="move-to", parameters=POINT),
    Function(name="look"),
]
BOTH = {"move-to", "look"}
MOVE, LOOK = '{"name": "move-to", "arguments": {"x": 3}}', '{"name": "look", "arguments": {}}'


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(open_tokenizer(Path(resolve_model(DEFAULT_MODEL))))


@pytest.mark.parametrize(
    ("text", "names", "parallel", "fits"),
    [
        (f"[{MOVE}]", BOTH, False, True),
        (f"[{LOOK}]", BOTH, False, True),
        ('[{"name": "look", "arguments": {"at": ["a", 1.5]}}]', BOTH, False, True),
        (f"[{MOVE}, {LOOK}]", BOTH, True, True),
        (f"[{MOVE}, {LOOK}]", BOTH, False, False),
        ("[]", BOTH, True, False),
        (f"[{LOOK}]", {"move-to"}, True, False),
        (f"[{MOVE}]", {"move-to"}, True, True),
        ('[{"name": "move-to", "arguments": {"x": "3"}}]', BOTH, True, False),
        ('[{"name": "move-to", "arguments": {}}]', BOTH, True, False),
        ('[{"name": "look", "arguments": []}]', BOTH, True, False),
        ('[{"name": "look", "arguments": {' + " " + "}}]", BOTH, True, False),
        (f"[{LOOK}, {LOOK}, {LOOK}]", BOTH, True, False),
        ('[{"name": "jump", "arguments": {}}]', BOTH, True, False),
    ],
)
def test_calls_grammar(
    grammars: Grammars, text: str, names: set[str], parallel: bool, fits: bool
) -> None:
    grammar = calls_grammar([f for f in FUNCTIONS if f.name in names], 2 if parallel else 1)
    grammars.check(grammar)
    matcher = grammars._compile(grammar)
    tokens = grammars._tokenizer.encode(text, add_special_tokens=False)
    taken = matcher.try_consume_tokens(tokens)
    assert (taken == len(tokens) and matcher.is_accepting()) == fits
