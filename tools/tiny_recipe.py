"""How `zmoe-tiny` is trained: the settings that are not the architecture's.

The record of a model's training, one entry a stage, travels with it as `training.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "training.json"


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage; the defaults are those of the published weights' first stage."""

    steps: int = 4300
    batch_tokens: int = 2048
    context: int = 256  # tokens in a training window
    learning_rate: float = 1.5e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    z_weight: float = 1e-3
    repetition_weight: float = 0.0  # of the loss against loops
    bpe_dropout: float = 0.1
    plain_share: float = 0.2  # last share of the steps, without BPE dropout
    dropout: float = 0.05  # on embeddings and on what a block adds
    eval_every: int = 150
    seed: int = 1


@dataclass(frozen=True)
class Stage:
    """A recipe, and the step whose weights had the least held-out loss."""

    recipe: Recipe
    best_step: int
    note: str = ""  # for the model card: what the settings do not say


def read_record(folder: Path) -> list[Stage]:
    entries = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return [Stage(Recipe(**entry.pop("recipe")), **entry) for entry in entries]


def write_record(folder: Path, stages: list[Stage]) -> None:
    text = json.dumps([asdict(stage) for stage in stages], indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
