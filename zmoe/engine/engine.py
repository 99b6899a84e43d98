"""A node's part of a step: model, attention cache, step counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from zmoe.config import EngineConfig
from zmoe.engine.paged import Head, OneSequence, PagedEngine, PagedLayers, SteppedReducer


class Engine:
    """Runs the model over one sequence, in lock-step with the other ranks.

    With `paged`, the caches of a model whose layers are all in C, by plans of one sequence;
    else on mlx-lm's caches.
    """

    def __init__(
        self,
        model: Callable[..., mx.array],
        reducer: SteppedReducer,
        config: EngineConfig,
        head: Head,
        paged: PagedLayers | None,
    ) -> None:
        self._model, self._reducer, self._config, self._head = model, reducer, config, head
        self._cache: list[Any] = []
        self._paged: OneSequence | None = None
        if paged is not None:
            paged.limit(config.max_kv_size)
            engine = PagedEngine(model, reducer, head, paged)
            self._paged = OneSequence(engine, config.max_kv_size, config.prefill_chunk)
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        if self._paged is not None:
            self._paged.reset()
        else:
            self._cache = make_prompt_cache(self._model, self._config.max_kv_size)

    def forward(self, step: int, tokens: Sequence[int], logits: bool = True) -> mx.array:
        """Append `tokens` (ids) to the sequence; returns the logits (vocabulary,) after the last.

        Everything is evaluated on return, since a lazy array would read buffers of the
        exchange that the next steps rewrite. Without `logits`, lm_head is not computed and the
        result is empty; followers, and all but the last pass over a prompt, need none.
        Raises what the reducer raises: PeerError, DivergenceError.
        """
        if self._paged is not None:
            return mx.array(self._paged.run(step, tokens, logits).reshape(-1))
        self._reducer.step = step
        self._head.rows = None if logits else np.empty(0, np.int32)
        out = self._model(mx.array([tokens]), cache=self._cache)
        last = out[0, -1] if logits else mx.zeros(0)
        mx.eval([c.state for c in self._cache], last)
        return last
