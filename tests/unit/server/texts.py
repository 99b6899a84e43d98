"""A model that says what a test has written down, in the place of an engine."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from transformers import AutoTokenizer

from zmoe.checkpoint.hub import resolve_model
from zmoe.config import Sampling
from zmoe.server.generation import Choice, Delta, Generator, Task
from zmoe.server.messages import Output
from zmoe.server.pieces import Event, Teller, events_of
from zmoe.server.prompts import Prompt

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]


def tokenizer(parser: str | None = None, *, thinks: bool = False) -> TokenizerWrapper:
    """zmoe-tiny's, with the tool calls of one of mlx-lm's parsers."""
    inner = AutoTokenizer.from_pretrained(Path(resolve_model("zmoe-tiny")))
    if thinks:
        inner.add_tokens(["<think>", "</think>"])
    if parser is None:
        return TokenizerWrapper(inner, BPEStreamingDetokenizer)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return TokenizerWrapper(
        inner,
        BPEStreamingDetokenizer,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )


class Script:
    """An EngineLink that gives `text`, `size` tokens a step, and remembers what it was asked."""

    def __init__(
        self, tokens: TokenizerWrapper, text: str, size: int = 1, finish: str = "stop"
    ) -> None:
        self.ids = list(tokens.encode(text))
        if finish == "stop":
            self.ids.append(0)
        self.size, self.finish = size, finish
        self.asked: list[dict[str, Any]] = []
        self.closed = 0

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, **settings: Any
    ) -> AsyncGenerator[Output]:
        self.asked.append({"prompt": list(prompt), "sampling": sampling, **settings})
        try:
            for at in range(0, len(self.ids), self.size):
                await asyncio.sleep(0)
                step = tuple(self.ids[at : at + self.size])
                is_last = at + self.size >= len(self.ids)
                yield Output(0, step, (), self.finish if is_last else "", "", "", 0)
        finally:
            self.closed += 1


def spoken(
    text: str,
    tokens: TokenizerWrapper | None = None,
    *,
    size: int = 1,
    finish: str = "stop",
    state: str = "normal",
    **task: Any,
) -> tuple[Choice, Script]:
    """A choice that will be `text`, and what it comes from."""
    tokens = tokens or tokenizer()
    script: Any = Script(tokens, text, size, finish)
    prompt = Prompt([1, 2, 3], state=state)
    return Generator(script, tokens).start(Task(prompt, Sampling(), **task)), script


def said(*given: Any, **settings: Any) -> tuple[Delta, Choice]:
    """All that comes of a text, and the choice at its end; takes what spoken() does."""
    choice, script = spoken(*given, **settings)

    async def run() -> Delta:
        found = Delta()
        async for delta in choice:
            found.add(delta)
        return found

    found = asyncio.run(run())
    assert script.closed == 1
    return found, choice


def events_told(choice: Choice, teller: Teller) -> list[Event]:
    """The events that `teller` makes of a choice, as they are when they are told."""

    async def run() -> list[Event]:
        return [json.loads(json.dumps(each)) async for each in events_of(choice, teller)]

    return asyncio.run(run())
