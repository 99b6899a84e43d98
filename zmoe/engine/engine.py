"""A node's part of a step: model, attention cache, step counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from zmoe.config import EngineConfig


class SteppedReducer(Protocol):
    """A reducer whose frames carry the number of the step."""

    step: int


class Engine:
    """Runs the model over one sequence, in lock-step with the other ranks."""

    def __init__(
        self, model: Callable[..., mx.array], reducer: SteppedReducer, config: EngineConfig
    ) -> None:
        self._model, self._reducer, self._config = model, reducer, config
        self._cache: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._cache = make_prompt_cache(self._model, self._config.max_kv_size)

    def forward(self, step: int, tokens: Sequence[int]) -> mx.array:
        """Append `tokens` to the sequence; the lazy logits (vocabulary,) after the last.

        On return the cache is evaluated. Whoever doesn't evaluate the logits
        never computes lm_head: followers, and all ranks in prefill.
        """
        self._reducer.step = step
        logits = self._model(mx.array([tokens]), cache=self._cache)
        mx.eval([c.state for c in self._cache])
        return logits[0, -1]
