"""Routings that several model families share, and what runs beside the experts.

Each returns what the named pattern of mlx-lm's blocks computes up to the
switch layer. Where a block has its router in a submodule or mlx-lm has it in
a function, that is called; the rest is spelled out here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from zmoe.moe.adapter import Block, Routing


def mlx_function(block: Block, name: str) -> Callable[..., Any]:
    """The function `name` of the mlx-lm module that defines `block`'s class."""
    function: Callable[..., Any] = getattr(sys.modules[type(block).__module__], name)
    return function


def by_gate(block: Block, x: mx.array) -> Routing:
    """`gate` does it all."""
    return Routing(x, *block.gate(x))


def by_router(block: Block, x: mx.array) -> Routing:
    """`router` does it all."""
    return Routing(x, *block.router(x))


def given(block: Block, x: mx.array, ids: mx.array, weights: mx.array) -> Routing:
    """The caller has routed already."""
    return Routing(x, ids, weights)


def top_k(scores: mx.array, k: int) -> mx.array:
    """The ids of the k highest scores, in no particular order: (..., k)."""
    return mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]


def pick(scores: mx.array, ids: mx.array) -> mx.array:
    return mx.take_along_axis(scores, ids, axis=-1)


def normalized(weights: mx.array, floor: float = 0.0) -> mx.array:
    return weights / (weights.sum(axis=-1, keepdims=True) + floor)


def softmax_then_top_k(logits: mx.array, k: int, norm: bool) -> tuple[mx.array, mx.array]:
    """Pattern B: probabilities over all experts, of which the k best."""
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    ids = top_k(probabilities, k)
    weights = pick(probabilities, ids)
    return ids, normalized(weights) if norm else weights


def top_k_then_softmax(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Pattern C: probabilities over the k best alone."""
    ids = top_k(logits, k)
    return ids, mx.softmax(pick(logits, ids), axis=-1, precise=True)


def biased_sigmoid(
    logits: mx.array, bias: mx.array, k: int, floor: float = 1e-20
) -> tuple[mx.array, mx.array]:
    """Pattern D: chosen by biased scores, weighted by the unbiased ones."""
    scores = mx.sigmoid(logits.astype(mx.float32))
    ids = top_k(scores + bias, k)
    return ids, normalized(pick(scores, ids), floor)


def shared_experts(block: Block, x: mx.array, routing: Routing) -> mx.array | None:
    """The output of `shared_experts`, where the checkpoint has them."""
    experts = getattr(block, "shared_experts", None)
    return None if experts is None else experts(x)


def gated_shared_expert(block: Block, x: mx.array, routing: Routing) -> mx.array:
    """The output of `shared_expert` times its own gate."""
    output: mx.array = mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return output
