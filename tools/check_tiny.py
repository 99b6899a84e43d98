"""Check that mlx-lm computes what the training code computed.

    python tools/check_tiny.py zmoe/data/zmoe-tiny reference.npz

`reference.npz` is written by `train_tiny.py --reference`.  Needs mlx-lm, not torch; exits with 1
when a figure is out of its bound.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from numpy.typing import NDArray

MAX_LOGIT_DIFFERENCE = 1e-4
MAX_LOSS_RATIO = 0.01


def logit_difference(model: nn.Module, reference: dict[str, NDArray[Any]]) -> float:
    """Largest absolute difference from the reference's logits."""
    logits = model(mx.array(reference["ids"])[None])[0]
    return float(np.abs(np.array(logits) - reference["logits"]).max())


def nats_per_token(model: nn.Module, scored: NDArray[Any], context: int) -> float:
    """Mean loss of `scored` (S,) in windows of `context` tokens, S - 1 a multiple of it."""
    inputs = mx.array(scored[:-1].reshape(-1, context))
    targets = mx.array(scored[1:].reshape(-1, context))
    # mlx-lm's block goes row by row when evaluating and by expert when training: same values.
    model.train()
    losses = []
    for part, wanted in zip(mx.split(inputs, 8), mx.split(targets, 8), strict=True):
        losses.append(nn.losses.cross_entropy(model(part), wanted, reduction="mean").item())
    model.eval()
    return float(np.mean(losses))


def greedy(model: nn.Module, prompt: NDArray[Any], new_tokens: int) -> list[int]:
    """Greedy continuation through mlx-lm's generation loop and its cache."""
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=new_tokens)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("reference", type=Path, help="reference.npz")
    args = parser.parse_args()
    reference = dict(np.load(args.reference))
    model, tokenizer = mlx_lm.load(str(args.folder))[:2]

    difference = logit_difference(model, reference)
    loss = nats_per_token(model, reference["scored"], int(reference["context"]))
    ratio = abs(loss / float(reference["nats_per_token"]) - 1)
    text = greedy(model, reference["prompt"], len(reference["greedy"]))
    same = text == reference["greedy"].tolist()
    print(f"logits: largest difference {difference:.2e} (bound {MAX_LOGIT_DIFFERENCE:.0e})")
    print(
        f"held-out loss: {loss:.5f} nats/token over {len(reference['scored']) - 1} tokens, "
        f"{ratio:.1e} from the reference (bound {MAX_LOSS_RATIO:.0e})"
    )
    print(f"greedy tokens: {'equal' if same else 'DIFFERENT'}")
    print(tokenizer.decode([*reference["prompt"].tolist(), *text]))
    return 0 if difference < MAX_LOGIT_DIFFERENCE and ratio < MAX_LOSS_RATIO and same else 1


if __name__ == "__main__":
    sys.exit(main())
