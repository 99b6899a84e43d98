"""How the blocks of mlx-lm's families route, by kind of router.

Each function gets the block and the `x` (..., hidden_size) that it is called with,
and returns what the block computes up to its switch layer. Where a block has its
router in a submodule, or mlx-lm has it in a function, that is called; the rest is
spelled out here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from zmoe.moe.adapter import Block, Routing

# ---- parts of routers ----------------------------------------------------------------


def mlx_function(block: Block, name: str) -> Callable[..., Any]:
    """The function `name` of the mlx-lm module that defines `block`'s class."""
    function: Callable[..., Any] = getattr(sys.modules[type(block).__module__], name)
    return function


def top_k(scores: mx.array, k: int) -> mx.array:
    """The ids of the k highest scores, in no particular order: (..., k)."""
    return mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]


def pick(scores: mx.array, ids: mx.array) -> mx.array:
    """The scores (..., k) of the experts `ids` (..., k)."""
    return mx.take_along_axis(scores, ids, axis=-1)


def normalized(weights: mx.array, floor: float = 0.0) -> mx.array:
    """The weights (..., k) over their sum, to which `floor` is added."""
    total = weights.sum(axis=-1, keepdims=True)
    return weights / (total + floor if floor else total)


def softmax_then_top_k(logits: mx.array, k: int, norm: bool) -> tuple[mx.array, mx.array]:
    """Probabilities over all experts, of which the k best."""
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    ids = top_k(probabilities, k)
    weights = pick(probabilities, ids)
    return ids, normalized(weights) if norm else weights


