"""Train `zmoe-tiny` on a text file and write it as a Hugging Face checkpoint folder.

    python tools/train_tiny.py TEXT --out stage1
    python tools/train_tiny.py TEXT --start stage1 --out zmoe/data/zmoe-tiny STAGE2

With STAGE2 the settings in which the second column of the model card differs from the defaults.
Needs torch, tokenizers, safetensors and numpy; reading the folder needs none of this file.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_data import Split, WindowSampler, encode, read_split, train_tokenizer
from tiny_eval import complete, measure_loss
from tiny_export import load_weights, write_folder, write_reference
from tiny_model import TinyConfig, TinyModel, balance_loss, router_z_loss
from tiny_recipe import Recipe, Stage, read_record
from tiny_repeat import repetition_loss
from tokenizers import Tokenizer
from torch import Tensor, nn

REPEATED_ROWS = 4


@dataclass(frozen=True)
class Best:
    """The weights of least held-out loss, and where in the run they were found."""

    step: int
    nats_per_token: float
    state: dict[str, Tensor]


def parse_args() -> tuple[argparse.Namespace, TinyConfig, Recipe]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text file; its last tenth is held out")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to replace")
    parser.add_argument("--start", type=Path, help="folder whose weights to start from")
    parser.add_argument("--reference", type=Path, help="also write logits for check_tiny.py (.npz)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for group in (TinyConfig, Recipe):
        for field in fields(group):
            flag = "--" + field.name.replace("_", "-")
            kind = type(field.default)
            parser.add_argument(flag, type=kind, default=field.default, help=f"[{field.default}]")
    args = parser.parse_args()
    config = TinyConfig(**{f.name: getattr(args, f.name) for f in fields(TinyConfig)})
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    return args, config, recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms have nothing to shrink towards zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a half cosine to a hundredth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    model: TinyModel, optimizer: torch.optim.Optimizer, sampler: WindowSampler, recipe: Recipe
) -> tuple[float, float]:
    """One update on a fresh batch; returns the token loss and the balance loss."""
    model.train()
    inputs, targets = sampler.draw(recipe.batch_tokens // recipe.context, recipe.context)
    logits, routings = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    balance = torch.stack([balance_loss(r) for r in routings]).mean()
    z_loss = torch.stack([router_z_loss(r) for r in routings]).mean()
    total = loss + recipe.balance_weight * balance + recipe.z_weight * z_loss
    if recipe.repetition_weight:
        windows, period = sampler.draw_repeated(REPEATED_ROWS)
        total = total + recipe.repetition_weight * repetition_loss(model, windows, period)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), balance.item()


def train(model: TinyModel, tokenizer: Tokenizer, split: Split, recipe: Recipe) -> Best:
    """Run the recipe; the best weights by held-out loss are returned, not the last ones."""
    held_out = encode(tokenizer, split.held_out)
    sampler = WindowSampler(tokenizer, split.train, recipe.bpe_dropout, recipe.seed)
    optimizer = make_optimizer(model, recipe)
    best = Best(0, math.inf, {})
    plain_from = recipe.steps - round(recipe.plain_share * recipe.steps)
    start = time.monotonic()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        if step == plain_from:
            sampler.bpe_dropout = 0.0
        loss, balance = train_step(model, optimizer, sampler, recipe)
        done = step + 1
        if done % recipe.eval_every and done != recipe.steps:
            continue
        held = measure_loss(model, held_out, recipe.context, len(split.held_out))
        if held.nats_per_token < best.nats_per_token:
            best = Best(done, held.nats_per_token, copy.deepcopy(model.state_dict()))
        print(
            f"step {done:5d}  train {loss:.4f}  balance {balance:.3f}  "
            f"held-out {held.nats_per_token:.4f} nats/token {held.bits_per_char:.4f} bits/char  "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    return best


def main() -> None:
    args, config, recipe = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(recipe.seed)
    split = read_split(args.text)
    tokenizer = train_tokenizer(split.train, config.vocab_size)
    model = TinyModel(config, recipe.dropout)
    if args.start:
        load_weights(model, args.start)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    best = train(model, tokenizer, split, recipe)
    model.load_state_dict(best.state)
    for temperature in (0.0, 0.8):
        print(complete(model, tokenizer, "ROMEO:", 100, temperature), "\n" + "-" * 20, flush=True)
    earlier = read_record(args.start) if args.start else []
    stages = [*earlier, Stage(recipe, best.step)]
    write_folder(args.out, model, tokenizer, split, stages)
    if args.reference:
        write_reference(args.reference, model, tokenizer, encode(tokenizer, split.held_out))


if __name__ == "__main__":
    main()
