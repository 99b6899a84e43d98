"""Adapters of pattern E: blocks that scale inputs, project, or have null experts."""

from __future__ import annotations

import mlx.core as mx

from zmoe.families.routers import by_gate, given, mlx_function, pick, shared_experts, top_k
from zmoe.moe.adapter import Adapter, Block, Routing, add_shared

# ---- experts at a smaller, latent width ------------------------------------


def _nemotron(block: Block, x: mx.array) -> Routing:
    latent = x if block.moe_latent_size is None else block.fc1_latent_proj(x)
    return Routing(latent, *block.gate(x))


def _nemotron_finish(
    block: Block, x: mx.array, routed: mx.array, shared: mx.array | None
) -> mx.array:
    if block.moe_latent_size is not None:
        routed = block.fc2_latent_proj(routed)
    return add_shared(block, x, routed, shared)


def _kimi_k3(block: Block, x: mx.array) -> Routing:
    args = block.args
    latent = x if block.latent_size is None else block.routed_expert_down_proj(x)
    select = mlx_function(block, "_group_expert_select")
    return Routing(
        latent,
        *select(
            block.gate(x),
            block.e_score_correction_bias,
            args.num_experts_per_token,
            args.num_expert_group,
            args.topk_group,
            args.routed_scaling_factor,
            args.moe_renormalize,
        ),
    )


def _kimi_k3_finish(
    block: Block, x: mx.array, routed: mx.array, shared: mx.array | None
) -> mx.array:
    if block.routed_expert_norm is not None:
        routed = block.routed_expert_norm(routed)
    if block.latent_size is not None:
        routed = block.routed_expert_up_proj(routed)
    return add_shared(block, x, routed, shared)


def _muse(block: Block, x: mx.array) -> Routing:
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


def _muse_norm(switch: Block, y: mx.array) -> mx.array:
    normed: mx.array = switch.post_expert_norm(y)
    return normed


def _muse_finish(block: Block, x: mx.array, routed: mx.array, shared: mx.array | None) -> mx.array:
    output: mx.array = block.post_expert_proj(routed)
    return output


# ---- the rest ----------------------------------------------------------------


def _llama4(block: Block, x: mx.array) -> Routing:
    """One expert a row, whose weight scales its input instead of its output."""
    logits = block.router(x)
    ids = top_k(logits, block.top_k)
    scale = mx.sigmoid(pick(logits, ids).astype(mx.float32)).astype(x.dtype)
    return Routing(x * scale, ids, mx.ones(ids.shape))


def _llama4_shared(block: Block, x: mx.array, routing: Routing) -> mx.array:
    output: mx.array = block.shared_expert(x)
    return output


def _longcat(block: Block, x: mx.array) -> Routing:
    """Ids from `n_routed_experts` on are identities: every node adds them itself."""
    return Routing(x, *block.router(x))


def _longcat_identities(block: Block, x: mx.array, routing: Routing) -> mx.array:
    null = routing.ids >= block.n_routed_experts
    return x * mx.where(null, routing.weights, 0.0).sum(axis=-1, keepdims=True)


def _deepseek_v41_shared(block: Block, x: mx.array, routing: Routing) -> mx.array:
    output: mx.array = block.shared_experts(x).astype(mx.float32)
    return output


def _deepseek_v41_finish(block: Block, x: mx.array, routed: mx.array, shared: mx.array) -> mx.array:
    return (routed.astype(mx.float32) + shared).astype(x.dtype)


ADAPTERS = {
    "nemotron_h.NemotronHMoE": Adapter(_nemotron, shared=shared_experts, finish=_nemotron_finish),
    "kimi_k3.KimiK3SparseMoE": Adapter(_kimi_k3, shared=shared_experts, finish=_kimi_k3_finish),
    "muse_spark.MoE": Adapter(_muse, switch="experts", finish=_muse_finish, per_expert=_muse_norm),
    "llama4.MoE": Adapter(_llama4, switch="experts", shared=_llama4_shared),
    "longcat_flash.LongcatFlashMoE": Adapter(_longcat, shared=_longcat_identities),
    "deepseek_v41.MoE": Adapter(
        by_gate,
        switch="experts.switch_mlp",
        shared=_deepseek_v41_shared,
        finish=_deepseek_v41_finish,
    ),
    "gemma4_text.Experts": Adapter(given, switch="switch_glu"),
}
