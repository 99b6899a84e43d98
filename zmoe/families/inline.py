"""Adapters of patterns B, C and D: the block itself routes, in its __call__."""

from __future__ import annotations

import mlx.core as mx

from zmoe.families.routers import (
    biased_sigmoid,
    gated_shared_expert,
    mlx_function,
    normalized,
    pick,
    shared_experts,
    softmax_then_top_k,
    top_k,
    top_k_then_softmax,
)
from zmoe.moe.adapter import Adapter, Block, Routing

# ---- B: softmax, then top-k ------------------------------------------------


def _qwen3(block: Block, x: mx.array) -> Routing:
    return Routing(x, *softmax_then_top_k(block.gate(x), block.top_k, block.norm_topk_prob))


def _not_normalized(block: Block, x: mx.array) -> Routing:
    return Routing(x, *softmax_then_top_k(block.gate(x), block.top_k, norm=False))


def _shared_mlp(block: Block, x: mx.array, routing: Routing) -> mx.array | None:
    return block.shared_mlp(x) if block.use_shared_mlp else None


def _ernie(block: Block, x: mx.array) -> Routing:
    scores = block.gate_act(block.gate(x).astype(mx.float32))
    ids = top_k(scores, block.k)
    weights = pick(scores, ids)
    return Routing(x, ids, weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12))


def _mistral4(block: Block, x: mx.array) -> Routing:
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


def _dbrx(block: Block, x: mx.array) -> Routing:
    logits = block.router(x).astype(mx.float32)
    return Routing(x, *softmax_then_top_k(logits, block.num_experts_per_tok, norm=True))


# ---- C: top-k, then softmax ------------------------------------------------


def _mixtral(block: Block, x: mx.array) -> Routing:
    return Routing(x, *top_k_then_softmax(block.gate(x), block.num_experts_per_tok))


def _router_linear(block: Block, x: mx.array) -> Routing:
    return Routing(x, *top_k_then_softmax(block.router(x), block.num_experts_per_tok))


def _phimoe(block: Block, x: mx.array) -> Routing:
    select = mlx_function(block, "sparsemixer")
    return Routing(x, *select(block.gate(x), top_k=block.top_k, jitter_eps=block.jitter_eps))


# ---- D: sigmoid with a bias for the choice alone ---------------------------


def _minimax(block: Block, x: mx.array) -> Routing:
    logits = block.gate(x.astype(mx.float32))
    bias, k = block.e_score_correction_bias, block.num_experts_per_tok
    return Routing(x, *biased_sigmoid(logits, bias, k))


def _minimax_m3(block: Block, x: mx.array) -> Routing:
    bias, k = block.e_score_correction_bias, block.num_experts_per_tok
    ids, weights = biased_sigmoid(block.gate(x), bias, k)
    return Routing(x, ids, weights * block.routed_scaling_factor)


def _kimi_linear(block: Block, x: mx.array) -> Routing:
    args = block.args
    select = mlx_function(block, "_group_expert_select")
    return Routing(
        x,
        *select(
            block.gate(x),
            block.e_score_correction_bias,
            args.num_experts_per_token,
            args.num_expert_group,
            args.topk_group,
            args.routed_scaling_factor,
            args.moe_renormalize,
            args.moe_router_activation_func,
        ),
    )


def _lfm2(block: Block, x: mx.array) -> Routing:
    scores = mx.sigmoid(block.gate(x))
    choice = scores.astype(mx.float32) + block.expert_bias if block.use_expert_bias else scores
    ids = top_k(choice, block.top_k)
    weights = pick(scores, ids)
    if block.norm_topk_prob:
        weights = normalized(weights, 1e-6)
    return Routing(x, ids, weights * block.routed_scaling_factor)


def _afmoe(block: Block, x: mx.array) -> Routing:
    logits = block.router(x).astype(mx.float32)
    sigmoid = block.score_func == "sigmoid"
    scores = mx.sigmoid(logits) if sigmoid else mx.softmax(logits, axis=-1)
    choice = scores + block.expert_bias
    if block.n_group > 1:
        choice = _drop_groups(choice, block.n_group, block.topk_group)
    ids = top_k(choice, block.num_experts_per_tok)
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


def _klear(block: Block, x: mx.array) -> Routing:
    scores = mx.sigmoid(block.gate(x).astype(mx.float32))
    ids = top_k(scores + block.expert_bias, block.top_k)
    weights = pick(scores, ids)
    return Routing(x, ids, normalized(weights) if block.norm_topk_prob else weights)


def _klear_finish(block: Block, x: mx.array, routed: mx.array, shared: mx.array) -> mx.array:
    mix = mx.softmax(block.coefficient(x), axis=-1, precise=True)
    return routed * mix[..., :1] + shared * mix[..., 1:]


ADAPTERS = {
    "qwen3_moe.Qwen3MoeSparseMoeBlock": Adapter(_qwen3),
    "olmoe.OlmoeSparseMoeBlock": Adapter(_qwen3),
    "mellum.MellumSparseMoeBlock": Adapter(_qwen3),
    "qwen2_moe.Qwen2MoeSparseMoeBlock": Adapter(_not_normalized, shared=gated_shared_expert),
    "qwen3_next.Qwen3NextSparseMoeBlock": Adapter(_qwen3, shared=gated_shared_expert),
    "hunyuan.MoeBlock": Adapter(_not_normalized, shared=_shared_mlp),
    "ernie4_5_moe.Ernie4_5_MoeMLP": Adapter(_ernie, shared=shared_experts),
    "mistral4.Mistral4MoE": Adapter(_mistral4, shared=shared_experts),
    "dbrx.SparseMoeBlock": Adapter(_dbrx, switch="experts"),
    "mixtral.MixtralSparseMoeBlock": Adapter(_mixtral),
    "jamba.JambaSparseMoeBlock": Adapter(_router_linear),
    "phixtral.MOE": Adapter(_mixtral),
    "gpt_oss.MLPBlock": Adapter(_router_linear, switch="experts"),
    "phimoe.PhiMoESparseMoeBlock": Adapter(_phimoe),
    "minimax.MiniMaxSparseMoeBlock": Adapter(_minimax),
    "minimax_m3_vl.SparseMoeBlock": Adapter(_minimax_m3, shared=shared_experts),
    "kimi_linear.KimiSparseMoE": Adapter(_kimi_linear, shared=shared_experts),
    "lfm2_moe.Lfm2MoeSparseMoeBlock": Adapter(_lfm2),
    "afmoe.AfmoeMoE": Adapter(_afmoe, switch="experts", shared=shared_experts),
    "Klear.KlearSparseMoeBlock": Adapter(
        _klear, switch="experts", shared=shared_experts, finish=_klear_finish
    ),
}
