"""A node's part of a step: model, attention cache, step counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from zmoe.config import EngineConfig


class SteppedReducer(Protocol):
    """A reducer whose frames carry the number of the step and the digest of its plan."""

    step: int
    plan: int


class LogitsSwitch(Protocol):
    """A switch of the model: whether the next pass computes logits."""

    wanted: bool


class Engine:
    """Runs the model over one sequence, in lock-step with the other ranks."""

    def __init__(
        self,
        model: Callable[..., mx.array],
        reducer: SteppedReducer,
        config: EngineConfig,
        head: LogitsSwitch,
    ) -> None:
        self._model, self._reducer, self._config, self._head = model, reducer, config, head
        self._cache: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._cache = make_prompt_cache(self._model, self._config.max_kv_size)
        layers: Any = getattr(self._model, "layers", ())
        for index, layer in enumerate(layers):
            if hasattr(layer, "make_cache"):
                self._cache[index] = layer.make_cache(self._config.max_kv_size)

    def forward(self, step: int, tokens: Sequence[int], logits: bool = True) -> mx.array:
        """Append `tokens` (ids) to the sequence; returns the logits (vocabulary,) after the last.

        Everything is evaluated on return, since a lazy array would read buffers of the
        exchange that the next steps rewrite. Without `logits`, lm_head is not computed and the
        result means nothing; followers, and all but the last pass over a prompt, need none.
        Raises what the reducer raises: PeerError, DivergenceError.
        """
        self._reducer.step = step
        self._head.wanted = logits
        out = self._model(mx.array([tokens]), cache=self._cache)
        last = out[0, -1]
        mx.eval([c.state for c in self._cache], last if logits else [])
        return last
