"""A generation as its consumer sees it: tokens with their text, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.engine.stream import Stream, Timings


@dataclass(frozen=True)
class Token:
    """A generated token and the text that became certain with it.

    `text` is empty while a character's bytes are incomplete; `finish_reason`
    is set on the last token: "stop" or "length". `logprob` and `top_logprobs`, (id, logprob)
    from the likeliest on, are natural logarithms of the model's probabilities; they are
    there where Sampling.logprobs is set.
    """

    id: int
    text: str
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Generation(Iterator[Token], AsyncIterator[Token]):
    """Iterates over a generation's tokens; afterwards `tokens`, `text`, `timings`, `finish_reason`.

    Whoever waits for a token runs the cluster's steps meanwhile, for all generations; tokens of
    other generations are kept for their consumers. Stopping early is fine: close() ends
    the sequence before the next step, as does letting go of this object.
    `context_full`: whether the "length" that it ended with is the model's context, with
    fewer tokens than `max_tokens`. `seed`: that of Sampling, or the one drawn in its place.
    Of one that goes on behind tokens of another, these are in `tokens` and `text` from the start.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: TokenizerWrapper,
        *,
        advance: Callable[[], None],
        advance_async: Callable[[], Awaitable[None]],
        cancel: Callable[[], None],
    ) -> None:
        """`advance` runs a step, and raises what it raises; `cancel` ends the sequence, from
        whichever thread.
        """
        self._stream, self._detokenizer = stream, tokenizer.detokenizer
        self._advance, self._advance_async, self._cancel = advance, advance_async, cancel
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.context_full = False
        self.seed = stream.seed
        for token in stream.generated or ():
            self._add(token)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return tuple(self._stream.prompt)

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        return self._stream.timings

    def __next__(self) -> Token:
        while not self._stream.ready:
            if self._stream.is_over():
                raise StopIteration
            self._advance()
        return self._deliver()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        while not self._stream.ready:
            if self._stream.is_over():
                raise StopAsyncIteration
            await self._advance_async()
        return self._deliver()

    def close(self) -> None:
        """Stop generating; tokens that are ready are dropped."""
        self._stream.ready.clear()
        if not self._stream.ended:
            self._stream.ended = True
            self._cancel()

    async def aclose(self) -> None:
        """As close()."""
        self.close()

    def __del__(self) -> None:
        if not self._stream.ended:
            self.close()

    def _deliver(self) -> Token:
        pick, reason = self._stream.ready.popleft()
        begun = len(self.text)
        if reason != "stop":
            self._add(pick.token)
        if reason is not None:
            self.finish_reason = reason
            self.context_full = reason == "length" and self._stream.context_full
            self._detokenizer.finalize()
            self.text += self._detokenizer.last_segment
        text = self.text[begun:]
        return Token(pick.token, text, reason, pick.logprob, pick.top_logprobs)

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        self._detokenizer.add_token(token)
        self.text += self._detokenizer.last_segment


class SharedSteps:
    """Lets the coroutines of an event loop wait for one step together, in a thread beside it."""

    def __init__(self) -> None:
        self._step: asyncio.Future[None] | None = None

    async def advance(self, step: Callable[[], None]) -> None:
        """Wait for the step that is running, or run one. Raises what it raises."""
        loop = asyncio.get_running_loop()
        running = self._step
        if running is None or running.done() or running.get_loop() is not loop:
            running = self._step = loop.run_in_executor(None, step)
        await asyncio.shield(running)
