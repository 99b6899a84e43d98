"""What a cluster has done since it began, and what it does now, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """The state of a cluster's batcher.

    `running` and `waiting` sequences, and blocks of keys and values, are those of now; all else
    counts from the beginning. `prompt_tokens` are those of the prompts that have been begun, of
    which `cached_tokens` needed no computing. `spans` has seconds by name (see zmoe.obs), of
    `step_seconds` that the steps have taken, and `exchange` the counters of the exchange.
    """

    running: int
    waiting: int
    blocks: int
    blocks_available: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    step_seconds: float
    spans: Mapping[str, float]
    exchange: Mapping[str, int]
