"""One choice of a request while it is generated: from tokens to text, thoughts and tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.config import Sampling
from zmoe.server.calls import ForcedCalls, ToolCall, add_calls, parsed_call
from zmoe.server.errors import error_of
from zmoe.server.link import EngineError, EngineLink
from zmoe.server.messages import Logprobs, Output
from zmoe.server.prompts import Prompt
from zmoe.server.security import SALT

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass
class Delta:
    """What became certain with a step. `tokens` are its ids, and `logprobs` theirs, if wanted;
    `finish_reason` has the choice's last one, and no other, however late they are read.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, other: Delta) -> None:
        """Append what a later step has made."""
        self.content += other.content
        self.reasoning += other.reasoning
        add_calls(self.tool_calls, other.tool_calls)
        self.tokens += other.tokens
        self.logprobs += other.logprobs


@dataclass(frozen=True)
class Task:
    """What is to be generated.

    `stop` are strings that end the text, thoughts and calls apart. `tools` are OpenAI's
    definitions, None where calls are not looked for; `forced` says that the grammar makes the
    text a JSON array of calls, and `one_call` ends it behind the first one. `is_raw` leaves the
    text as it is: thoughts and calls are not told from it.
    """

    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...] = ()
    grammar: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    forced: bool = False
    one_call: bool = False
    is_raw: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the text behind the thoughts has no calls in the model's own form. What a grammar
        makes is text, whatever it looks like.
        """
        return self.is_raw or self.forced or (bool(self.grammar) and self.tools is None)


class Generator:
    """Generates choices on one engine, for one model."""

    def __init__(self, link: EngineLink, tokenizer: TokenizerWrapper) -> None:
        self._link, self.tokenizer = link, tokenizer
        self._roles = make_text_state_machine(tokenizer)

    def start(self, task: Task) -> Choice:
        """A choice that begins when it is first asked for a delta."""
        thoughts = task.prompt.state == "reasoning" and not task.is_raw
        outputs = self._link.generate(
            task.prompt.ids,
            task.sampling,
            borders=task.prompt.borders,
            salt=SALT.get(),
            grammar=task.grammar,
            grammar_after=tuple(self.tokenizer.think_end_tokens or ()) if thoughts else (),
        )
        roles = self._roles
        if task.is_plain:
            closed = [(self.tokenizer.think_end, "normal")] if thoughts else []
            roles = TextStateMachine({"reasoning": closed, "normal": []})
        return Choice(task, outputs, self.tokenizer, roles)


class Choice:
    """Iterates over a choice's deltas; afterwards it has its end.

    `finish_reason` is None while it runs; `stop_string` is the one of the task's that ended it.
    `completion_tokens` counts those of thoughts and calls, too, `reasoning_tokens` the thoughts',
    and `cached_tokens` the prompt's that needed no computing. Iterating raises ApiError; closing
    ends the request.
    """

    def __init__(
        self,
        task: Task,
        outputs: AsyncGenerator[Output],
        tokenizer: TokenizerWrapper,
        roles: TextStateMachine,
    ) -> None:
        self._task, self._outputs, self._tokenizer = task, outputs, tokenizer
        self._detokenizer = tokenizer.detokenizer
        # Or mlx-lm takes away the blank with which the text goes on.
        if task.is_raw or task.prompt.goes_on:
            self._detokenizer.add_token(task.prompt.ids[-1])
            self._detokenizer.finalize()
            self._detokenizer.last_segment  # noqa: B018 - what is read is not told again
        self._stops = TextStateMachine(
            {"": [(text, text) for text in task.stop], **{text: [] for text in task.stop}}
        ).make_state("")
        is_text = task.is_raw or (task.is_plain and task.prompt.state != "reasoning")
        self._roles = roles.make_state("normal" if is_text else task.prompt.state)
        self._tool_text: str | None = None  # of a call that is being made
        self._forced = ForcedCalls()
        self._called = False
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.prompt_tokens = len(task.prompt.ids)
        self.completion_tokens = self.reasoning_tokens = self.cached_tokens = 0

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for output in self._outputs:
                delta = self._take(output)
                delta.finish_reason = self.finish_reason
                yield delta
                if self.finish_reason is not None:
                    return
        except EngineError as error:
            raise error_of(error) from None
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
        await self._outputs.aclose()

    def _take(self, output: Output) -> Delta:
        """What the tokens of a step add."""
        self.cached_tokens = output.cached
        delta = Delta()
        for at, token in enumerate(output.tokens):
            is_last = at == len(output.tokens) - 1
            if not (is_last and output.finish == "stop"):
                self._detokenizer.add_token(token)
                self.completion_tokens += 1
                self.reasoning_tokens += self._roles[0] == "reasoning"
                delta.tokens.append(token)
                delta.logprobs += output.logprobs[at : at + 1]
            if is_last and output.finish:
                self._detokenizer.finalize()
            self._roles, parts = TextStateMachine.split(self._roles, self._detokenizer.last_segment)
            for state, text in parts:
                self._put(state, text, delta)
                if self.finish_reason is not None:
                    return delta
        if output.finish:
            self._roles, held_back, state = TextStateMachine.flush(self._roles)
            self._put(state, held_back, delta)
            self._end_call(delta, is_closed=False)
            self._release(delta)
            if self.finish_reason is None:
                self._finish(output.finish)
        return delta

    def _put(self, state: str, text: str, delta: Delta) -> None:
        if self._task.forced and state != "reasoning":
            self._put_forced(text, delta)
            return
        if state == "tool":
            self._release(delta)
            self._tool_text = (self._tool_text or "") + text
            return
        self._end_call(delta)
        if self.finish_reason is None and state == "reasoning":
            delta.reasoning += text
        elif self.finish_reason is None and state == "normal":  # other states are headers
            self._put_content(text, delta)

    def _put_content(self, text: str, delta: Delta) -> None:
        """Add what can no longer be the beginning of a stop string."""
        self._stops, parts = TextStateMachine.split(self._stops, text)
        delta.content += parts[0][1]
        if self._stops[0]:
            self.stop_string = self._stops[0]
            self._finish("stop")

    def _put_forced(self, text: str, delta: Delta) -> None:
        """Add the calls of the JSON array, as far as they have come."""
        for piece in self._forced.read(text):
            add_calls(delta.tool_calls, [piece])
            self._called |= piece.ends
            if piece.ends and self._task.one_call:
                self._finish("stop")
                return

    def _release(self, delta: Delta) -> None:
        """Add what was held back for the stop strings."""
        if self.stop_string is None:
            self._stops, held_back, _ = TextStateMachine.flush(self._stops)
            delta.content += held_back

    def _end_call(self, delta: Delta, is_closed: bool = True) -> None:
        """Make calls of the text of a call; what is none is content."""
        text, self._tool_text = self._tool_text, None
        if text is None:
            return
        calls = self._parse(text) if self._task.tools is not None else []
        if not calls:
            start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
            self._put_content(f"{start}{text}{end or '' if is_closed else ''}", delta)
            return
        self._called = True
        if self._task.one_call:
            del calls[1:]
            self._finish("stop")
        delta.tool_calls += calls

    def _finish(self, reason: str) -> None:
        if self._called and reason == "stop":
            self.finish_reason = "tool_calls"
        else:
            self.finish_reason = "length" if reason == "length" else "stop"

    def _parse(self, text: str) -> list[ToolCall]:
        try:
            found = self._tokenizer.tool_parser(text, self._task.tools)
            return [parsed_call(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # the parsers of mlx-lm raise what they meet
            return []


async def run_together(
    groups: Sequence[Sequence[Choice]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield the deltas of all choices, each with its choice's place among them.

    The choices of a group have one prompt: the others begin behind the first one's first delta,
    so that they find the prompt in the cache. Raises ApiError, and ends all of them.
    """
    choices = [choice for group in groups for choice in group]
    if len(choices) == 1:
        async with aclosing(choices[0]):
            async for delta in choices[0]:
                yield 0, delta
        return
    news: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()  # bounded by max_tokens

    async def run(place: int, choice: Choice, is_first: bool, go: asyncio.Event) -> None:
        try:
            if not is_first:
                await go.wait()
            async with aclosing(choice):
                async for delta in choice:
                    news.put_nowait((place, delta))
                    go.set()
        finally:
            news.put_nowait((place, None))

    tasks: list[asyncio.Task[None]] = []
    for group in groups:
        go = asyncio.Event()
        for choice in group:
            work = run(len(tasks), choice, choice is group[0], go)
            tasks.append(asyncio.create_task(work))
    try:
        running = len(tasks)
        while running:
            place, news_of = await news.get()
            if news_of is not None:
                yield place, news_of
                continue
            running -= 1
            await tasks[place]  # raises what it has raised
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
