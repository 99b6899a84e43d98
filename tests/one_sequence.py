"""Steps of one sequence after another, on whatever runs plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from zmoe.batch.plan import Plan, Span, blocks_of
from zmoe.config import EngineConfig
from zmoe.engine.base import SteppedReducer
from zmoe.engine.engine import make_engine
from zmoe.loading import LoadedShard

ENOUGH_BLOCKS = 64


class OneSequence:
    """Appends tokens to a sequence, and returns the logits after the last of them."""

    def __init__(self, run: Callable[[Plan], np.ndarray | None], paged: bool) -> None:
        self._run, self._paged = run, paged
        self._step, self._sequence, self._length = 0, 0, 0

    def __call__(self, tokens: Sequence[int], reset: bool = False) -> np.ndarray:
        free = (self._sequence,) if reset and self._length else ()
        if reset:
            self._sequence, self._length = self._sequence + 1, 0
        self._step += 1
        start, self._length = self._length, self._length + len(tokens)
        blocks = range(blocks_of(start), blocks_of(self._length)) if self._paged else ()
        span = Span(self._sequence, start, len(tokens), 1)
        logits = self._run(Plan(self._step, (span,), tuple(tokens), tuple(blocks), free))
        assert logits is not None and len(logits) == 1
        return np.array(logits[0])


def sequence_on(
    shard: LoadedShard, reducer: SteppedReducer, config: EngineConfig | None = None
) -> OneSequence:
    """A sequence on a node's share of a model."""
    config = config or EngineConfig()
    engine = make_engine(shard.model, reducer, config, shard.head, shard.paged)
    if engine.paged:
        engine.make_cache(ENOUGH_BLOCKS)
    return OneSequence(engine.run, engine.paged)
