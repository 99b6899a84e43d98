"""How `zmoe-tiny` is trained: the settings that are not the architecture's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Training settings; the defaults are those of the published weights."""

    steps: int = 4300
    batch_tokens: int = 2048
    context: int = 256  # tokens in a training window
    long_share: float = 0.15  # last share of the steps, with windows of max_seq_len
    learning_rate: float = 1.5e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    z_weight: float = 1e-3
    bpe_dropout: float = 0.1
    plain_share: float = 0.2  # last share of the steps, without BPE dropout
    eval_every: int = 150
    seed: int = 1
