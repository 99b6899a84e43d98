"""The token loop of the leader: prefill, sample, stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.config import Sampling
from zmoe.obs import Spans

# Runs one step on all ranks: (tokens, starts a new sequence, logits are wanted)
# -> logits (vocabulary,)
StepFunction = Callable[[Sequence[int], bool, bool], mx.array]


@dataclass(frozen=True)
class Token:
    """A generated token and the text that became certain with it.

    `text` is empty while a character's bytes are incomplete; `finish_reason`
    is set on the last token: "stop" or "length".
    """

    id: int
    text: str
    finish_reason: str | None = None


@dataclass
class Timings:
    """Seconds of a generation, filled in as it goes.

    `prefill` is the forward passes over the prompt, and `first_token` the time until the
    first token is picked: `prefill`, and sampling, which MLX compiles when it is first used.
    `decode` counts the steps after the first token, and `spans` what they
    spent in `experts` and `exchange`.
    """

    prompt_tokens: int = 0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0
    decode_steps: int = 0
    spans: dict[str, float] = field(default_factory=dict)

    @property
    def prompt_tps(self) -> float:
        return self.prompt_tokens / self.prefill if self.prefill else 0.0

    @property
    def generation_tps(self) -> float:
        return self.decode_steps / self.decode if self.decode else 0.0

    def overhead_us(self, layers: int) -> float | None:
        """Mean microseconds per decoded token and layer that are neither product nor exchange.

        None where MLX computes the matmuls, whose time nobody can tell from the rest.
        """
        if "matmuls" not in self.spans or not self.decode_steps:
            return None
        spent = self.decode - self.spans["matmuls"] - self.spans.get("exchange", 0.0)
        return 1e6 * spent / self.decode_steps / layers

    def breakdown_ms(self) -> dict[str, float]:
        """Mean milliseconds per decoded token: experts, exchange, other."""
        steps = max(1, self.decode_steps)
        experts, exchange = self.spans.get("experts", 0.0), self.spans.get("exchange", 0.0)
        other = max(0.0, self.decode - experts - exchange)
        parts = {"experts_ms": experts, "exchange_ms": exchange, "other_ms": other}
        return {name: 1e3 * seconds / steps for name, seconds in parts.items()}


class Generation(Iterator[Token]):
    """Iterates over a generation's tokens; afterwards `tokens`, `text`, `timings`, `finish_reason`.

    `context_full`: whether the "length" that it ended with is the model's context, with
    fewer tokens than `max_tokens`.
    Stopping early is fine: a step is never left half done between two tokens.
    """

    def __init__(
        self,
        step: StepFunction,
        tokenizer: TokenizerWrapper,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        prefill_chunk: int,
        context: int | None,
        spans: Spans,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self._step, self._prompt, self._sampling = step, list(prompt), sampling
        self._chunk, self._spans = prefill_chunk, spans
        self._on_prefill = on_prefill or (lambda done, total: None)
        self._eos = set() if sampling.ignore_eos else set(tokenizer.eos_token_ids)
        self._detokenizer = tokenizer.detokenizer
        self._limit = sampling.max_tokens
        if context is not None:
            self._limit = min(self._limit, context - len(prompt))
        self._sample = make_sampler(
            temp=sampling.temp,
            top_p=sampling.top_p if sampling.top_p < 1 else 0.0,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
        )
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.context_full = False
        self.timings = Timings(prompt_tokens=len(self._prompt))
        self._loop = self._run()

    def __next__(self) -> Token:
        return next(self._loop)

    def close(self) -> None:
        """Stop generating."""
        self._loop.close()

    def _prefill(self) -> mx.array:
        """Logits after the prompt: chunks without lm_head, then the last token by itself."""
        if self._sampling.seed is not None:
            mx.random.seed(self._sampling.seed)
        body, last = self._prompt[:-1], self._prompt[-1:]
        for start in range(0, len(body), self._chunk):
            self._step(body[start : start + self._chunk], start == 0, False)
            self._on_prefill(min(start + self._chunk, len(body)), len(self._prompt))
        return self._step(last, not body, True)

    def _pick(self, logits: mx.array) -> int:
        if self._sampling.temp == 0:
            return int(np.asarray(logits.astype(mx.float32)).argmax())
        row = logits[None].astype(mx.float32)
        token: mx.array = self._sample(row - mx.logsumexp(row, axis=-1, keepdims=True))
        return int(np.asarray(token)[0])

    def _run(self) -> Generator[Token, None, None]:
        start = time.perf_counter()
        logits = self._prefill()
        self.timings.prefill = time.perf_counter() - start
        token = self._pick(logits)
        self.timings.first_token = time.perf_counter() - start
        self._spans.take()
        while token not in self._eos:
            self.tokens.append(token)
            self._detokenizer.add_token(token)
            if len(self.tokens) >= self._limit:
                self.context_full = self._limit < self._sampling.max_tokens
                yield self._finish(token, "length")
                return
            yield self._emit(token)
            start = time.perf_counter()
            token = self._pick(self._step([token], False, True))
            self._count(time.perf_counter() - start)
        yield self._finish(token, "stop")

    def _count(self, seconds: float) -> None:
        self.timings.decode += seconds
        self.timings.decode_steps += 1
        for name, spent in self._spans.take().items():
            self.timings.spans[name] = self.timings.spans.get(name, 0.0) + spent

    def _emit(self, token: int, reason: str | None = None) -> Token:
        text = self._detokenizer.last_segment
        self.text += text
        return Token(token, text, reason)

    def _finish(self, token: int, reason: str) -> Token:
        self.finish_reason = reason
        self._detokenizer.finalize()
        return self._emit(token, reason)
