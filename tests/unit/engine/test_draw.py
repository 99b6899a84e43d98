"""What the device draws is what the sampler on the host picks."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from zmoe.config import Sampling
from zmoe.engine.draw import Draw, draw
from zmoe.engine.sampler import Sampler

ROWS = 24


@pytest.mark.parametrize("vocabulary", [7, 1024, 5000])
@pytest.mark.parametrize("kind", ["any", "equal", "impossible"])
def test_it_is_the_samplers(vocabulary: int, kind: str) -> None:
    random = np.random.default_rng(vocabulary)
    logits = random.normal(scale=3, size=(ROWS, vocabulary)).astype(np.float32)
    if kind == "equal":
        logits = np.round(logits)
    elif kind == "impossible":
        logits[:, ::3] = -math.inf
    for filters in (False, True):
        settings = [
            Sampling(
                temp=float(random.choice([0, 0.3, 1, 2])),
                top_p=float(random.choice([1, 0.5, 0.9])) if filters else 1.0,
                min_p=float(random.choice([0, 0.05])) if filters else 0.0,
                top_k=int(random.choice([0, 1, 5])) if filters else 0,
                seed=seed,
            )
            for seed in range(ROWS)
        ]
        samplers = [Sampler(each) for each in settings]
        draws = [sampler.draw(10) for sampler in samplers]
        tokens, largest = draw(mx.array(logits), [each for each in draws if each is not None])
        wanted = [s.pick(row, 10).token for s, row in zip(samplers, logits)]
        assert tokens.tolist() == wanted
        assert np.array_equal(np.array(largest), logits.max(axis=-1))


def test_what_is_no_number_shows() -> None:
    """And the token is one that an embedding has."""
    logits = np.zeros((3, 9), np.float32)
    logits[0, 3], logits[1, 4], logits[2] = math.nan, math.inf, -math.inf
    for how in (Draw(0, 1, 0, 0, 0), Draw(1, 0.5, 0.1, 3, 0.99)):
        tokens, largest = draw(mx.array(logits), [how] * 3)
        assert max(tokens.tolist()) < 9
        assert not np.isfinite(np.array(largest)).any()
