"""How long a step's tokens take to be picked: 32 rows of a vocabulary of 152k."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmoe.config import Sampling
from zmoe.engine.sampler import Sampler

ROWS, VOCABULARY = 32, 151_936
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temp": {"temp": 0.8},
    "top-p": {"temp": 0.8, "top_p": 0.9},
    "top-k": {"temp": 0.8, "top_k": 40},
    "penalties": {"temp": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs": {"temp": 0.8, "top_p": 0.9, "logprobs": 5},
}


def logits() -> np.ndarray[Any, np.dtype[np.float32]]:
    """A few dozen likely tokens far above a bell of all others, as of a language model."""
    random = np.random.default_rng(0)
    rows = random.normal(0, 2.5, (ROWS, VOCABULARY)).astype(np.float32)
    for row in rows:
        row[random.integers(0, VOCABULARY, 40)] = 25 - random.exponential(0.6, 40).cumsum()
    return rows


@pytest.mark.parametrize("options", OPTIONS)
def test_sample(benchmark: BenchmarkFixture, options: str) -> None:
    sampling = Sampling(seed=1, **OPTIONS[options])
    samplers = [Sampler(sampling, range(100), range(100)) for _ in range(ROWS)]
    rows = logits()
    picks = benchmark(lambda: [one.pick(row, 9) for one, row in zip(samplers, rows)])
    assert all(0 <= pick.token < VOCABULARY for pick in picks)
