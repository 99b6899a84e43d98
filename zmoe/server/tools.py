"""Tools that a client offers, and grammars by which a model must call them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import BeforeValidator, Field

from zmoe.errors import InputError
from zmoe.server.errors import invalid
from zmoe.server.fields import refused
from zmoe.server.grammar import JSON_FORM, Grammars, json_grammar
from zmoe.server.http import Body

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
    calls = " | ".join(f"call_{at}" for at in range(len(functions)))
    more = f'(", " call){{0,{most - 1}}}' if most > 1 else ""  # {0,0} is taken as {0,1}
    rules = [f'start: "[" call {more} "]"', f"call: {calls}"]
    for at, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        schema = {"x-guidance": JSON_FORM, **_schema(function)}
        rules.append(f'call_{at}: {head} %json {json.dumps(schema)} "}}"')
    return "\n".join(rules)


def check_parameters(
    grammars: Grammars, functions: dict[int, Function], field: str = "function.parameters"
) -> None:
    """Raise ApiError that names the first schema that cannot be compiled, a tool's `field`."""
    for at, function in functions.items():
        try:
            grammars.check(json_grammar(_schema(function)))
        except InputError as error:
            param = f"tools[{at}].{field}"
            raise invalid(param, f"cannot be compiled: {error}") from None


def _schema(function: Function) -> dict[str, Any]:
    return {"type": "object", **function.parameters}


def answer_or_calls_grammar(
    schema: Mapping[str, Any], tokenizer: TokenizerWrapper, grammars: Grammars
) -> str:
    """The grammar of JSON that `schema` describes, or else of calls in the model's own form."""
    start = _marker(tokenizer.tool_call_start, tokenizer, grammars)
    end = _marker(tokenizer.tool_call_end or "", tokenizer, grammars)
    is_text = end.startswith('"') and end != '""'  # which the body could hold, too
    return "\n".join(
        (
            "start: answer | call (/[ \\n]{1,4}/ call)*",
            f"answer: %json {json.dumps({'x-guidance': JSON_FORM, **schema})}",
            f"call: {start} body" + ("" if is_text else f" {end}"),
            f"body{f'[suffix={end}]' if is_text else ''}: /(.|\\n)*/",
        )
    )


def _marker(marker: str, tokenizer: TokenizerWrapper, grammars: Grammars) -> str:
    """A marker of the model's, as a special token if it is one, else as a text."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    is_special = len(ids) == 1 and grammars.is_special(ids[0])
    return f"<[{ids[0]}]>" if is_special else json.dumps(marker)
