"""Settings out of range are refused by the name of their flag."""

from __future__ import annotations

from typing import Any

import pytest

from zmoe.config import EngineConfig, Sampling, Timing
from zmoe.errors import InputError


@pytest.mark.parametrize(
    ("kind", "field", "value", "flag"),
    [
        (Sampling, "max_tokens", 0, "--max-tokens"),
        (Sampling, "max_tokens", -3, "--max-tokens"),
        (Sampling, "temp", -0.1, "--temp"),
        (Sampling, "temp", float("nan"), "--temp"),
        (Sampling, "temp", float("inf"), "--temp"),
        (Sampling, "top_p", 0.0, "--top-p"),
        (Sampling, "top_p", 1.1, "--top-p"),
        (Sampling, "top_k", -1, "--top-k"),
        (Sampling, "min_p", 2.0, "--min-p"),
        (Sampling, "seed", -1, "--seed"),
        (Timing, "peer", 0.0, "--peer-timeout"),
        (Timing, "join", float("nan"), "--join-timeout"),
        (EngineConfig, "prefill_chunk", 0, "--prefill-step-size"),
        (EngineConfig, "max_kv_size", 2, "--max-kv-size"),
        (EngineConfig, "wire_dtype", "int4", "--wire-dtype"),
        (EngineConfig, "schedule", "federal", "--schedule"),
    ],
)
def test_out_of_range(kind: Any, field: str, value: object, flag: str) -> None:
    with pytest.raises(InputError, match=f"^{flag} is "):
        kind(**{field: value})


def test_defaults_are_greedy() -> None:
    assert Sampling().temp == 0.0
