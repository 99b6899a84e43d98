"""Grammars of what a model must write: calls, or JSON by a schema."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# The spaces of Python's json.dumps, which models know, and no others: one could go on with
# them for ever.
_SPACES = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def forced_calls(tools: Sequence[Mapping[str, Any]], names: Collection[str], parallel: bool) -> str:
    """A grammar (llguidance's Lark) of a JSON array of calls, {"name": ..., "arguments": {...}}.

    `tools` are OpenAI's definitions of functions; the calls are of those in `names`. The array has
    one call, or at least one where they may be `parallel`. Whether the schemas can be compiled
    shows when the grammar is.
    """
    chosen = [tool["function"] for tool in tools if tool["function"]["name"] in names]
    more = '(", " call)*' if parallel else ""
    rules = [f'start: "[" call {more} "]"']
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(chosen))))
    for at, function in enumerate(chosen):
        opening = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        rules.append(f'call_{at}: {json.dumps(opening)} arguments_{at} "}}"')
        # A rule of its own for each schema, since references begin at a schema's root.
        rules.append(f"arguments_{at}: %json {json.dumps(_schema(function))}")
    return "\n".join(rules)


def json_text(schema: Mapping[str, Any]) -> str:
    """The grammar of a JSON text by `schema` (JSON Schema)."""
    return f"start: %json {json.dumps({'x-guidance': _SPACES, **schema})}"


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """That of the arguments, an object."""
    return {"x-guidance": _SPACES, "type": "object", **(function.get("parameters") or {})}
