"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import Field
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zmoe.server.choices import endpoint, head_of
from zmoe.server.errors import invalid
from zmoe.server.fields import MOST_CHOICES, CompletionFields, usage
from zmoe.server.front import Front
from zmoe.server.generation import Delta, Task, run_together
from zmoe.server.http import event
from zmoe.server.prompts import Prompt
from zmoe.server.token_texts import TextLogprobs


class CompletionRequest(CompletionFields):
    """The body of a request. `prompt`: a text, several, token ids, or several lists of these."""

    prompt: Any
    echo: bool = False
    best_of: int | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    async def groups(self, front: Front) -> list[list[Task]]:
        """What is to be generated, `n` tasks for each prompt. Raises ApiError."""
        self.check()
        if self.best_of not in (None, self.n):
            raise invalid("best_of", "differs from n, and choosing the best is not supported")
        if self.echo and self.logprobs is not None:
            raise invalid("logprobs", "cannot be combined with echo: a prompt has none")
        prompts = await front.apart(self._prompts, front)
        grammar = await self.answer_grammar(front)
        return [
            [
                Task(prompt, sampling, stop=tuple(self.stop), grammar=grammar, is_raw=True)
                for sampling in self.samplings(
                    front, prompt, "prompt", max_tokens=self.max_tokens, top=self.logprobs
                )
            ]
            for prompt in prompts
        ]

    def _prompts(self, front: Front) -> list[Prompt]:
        given = self.prompt
        if isinstance(given, list) and given and isinstance(given[0], (str, list)):
            if len(given) * self.n > MOST_CHOICES:
                wanted = len(given) * self.n
                raise invalid("prompt", f"makes {wanted} choices: at most {MOST_CHOICES} may be")
            return [self._prompt(front, one, f"prompt[{at}]") for at, one in enumerate(given)]
        return [self._prompt(front, given, "prompt")]

    def _prompt(self, front: Front, given: Any, param: str) -> Prompt:
        if isinstance(given, str):
            return front.prompts.of_text(given, param)
        if isinstance(given, list):
            return front.prompts.of_ids(given, param)
        raise invalid(param, "is neither a text nor a list of token ids")


def routes(front: Front) -> list[Route]:
    """The endpoint."""

    async def begin(body: CompletionRequest) -> _Answer:
        return _Answer(front, body, await body.groups(front))

    summary = "Go on with a text, or with token ids"
    return [endpoint(front, "/v1/completions", summary, CompletionRequest, begin)]


class _Answer:
    def __init__(self, front: Front, body: CompletionRequest, groups: list[list[Task]]) -> None:
        self._body = body
        self._groups = [[front.generator.start(task) for task in group] for group in groups]
        self._choices = [choice for group in self._groups for choice in group]
        self._prompts = [task.prompt for group in groups for task in group]
        self._echoes = [
            str(front.tokenizer.decode(prompt.ids)) if body.echo else "" for prompt in self._prompts
        ]
        self._logprobs = [TextLogprobs(front.grammars) for _ in self._choices]
        self._head = head_of(front, "cmpl") | {"object": "text_completion"}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """See choices.Answer."""
        options = self._body.stream_options
        has_usage = options is not None and options.include_usage
        head = self._head | ({"usage": None} if has_usage else {})
        begun: set[int] = set()
        async with aclosing(run_together(self._groups)) as news:
            async for place, delta in news:
                is_first = place not in begun
                begun.add(place)
                reason = delta.finish_reason
                if is_first:
                    delta.content = self._echoes[place] + delta.content
                extra = self._extra(place, delta, is_first)
                if delta.content or reason or (extra and delta.tokens):
                    choice = _choice(place, delta.content, reason) | extra
                    yield event(head | {"choices": [choice]})
        if has_usage:
            yield event(head | {"choices": [], "usage": usage(self._groups)})
        yield event("[DONE]")

    async def whole(self) -> Response:
        """See choices.Answer."""
        sums = [Delta(echo) for echo in self._echoes]
        async with aclosing(run_together(self._groups)) as news:
            async for place, delta in news:
                sums[place].add(delta)
        choices = [
            _choice(place, found.content, choice.finish_reason) | self._extra(place, found, True)
            for place, (choice, found) in enumerate(zip(self._choices, sums))
        ]
        return JSONResponse(self._head | {"choices": choices, "usage": usage(self._groups)})

    def _extra(self, place: int, delta: Delta, is_first: bool) -> dict[str, Any]:
        """What was asked for besides the text."""
        found: dict[str, Any] = {}
        if self._body.logprobs is not None:
            found["logprobs"] = self._logprobs[place].of(delta)
        if self._body.return_token_ids:
            found["token_ids"] = delta.tokens
            if is_first:
                found["prompt_token_ids"] = self._prompts[place].ids
        return found


def _choice(place: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": reason}
