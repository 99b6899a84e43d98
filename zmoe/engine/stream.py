"""A sequence as the engine sees it: how to sample, when to end, which tokens are ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from zmoe.batch.sequence import Request
from zmoe.config import Sampling
from zmoe.engine.draw import Draw
from zmoe.engine.sampler import Logits, Mask, Pick, Sampler


class Constraint(Protocol):
    """A grammar: which tokens may come next."""

    def mask(self) -> Mask | None:
        """What Sampler.pick() takes. Raises ZmoeError where the grammar has failed."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind `token`."""
        ...


@dataclass
class Timings:
    """Seconds of a generation, filled in as it goes.

    `prefill` is the forward passes over the prompt, of which `cached_tokens` were known
    already, and `first_token` the time from the first of them until the first token is picked.
    `decode` counts the steps after the first token, which other sequences may share,
    and `spans` what these spent in `experts` and `exchange`. `drafted` tokens were guessed, and
    `accepted` of them were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    spans: dict[str, float] = field(default_factory=dict)

    @property
    def prompt_tps(self) -> float:
        """Tokens of the prompt that were run, per second."""
        run = self.prompt_tokens - self.cached_tokens
        return run / self.prefill if self.prefill else 0.0

    @property
    def generation_tps(self) -> float:
        return self.decode_tokens / self.decode if self.decode else 0.0

    def overhead_us(self, layers: int) -> float | None:
        """Mean microseconds per decoding step and layer that are neither matmul nor exchange.

        None where MLX computes the matmuls, whose time nobody can tell from the rest.
        """
        if "matmuls" not in self.spans or not self.decode_steps:
            return None
        spent = self.decode - self.spans["matmuls"] - self.spans.get("exchange", 0.0)
        return 1e6 * spent / self.decode_steps / layers

    def breakdown_ms(self) -> dict[str, float]:
        """Mean milliseconds per decoded token: experts, exchange, other."""
        tokens = max(1, self.decode_tokens)
        experts, exchange = self.spans.get("experts", 0.0), self.spans.get("exchange", 0.0)
        other = max(0.0, self.decode - experts - exchange)
        parts = {"experts_ms": experts, "exchange_ms": exchange, "other_ms": other}
        return {name: 1e3 * seconds / tokens for name, seconds in parts.items()}

    def count(self, seconds: float, tokens: int, spans: dict[str, float]) -> None:
        """A decoding step that gave `tokens` tokens."""
        self.decode += seconds
        self.decode_steps += 1
        self.decode_tokens += tokens
        for name, spent in spans.items():
            self.spans[name] = self.spans.get(name, 0.0) + spent


class Stream:
    """One sequence's sampler, its limits, and the tokens that its consumer has not taken yet."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        eos: Collection[int],
        context: int | None,
        borders: tuple[int, ...] = (),
        salt: bytes = b"",
        constraint: Constraint | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        generated: Sequence[int] | None = None,
    ) -> None:
        """`context`: most tokens of prompt and text. `borders` and `salt` are a Request's.
        `constraint` limits what is sampled. `on_prefill(done, total)` is told how many
        tokens of the prompt have been run. A stream that another cluster has begun goes on
        behind the tokens that it has `generated`.
        """
        self._borders, self._salt, self._constraint = borders, salt, constraint
        self.prompt, self.sampling = list(prompt), sampling
        self.generated = generated
        self.sampler = Sampler(sampling, self.prompt)
        self.seed = self.sampler.seed
        self.limit, self.context_full = sampling.max_tokens, False
        if context is not None:
            self.bound(context - len(self.prompt))
        self._eos = frozenset() if sampling.ignore_eos else frozenset(eos)
        self._on_prefill = on_prefill
        self._error: Exception | None = None
        self.picked = self.given = 0  # tokens, of which another cluster picked the given ones
        self.ready: deque[tuple[Pick, str | None]] = deque()  # with the reason to end
        self.ended = False
        self.started: float | None = None  # when its first step began
        self.timings = Timings(prompt_tokens=len(self.prompt))
        for token in generated or ():
            self._accept(token)
        self.given = self.picked

    @property
    def request(self) -> Request:
        """What the scheduler is to run."""
        tokens = [*self.prompt, *(self.generated or ())]
        accepted = self.generated is not None
        return Request(tokens, self.limit - self.given, self._salt, self._borders, accepted)

    def bound(self, tokens: int) -> None:
        """No more than `tokens` will follow the prompt."""
        self.limit = min(self.limit, tokens)
        self.context_full = self.limit < self.sampling.max_tokens

    def is_over(self) -> bool:
        """Whether no further token comes. Raises what has ended it, if that was an error."""
        if self._error is not None:
            raise self._error
        return self.ended

    def prefilled(self, tokens: int) -> None:
        """So many tokens of the prompt have been run."""
        if self._on_prefill is not None:
            try:
                self._on_prefill(tokens, len(self.prompt))
            except Exception as error:  # another consumer's thread may be running this step
                self.fail(error)

    def pick(self, logits: Logits, position: int) -> Pick:
        """Pick the token at `position` of the sequence. Raises ZmoeError."""
        mask = None if self._constraint is None else self._constraint.mask()
        return self.sampler.pick(logits, position, mask)

    def draw(self, position: int) -> Draw | None:
        """What draws the token at `position` on the device; None where the host has to pick it."""
        return None if self._constraint is not None else self.sampler.draw(position)

    def take(self, pick: Pick) -> bool:
        """The next token; returns whether the sequence goes on."""
        self._accept(pick.token)
        reason = None
        if pick.token in self._eos:
            reason = "stop"
        elif self.picked >= self.limit:
            reason = "length"
        self.ready.append((pick, reason))
        self.ended = self.ended or reason is not None
        return not self.ended

    def _accept(self, token: int) -> None:
        self.picked += 1
        self.sampler.accept(token)
        if self._constraint is not None:
            self._constraint.accept(token)

    def fail(self, error: Exception) -> None:
        """End with `error`, which the consumer gets after the tokens that are ready."""
        self._error, self.ended = error, True
