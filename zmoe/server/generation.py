"""One choice of a request while it is generated: from tokens to text, thoughts and tool calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.config import Sampling
from zmoe.server.errors import error_of
from zmoe.server.link import EngineError, EngineLink
from zmoe.server.messages import Logprobs, Output
from zmoe.server.prompts import Prompt
from zmoe.server.security import SALT

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass
class Delta:
    """What became certain with a step. `tokens` are its ids, and `logprobs` theirs, if wanted."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What is to be generated.

    `stop` are strings that end the text. `tools` are OpenAI's definitions, None where calls
    are not looked for; `forced` says that the grammar makes the text a JSON array of calls.
    `is_raw` leaves the text as it is: thoughts and calls are not told from it.
    """

    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...] = ()
    grammar: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    forced: bool = False
    is_raw: bool = False


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
        # A grammar's text is what the client has asked for, whatever it looks like.
        is_plain = task.is_raw or (task.grammar and not thoughts)
        roles = TextStateMachine() if is_plain else self._roles
        return Choice(task, outputs, self.tokenizer, roles)


class Choice:
    """Iterates over a choice's deltas; afterwards it has its end.

    `finish_reason` is None while it runs; `stop_string` is the one of the task's that ended it.
    `completion_tokens` counts those of thoughts and calls, too, and `cached_tokens` the prompt's
    that needed no computing. Iterating raises ApiError; closing ends the request.
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
        self._stops = TextStateMachine(
            {"": [(text, text) for text in task.stop], **{text: [] for text in task.stop}}
        ).make_state("")
        self._roles = roles.make_state(task.prompt.state if not task.is_raw else "normal")
        self._tool_text: str | None = None  # of a call that is being made
        self._called = False
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.prompt_tokens = len(task.prompt.ids)
        self.completion_tokens = self.cached_tokens = 0

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for output in self._outputs:
                delta = self._take(output)
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
                delta.tokens.append(token)
                delta.logprobs += output.logprobs[at : at + 1]
            if is_last and output.finish:
                self._detokenizer.finalize()
            self._stops, parts = TextStateMachine.split(self._stops, self._detokenizer.last_segment)
            self._tell_roles(parts[0][1], delta)
            if self._stops[0]:
                self.stop_string = self._stops[0]
                self._finish("stop", delta)
                return delta
        if output.finish:
            _, held_back, _ = TextStateMachine.flush(self._stops)
            self._tell_roles(held_back, delta)
            self._finish(output.finish, delta)
        return delta

    def _tell_roles(self, text: str, delta: Delta) -> None:
        self._roles, parts = TextStateMachine.split(self._roles, text)
        for state, part in parts:
            self._put(state, part, delta)

    def _put(self, state: str, text: str, delta: Delta) -> None:
        if state == "reasoning":
            delta.reasoning += text
        elif state == "tool" or self._task.forced:
            self._tool_text = (self._tool_text or "") + text
        else:
            self._end_call(delta)
            delta.content += text

    def _finish(self, reason: str, delta: Delta) -> None:
        self._roles, held_back, state = TextStateMachine.flush(self._roles)
        self._put(state, held_back, delta)
        self._end_call(delta)
        self.finish_reason = "length" if reason == "length" else "stop"
        if self._called and reason == "stop":
            self.finish_reason = "tool_calls"

    def _end_call(self, delta: Delta) -> None:
        """Make calls of the text of a call; what is none is content."""
        text, self._tool_text = self._tool_text, None
        if text is None:
            return
        calls = self._parse(text) if self._task.tools is not None else []
        delta.tool_calls += calls
        self._called = self._called or bool(calls)
        if not calls:
            start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
            delta.content += text if self._task.forced else f"{start}{text}{end or ''}"

    def _parse(self, text: str) -> list[ToolCall]:
        try:
            found = json.loads(text) if self._task.forced else self._by_model(text)
            calls = found if isinstance(found, list) else [found]
            return [
                ToolCall(_call_id(), str(call["name"]), _json(call.get("arguments", {})))
                for call in calls
            ]
        except Exception:  # the parsers of mlx-lm raise what they meet
            return []

    def _by_model(self, text: str) -> Any:
        return self._tokenizer.tool_parser(text, self._task.tools)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