def top_k_then_softmax(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Probabilities over the k best alone."""
    ids = top_k(logits, k)
    return ids, mx.softmax(pick(logits, ids), axis=-1, precise=True)


def biased_sigmoid(
    logits: mx.array, bias: mx.array, k: int, floor: float = 1e-20
) -> tuple[mx.array, mx.array]:
    """Sigmoid scores: a bias enters into the selection, but not into the weights."""
    scores = mx.sigmoid(logits.astype(mx.float32))
    ids = top_k(scores + bias, k)
    return ids, normalized(pick(scores, ids), floor)


# ---- a submodule returns ids and weights ---------------------------------------------


def by_gate(block: Block, x: mx.array) -> Routing:
    """The submodule `gate` routes."""
    return Routing(x, *block.gate(x))


def by_router(block: Block, x: mx.array) -> Routing:
    """The submodule `router` routes."""
    return Routing(x, *block.router(x))


def by_scaled_gate(block: Block, x: mx.array) -> Routing:
    """The submodule `gate` routes, and the block scales its weights."""
    ids, weights = block.gate(x)
    return Routing(x, ids, weights * block.routed_scaling_factor)


def by_caller(block: Block, x: mx.array, ids: mx.array, weights: mx.array) -> Routing:
    """The block is called with ids and weights."""
    return Routing(x, ids, weights)


# ---- softmax, then top-k -------------------------------------------------------------


def softmax_top_k(block: Block, x: mx.array) -> Routing:
    return Routing(x, *softmax_then_top_k(block.gate(x), block.top_k, block.norm_topk_prob))


def softmax_top_k_unnormalized(block: Block, x: mx.array) -> Routing:
    return Routing(x, *softmax_then_top_k(block.gate(x), block.top_k, norm=False))


def ernie(block: Block, x: mx.array) -> Routing:
    scores = block.gate_act(block.gate(x).astype(mx.float32))
    ids = top_k(scores, block.k)
    weights = pick(scores, ids)
    return Routing(x, ids, weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12))


def dbrx(block: Block, x: mx.array) -> Routing:
    logits = block.router(x).astype(mx.float32)
    return Routing(x, *softmax_then_top_k(logits, block.num_experts_per_tok, norm=True))


def mistral4(block: Block, x: mx.array) -> Routing:
    args = block.args
    select = mlx_function(block, "mistral4_expert_select")
    return Routing(
        x,
        *select(
            block.gate(x),
            block.num_experts_per_tok,
            args.n_group,
            args.topk_group,
            args.routed_scaling_factor,
            args.norm_topk_prob,
        ),
    )


# ---- top-k, then softmax -------------------------------------------------------------


def top_k_softmax(block: Block, x: mx.array) -> Routing:
    return Routing(x, *top_k_then_softmax(block.gate(x), block.num_experts_per_tok))


def router_top_k_softmax(block: Block, x: mx.array) -> Routing:
    return Routing(x, *top_k_then_softmax(block.router(x), block.num_experts_per_tok))


def phimoe(block: Block, x: mx.array) -> Routing:
    select = mlx_function(block, "sparsemixer")
    return Routing(x, *select(block.gate(x), top_k=block.top_k, jitter_eps=block.jitter_eps))


# ---- sigmoid, with a bias for the selection alone ------------------------------------


def minimax(block: Block, x: mx.array) -> Routing:
    logits = block.gate(x.astype(mx.float32))
    bias, k = block.e_score_correction_bias, block.num_experts_per_tok
    return Routing(x, *biased_sigmoid(logits, bias, k))


def minimax_m3(block: Block, x: mx.array) -> Routing:
    bias, k = block.e_score_correction_bias, block.num_experts_per_tok
    ids, weights = biased_sigmoid(block.gate(x), bias, k)
    return Routing(x, ids, weights * block.routed_scaling_factor)


def lfm2(block: Block, x: mx.array) -> Routing:
    scores = mx.sigmoid(block.gate(x))
    biased = scores.astype(mx.float32) + block.expert_bias if block.use_expert_bias else scores
    ids = top_k(biased, block.top_k)
    weights = pick(scores, ids)
    if block.norm_topk_prob:
        weights = normalized(weights, 1e-6)
    return Routing(x, ids, weights * block.routed_scaling_factor)


def klear(block: Block, x: mx.array) -> Routing:
    scores = mx.sigmoid(block.gate(x).astype(mx.float32))
    ids = top_k(scores + block.expert_bias, block.top_k)
    weights = pick(scores, ids)
    return Routing(x, ids, normalized(weights) if block.norm_topk_prob else weights)


def afmoe(block: Block, x: mx.array) -> Routing:
    logits = block.router(x).astype(mx.float32)
    sigmoid = block.score_func == "sigmoid"
    scores = mx.sigmoid(logits) if sigmoid else mx.softmax(logits, axis=-1)
    biased = scores + block.expert_bias
    if block.n_group > 1:
        biased = _drop_groups(biased, block.n_group, block.topk_group)
    ids = top_k(biased, block.num_experts_per_tok)
    weights = pick(scores, ids)
    if block.route_norm and block.num_experts_per_tok > 1:
        weights = normalized(weights)
    return Routing(x, ids, weights * block.route_scale)


def _drop_groups(scores: mx.array, groups: int, kept: int) -> mx.array:
    """Zero the scores of all but the `kept` groups with the best two experts."""
    grouped = mx.unflatten(scores, -1, (groups, -1))
    best_two = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)
    dropped = mx.argpartition(best_two, kth=groups - kept - 1, axis=-2)[..., : groups - kept, :]
    return mx.put_along_axis(grouped, dropped, mx.array(0.0), axis=-2).flatten(-2, -1)


def kimi_linear(block: Block, x: mx.array) -> Routing:
    return Routing(x, *_kimi_select(block, x, block.args.moe_router_activation_func))


def _kimi_select(block: Block, x: mx.array, *more: Any) -> tuple[mx.array, mx.array]:
    args = block.args
    ids, weights = mlx_function(block, "_group_expert_select")(
        block.gate(x),
        block.e_score_correction_bias,
        args.num_experts_per_token,
        args.num_expert_group,
        args.topk_group,
        args.routed_scaling_factor,
        args.moe_renormalize,
        *more,
    )
    return ids, weights


# ---- experts see another input than the block ----------------------------------------


def nemotron(block: Block, x: mx.array) -> Routing:
    latent = x if block.moe_latent_size is None else block.fc1_latent_proj(x)
    return Routing(latent, *block.gate(x))


def kimi_k3(block: Block, x: mx.array) -> Routing:
    latent = x if block.latent_size is None else block.routed_expert_down_proj(x)
    return Routing(latent, *_kimi_select(block, x))


def muse(block: Block, x: mx.array) -> Routing:
    select = mlx_function(block, "expert_routing")
    ids, weights = select(
        x.astype(mx.float32) @ block.gate.weight.T,
        block.gate.e_score_correction_bias,
        top_k=block.top_k,
        multiplier=block.router_multiplier,
        score_eps=block.score_eps,
        route_scale=block.route_scale,
    )
    return Routing(block.pre_expert_norm(block.pre_expert_proj(x)), ids, weights)


def llama4(block: Block, x: mx.array) -> Routing:
    """One expert a row, whose weight scales its input instead of its output."""
    logits = block.router(x)
    ids = top_k(logits, block.top_k)
    scale = mx.sigmoid(pick(logits, ids).astype(mx.float32)).astype(x.dtype)
    return Routing(x * scale, ids, mx.ones(ids.shape))
