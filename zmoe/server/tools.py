"""Tools that a client offers, and grammars by which a model must call them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from pydantic import BeforeValidator, Field

from zmoe.errors import InputError
from zmoe.server.errors import invalid
from zmoe.server.fields import refused
from zmoe.server.grammar import JSON_FORM, Grammars, json_grammar
from zmoe.server.http import Body

_ANY: dict[str, Any] = {"type": "object"}
MOST_CALLS = 16  # that a grammar lets a model make at once


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Body):
    """A tool. Others than functions run on a service's side, and there is none here."""

    type: Literal["function"]
    function: Function


class Name(Body):
    """The name of a function."""

    name: str


def _kind(given: Any) -> Any:
    if given == "function":
        raise refused('is "function": expected an object with the name of the function')
    return {"type": given} if isinstance(given, str) else given


class _Choice(Body):
    type: Literal["auto", "none", "required", "function"]
    function: Name | None = None


ToolChoice = Annotated[_Choice, BeforeValidator(_kind)]


def check_names(names: Sequence[str], param: str) -> None:
    """Raise ApiError where two tools have one name; `param` is the field of a name, with {}."""
    seen = set()
    for at, name in enumerate(names):
        if name in seen:
            raise invalid(param.format(at), f"is {name!r}, as that of another tool")
        seen.add(name)


def callable_tools(tools: Sequence[Tool], choice: _Choice | None) -> dict[int, Function]:
    """The functions that the model may call now, by place in `tools`. Raises ApiError."""
    check_names([tool.function.name for tool in tools], "tools[{}].function.name")
    functions = {at: tool.function for at, tool in enumerate(tools)}
    if choice is None or choice.type == "auto":
        return functions
    if choice.type == "none":
        return {}
    if not tools:
        raise invalid("tool_choice", "asks for a call, and there are no tools")
    if choice.type == "function":
        if choice.function is None:
            raise invalid("tool_choice.function", "is missing")
        functions = {at: f for at, f in functions.items() if f.name == choice.function.name}
        if not functions:
            raise invalid("tool_choice.function.name", f"{choice.function.name!r} is no tool")
    return functions


def calls_grammar(functions: Sequence[Function], most: int) -> str:
    """The grammar of a JSON array of 1 to `most` calls, {"name": ..., "arguments": {...}}.

    Each schema is a grammar of its own, so that references stay within it.
    """
    more = f'(", " call){{0,{most - 1}}}' if most > 1 else ""  # {0,0} is taken as {0,1}
    strict = [function.model_copy(update={"strict": True}) for function in functions]
    return "\n".join([f'start: "[" call {more} "]"', *_call_rules(strict)])


def _call_rules(functions: Sequence[Function]) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{at}" for at in range(len(functions)))]
    for at, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        schema = {"x-guidance": JSON_FORM} | (_schema(function) if function.strict else _ANY)
        rules.append(f'call_{at}: {head} %json {json.dumps(schema)} "}}"')
    return rules


def check_parameters(grammars: Grammars, functions: Mapping[int, Function], field: str) -> None:
    """Raise ApiError that names the first schema that cannot be compiled, a tool's `field`."""
    for at, function in functions.items():
        try:
            grammars.check(json_grammar(_schema(function)))
        except InputError as error:
            param = f"tools[{at}].{field}"
            raise invalid(param, f"cannot be compiled: {error}") from None


def _schema(function: Function) -> dict[str, Any]:
    return _ANY | function.parameters


def check_strict(
    functions: Mapping[int, Function], tokenizer: TokenizerWrapper, field: str
) -> None:
    """Raise ApiError that names the first function which is strict, a tool's `field`, if the
    model's own form of calls is none that a grammar can hold to a schema.
    """
    can_be_kept_to = tokenizer.tool_parser is json_tools.parse_tool_call
    for at, function in functions.items():
        if function.strict and not can_be_kept_to:
            raise invalid(
                f"tools[{at}].{field}",
                "cannot be kept to in the form in which this model calls: a tool_choice that asks "
                "for a call makes calls by a grammar",
            )


def strict_grammar(
    functions: Sequence[Function], tokenizer: TokenizerWrapper, grammars: Grammars
) -> str:
    """The grammar of text with calls in the model's own form, in which those of strict functions
    keep to their schemas, and others are of known functions. See check_strict().
    """
    start = _marker(tokenizer.tool_call_start, tokenizer, grammars)
    thoughts = [tokenizer.think_start, tokenizer.think_end] if tokenizer.has_thinking else []
    marks = [_marker(mark, tokenizer, grammars) for mark in thoughts]
    special = [mark for mark in marks if mark.startswith("<")]  # others are text
    if start.startswith("<"):
        pieces = " | ".join(["TEXT", *special, f"{start} body"])
        rules = [f"start: ({pieces})*", "TEXT: /(.|\\n)+/"]
    else:
        pieces = " | ".join(["before body", *(f"TEXT? {mark}" for mark in special)])
        marker = re.escape(tokenizer.tool_call_start).replace("/", "\\/")
        rules = [
            f"start: ({pieces})* TEXT?",
            f"before[suffix={start}]: /(.|\\n)*/",
            f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*{marker}(.|\\n)*/",
        ]
    return "\n".join([*rules, *_strict_body(functions, tokenizer, grammars)])


def answer_or_calls_grammar(
    schema: Mapping[str, Any],
    functions: Sequence[Function],
    tokenizer: TokenizerWrapper,
    grammars: Grammars,
) -> str:
    """The grammar of JSON that `schema` describes, or else of calls in the model's own form; with
    a strict function as in strict_grammar().
    """
    start = _marker(tokenizer.tool_call_start, tokenizer, grammars)
    end = _marker(tokenizer.tool_call_end or "", tokenizer, grammars)
    rules = [
        f"start: answer | {start} body (/[ \\n]{{1,4}}/ {start} body)*",
        f"answer: %json {json.dumps({'x-guidance': JSON_FORM, **schema})}",
    ]
    if any(function.strict for function in functions):
        rules += _strict_body(functions, tokenizer, grammars)
    elif end.startswith('"') and end != '""':  # a text, which the body could hold, too
        rules.append(f"body[suffix={end}]: /(.|\\n)*/")
    else:
        rules.append(f"body: /(.|\\n)*/ {end}")
    return "\n".join(rules)


def _strict_body(
    functions: Sequence[Function], tokenizer: TokenizerWrapper, grammars: Grammars
) -> list[str]:
    """The rules of what follows the marker of a call."""
    end = _marker(tokenizer.tool_call_end or "", tokenizer, grammars)
    return [f"body: BLANK? call BLANK? {end}", "BLANK: /[ \\n]{1,4}/", *_call_rules(functions)]


def _marker(marker: str, tokenizer: TokenizerWrapper, grammars: Grammars) -> str:
    """A marker of the model's, as a special token if it is one, else as a text."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    is_special = len(ids) == 1 and grammars.is_special(ids[0])
    return f"<[{ids[0]}]>" if is_special else json.dumps(marker)
