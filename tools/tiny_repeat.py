"""Training against loops: greedy text of a small model otherwise says one line for ever.

The method is DITTO (Xu et al. 2022, "Learning to Break the Loop"): show the model a piece of text
said over and over, and teach it that each time is less likely than the time before.
"""

from __future__ import annotations

import torch
from tiny_model import TinyModel
from torch import Tensor

DECAY = 0.5  # probability of a token against its previous occurrence, the paper's choice
PERIODS = (4, 32)  # tokens in a repeated piece: from a phrase to a short speech
WINDOW = 256


def repeated_windows(ids: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Pieces of `ids` repeated to (rows, WINDOW + 1) tokens, and the length of a piece."""
    period = int(torch.randint(*PERIODS, (1,), generator=generator))
    starts = torch.randint(ids.numel() - period, (rows, 1), generator=generator)
    return ids[starts + torch.arange(WINDOW + 1) % period], period


def repetition_loss(model: TinyModel, windows: Tensor, period: int) -> Tensor:
    """Distance of each repeated token's probability from DECAY times that of the time before."""
    logits, _ = model(windows[:, :-1])
    chances = logits.softmax(dim=-1).gather(2, windows[:, 1:, None]).squeeze(2)
    wanted = DECAY * chances[:, :-period].detach()
    distance = (chances[:, period:] - wanted).abs()
    return -(1 - distance).clamp_min(1e-6).log().mean()
