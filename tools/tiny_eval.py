"""What is measured of a trained model: held-out loss, router usage, generated text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tiny_model import TinyModel
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Held-out loss of windows of `context` tokens."""

    context: int
    nats_per_token: float
    bits_per_char: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


@dataclass(frozen=True)
class Usage:
    """How evenly a layer's experts are used; an even share is 1 / experts."""

    layer: int
    min_share: float
    max_share: float
    relative_entropy: float  # of the shares, divided by that of even shares: 1 when even


def windows_of(ids: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Consecutive inputs and targets, (windows, length) and the shorter rest as (1, rest).

    A window's last target is the next one's first input: every token but the first is scored once.
    """
    count = (ids.numel() - 1) // length
    end = count * length
    pieces = (
        [(ids[:end].view(count, length), ids[1 : end + 1].view(count, length))] if count else []
    )
    if end < ids.numel() - 1:
        pieces.append((ids[None, end:-1], ids[None, end + 1 :]))
    return pieces


@torch.inference_mode()
def measure_loss(model: TinyModel, ids: Tensor, context: int, characters: int) -> Loss:
    """Loss of a text of `characters` characters encoded as `ids` (tokens,)."""
    model.eval()
    nats = 0.0
    for inputs, targets in windows_of(ids, context):
        rows = max(1, 8192 // context)
        for part, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
            logits, _ = model(part)
            nats += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return Loss(context, nats / (ids.numel() - 1), nats / math.log(2) / characters)


@torch.inference_mode()
def measure_usage(model: TinyModel, ids: Tensor, context: int) -> list[Usage]:
    """Shares of the (row, expert) pairs by expert, layer by layer."""
    model.eval()
    experts = model.config.moe_num_experts
    counts = torch.zeros(model.config.n_layers, experts)
    for inputs, _ in windows_of(ids, context):
        for layer, routing in enumerate(model(inputs)[1]):
            counts[layer] += routing.expert_ids.flatten().bincount(minlength=experts)
    shares = counts / counts.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1) / math.log(experts)
    return [
        Usage(layer, share.min().item(), share.max().item(), entropy[layer].item())
        for layer, share in enumerate(shares)
    ]


@torch.inference_mode()
def generate(
    model: TinyModel, prompt: Tensor, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """Continue `prompt` (tokens,) and return the new tokens (new_tokens,); greedy at 0."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = prompt
    for _ in range(new_tokens):
        logits = model(ids[None, -model.config.max_seq_len :])[0][0, -1]
        if temperature > 0:
            chances = (logits / temperature).softmax(dim=-1)
            following = torch.multinomial(chances, 1, generator=generator)
        else:
            following = logits.argmax(keepdim=True)
        ids = torch.cat((ids, following))
    return ids[prompt.numel() :]


def complete(
    model: TinyModel,
    tokenizer: Tokenizer,
    prompt: str,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Prompt and continuation as text."""
    ids = torch.tensor(tokenizer.encode(prompt).ids)
    new = generate(model, ids, new_tokens, temperature, seed)
    return prompt + tokenizer.decode(new.tolist(), skip_special_tokens=False)
