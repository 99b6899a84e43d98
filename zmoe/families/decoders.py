"""The families whose whole layers run in C: their decoder layers and MoE blocks taken apart.

Other families' layers run in MLX, with their matmuls on the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx.nn.layers.activations import Sigmoid
from mlx.nn.layers.base import Module

from zmoe.families.sites import key_of
from zmoe.kernels.attention import AttentionParts
from zmoe.kernels.decoder import RouterParts
from zmoe.kernels.delta_net import DeltaParts, Slices
from zmoe.kernels.latent_attention import LatentParts
from zmoe.kernels.mlp import MlpParts
from zmoe.kernels.weights import Matrices, Stored, matrices
from zmoe.native import RouteKind


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer h = x + mixer(norm(x)); h + feed_forward(norm(h)).

    `mixer` is an attention or a gated delta net, with its norm; `feed_forward` is the name of that
    module in `layer`.
    """

    mixer: AttentionParts | LatentParts | DeltaParts
    norm: Module
    feed_forward: str


# ---- attention, and what stands in its place ------------------------------------------------


def _attention(layer: Any, is_gated: bool = False, **more: Any) -> AttentionParts:
    """q_proj, k_proj, v_proj, o_proj of `self_attn`, norms of queries and keys if there."""
    attn = layer.self_attn
    heads = next(
        getattr(attn, name)
        for name in ("n_heads", "num_heads", "num_attention_heads")
        if hasattr(attn, name)
    )
    kv_heads = attn.n_kv_heads if hasattr(attn, "n_kv_heads") else attn.num_key_value_heads
    return AttentionParts(
        norm=layer.input_layernorm,
        projections=(attn.q_proj, attn.k_proj, attn.v_proj),
        output=attn.o_proj,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=attn.q_proj._matmul.weight.out_features // (heads * (1 + is_gated)),
        scale=attn.sm_scale if hasattr(attn, "sm_scale") else attn.scale,
        rope=attn.rope,
        query_norm=attn.get("q_norm"),
        key_norm=attn.get("k_norm"),
        is_gated=is_gated,
        **more,
    )


def _usual(feed_forward: str) -> Callable[[Any, Any, int], LayerParts]:
    def parts(model: Any, layer: Any, index: int) -> LayerParts:
        return LayerParts(_attention(layer), layer.post_attention_layernorm, feed_forward)

    return parts


def _latent(model: Any, layer: Any, index: int) -> LayerParts:
    attn = layer.self_attn
    is_low_rank = attn.q_lora_rank is not None
    attention = LatentParts(
        norm=layer.input_layernorm,
        query_down=attn.q_a_proj if is_low_rank else None,
        query_norm=attn.q_a_layernorm if is_low_rank else None,
        query=attn.q_b_proj if is_low_rank else attn.q_proj,
        down=attn.kv_a_proj_with_mqa,
        latent_norm=attn.kv_a_layernorm,
        key_heads=attn.embed_q,
        value_heads=attn.unembed_out,
        output=attn.o_proj,
        rope_dims=attn.qk_rope_head_dim,
        scale=attn.scale,
        rope=attn.rope,
    )
    return LayerParts(attention, layer.post_attention_layernorm, "mlp")


def _gpt_oss(model: Any, layer: Any, index: int) -> LayerParts:
    inner = model.model
    sliding = inner.layer_types[index] == "sliding_attention"
    window = inner.window_size if sliding else 0
    attention = _attention(layer, sinks=layer.self_attn.sinks, window=window)
    return LayerParts(attention, layer.post_attention_layernorm, "mlp")


def _dbrx(model: Any, layer: Any, index: int) -> LayerParts:
    norms = layer.norm_attn_norm
    attn = norms.attn
    attention = AttentionParts(
        norm=norms.norm_1,
        projections=(attn.Wqkv,),
        output=attn.out_proj,
        heads=attn.num_heads,
        kv_heads=attn.num_key_value_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        rope=attn.rope,
        clip=attn.clip_qkv or 0.0,
    )
    return LayerParts(attention, norms.norm_2, "ffn")


def _delta(
    layer: Any, projections: Sequence[str], at: Callable[[Any], Sequence[Slices]]
) -> DeltaParts:
    net = layer.linear_attn
    return DeltaParts(
        input_norm=layer.input_layernorm,
        projections=[net[name] for name in projections],
        slices=at(net),
        conv=net.conv1d.weight,
        log_decay=net.A_log,
        offset=net.dt_bias,
        norm=net.norm,
        output=net.out_proj,
        key_heads=net.num_k_heads,
        value_heads=net.num_v_heads,
        key_dim=net.head_k_dim,
        value_dim=net.head_v_dim,
    )


def _qwen3_next_slices(net: Any) -> list[Slices]:
    """Each head of keys has its queries, keys, values and gates beside each other."""
    keys, count = net.head_k_dim, net.num_v_heads // net.num_k_heads
    values = count * net.head_v_dim
    at = (0, keys, 2 * keys, 2 * keys + values)
    qkvz = [Slices(0, start, 2 * keys + 2 * values) for start in at]
    return qkvz + [Slices(1, start, 2 * count) for start in (0, count)]


def _qwen3_5_slices(net: Any) -> list[Slices]:
    keys, count = net.head_k_dim, net.num_v_heads // net.num_k_heads
    values = count * net.head_v_dim
    qkv = [Slices(0, 0, keys), Slices(0, net.key_dim, keys), Slices(0, 2 * net.key_dim, values)]
    return [*qkv, Slices(1, 0, values), Slices(2, 0, count), Slices(3, 0, count)]


def _hybrid(
    projections: Sequence[str], at: Callable[[Any], Sequence[Slices]]
) -> Callable[[Any, Any, int], LayerParts]:
    """Layers with a gated delta net of these projections, and others with gated attention."""

    def parts(model: Any, layer: Any, index: int) -> LayerParts:
        is_delta = layer.is_linear
        mixer = _delta(layer, projections, at) if is_delta else _attention(layer, is_gated=True)
        return LayerParts(mixer, layer.post_attention_layernorm, "mlp")

    return parts


LAYERS: dict[str, Callable[[Any, Any, int], LayerParts]] = {
    "qwen3_moe.Qwen3MoeDecoderLayer": _usual("mlp"),
    "qwen2_moe.Qwen2MoeDecoderLayer": _usual("mlp"),
    "olmoe.TransformerBlock": _usual("mlp"),
    "mixtral.MixtralDecoderLayer": _usual("block_sparse_moe"),
    "glm4_moe.DecoderLayer": _usual("mlp"),
    "minimax.MiniMaxDecoderLayer": _usual("block_sparse_moe"),
    "dots1.Dots1DecoderLayer": _usual("mlp"),
    "ernie4_5_moe.Ernie4_5_DecoderLayer": _usual("mlp"),
    "deepseek_v3.DeepseekV3DecoderLayer": _latent,
    "glm4_moe_lite.Glm4MoeLiteDecoderLayer": _latent,
    "gpt_oss.TransformerBlock": _gpt_oss,
    "dbrx.DecoderLayer": _dbrx,
    "qwen3_next.Qwen3NextDecoderLayer": _hybrid(("in_proj_qkvz", "in_proj_ba"), _qwen3_next_slices),
    "qwen3_5.DecoderLayer": _hybrid(
        ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), _qwen3_5_slices
    ),
}


# ---- routers -----------------------------------------------------------------------


def _matrix(gate: Any) -> Matrices:
    """That of a native linear layer, or of a module with a weight alone."""
    if hasattr(gate, "_matmul"):
        return gate._matmul.weight  # type: ignore[no-any-return]
    return matrices("the router's gate", {"weight": Stored.of(gate.weight)}, None)


def _softmax(block: Any) -> RouterParts:
    gate = _matrix(block.gate)
    return RouterParts(gate, RouteKind.SOFTMAX_TOP_K, block.top_k, bool(block.norm_topk_prob))


def _softmax_unnormalized(block: Any) -> RouterParts:
    return RouterParts(_matrix(block.gate), RouteKind.SOFTMAX_TOP_K, block.top_k)


def _dbrx_router(block: Any) -> RouterParts:
    gate = _matrix(block.router.layer)
    return RouterParts(gate, RouteKind.SOFTMAX_TOP_K, block.num_experts_per_tok, True)


def _top_k_softmax(block: Any) -> RouterParts:
    gate = _matrix(block.gate if "gate" in block else block.router)
    return RouterParts(gate, RouteKind.TOP_K_SOFTMAX, block.num_experts_per_tok)


def _granite_router(block: Any) -> RouterParts:
    router = block.router
    return RouterParts(_matrix(router.layer), RouteKind.TOP_K_SOFTMAX, router.top_k)


def _hunyuan_router(block: Any) -> RouterParts:
    return RouterParts(_matrix(block.gate.wg), RouteKind.SOFTMAX_TOP_K, block.top_k)


def _ernie_router(block: Any) -> RouterParts:
    is_sigmoid = isinstance(block.gate_act, Sigmoid)
    kind = RouteKind.SIGMOID_TOP_K if is_sigmoid else RouteKind.SOFTMAX_TOP_K
    return RouterParts(_matrix(block.gate), kind, block.k, normalize=True)


def _minimax_router(block: Any) -> RouterParts:
    return RouterParts(
        _matrix(block.gate),
        RouteKind.SIGMOID_TOP_K,
        block.num_experts_per_tok,
        normalize=True,
        bias=block.e_score_correction_bias,
    )


def _grouped_sigmoid(block: Any) -> RouterParts:
    gate = block.gate
    return RouterParts(
        _matrix(gate),
        RouteKind.SIGMOID_TOP_K,
        gate.top_k,
        normalize=gate.top_k > 1 and bool(gate.norm_topk_prob),
        bias=gate.e_score_correction_bias,
        groups=gate.n_group if gate.n_group > 1 else 0,
        kept=gate.topk_group,
        scale=float(gate.routed_scaling_factor),
    )


ROUTERS: dict[str, Callable[[Any], RouterParts]] = {
    "qwen3_moe.Qwen3MoeSparseMoeBlock": _softmax,
    "qwen3_next.Qwen3NextSparseMoeBlock": _softmax,
    "olmoe.OlmoeSparseMoeBlock": _softmax,
    "qwen2_moe.Qwen2MoeSparseMoeBlock": _softmax_unnormalized,
    "dbrx.SparseMoeBlock": _dbrx_router,
    "mixtral.MixtralSparseMoeBlock": _top_k_softmax,
    "gpt_oss.MLPBlock": _top_k_softmax,
    "ernie4_5_moe.Ernie4_5_MoeMLP": _ernie_router,
    "minimax.MiniMaxSparseMoeBlock": _minimax_router,
    "dots1.Dots1MoE": _grouped_sigmoid,
    "glm4_moe.MoE": _grouped_sigmoid,
    "glm4_moe_lite.Glm4MoeLiteMoE": _grouped_sigmoid,
    "deepseek_v3.DeepseekV3MoE": _grouped_sigmoid,
    "deepseek_v32.DeepseekV32MoE": _grouped_sigmoid,
    "exaone_moe.MoE": _grouped_sigmoid,
    "granitemoe.GraniteMoeMoE": _granite_router,
    "granitemoehybrid.GraniteMoeHybridMoE": _granite_router,
    "hunyuan.MoeBlock": _hunyuan_router,
    "jamba.JambaSparseMoeBlock": _top_k_softmax,
    "mellum.MellumSparseMoeBlock": _softmax,
}


# ---- dense layers and shared experts -----------------------------------------------------


def _swiglu(mlp: Any, weight: Any) -> MlpParts:
    return MlpParts((mlp.gate_proj, mlp.up_proj, mlp.down_proj), weight)


MLPS: dict[str, Callable[[Any, Any], MlpParts]] = {
    "deepseek_v3.DeepseekV3MLP": _swiglu,
    "deepseek_v32.DeepseekV32MLP": _swiglu,
    "dots1.Dots1MLP": _swiglu,
    "ernie4_5_moe.Ernie4_5_MLP": _swiglu,
    "glm4_moe.MLP": _swiglu,
    "glm4_moe_lite.Glm4MoeLiteMLP": _swiglu,
    "qwen2_moe.MLP": _swiglu,
    "qwen3_moe.MLP": _swiglu,
    "qwen3_next.Qwen3NextMLP": _swiglu,
}


def mlp_of(module: Any, weight: Any = None) -> MlpParts | None:
    """A feed-forward network taken apart, with its `weight` if it has one; None for a class
    that is not known.
    """
    take_apart = MLPS.get(key_of(module))
    return take_apart and take_apart(module, weight)


def shared_of(block: Any) -> MlpParts | None:
    """What a block computes beside its routed experts; None unless it is one known MLP."""
    if "shared_experts" in block:
        return mlp_of(block.shared_experts)
    if "shared_expert" in block and "shared_expert_gate" in block:
        return mlp_of(block.shared_expert, block.shared_expert_gate)
    return None


# ---- models -----------------------------------------------------------------------------


def final_norm_of(holder: Any) -> Module:
    """The norm after the last layer, in the module that holds a known family's layers."""
    norm: Module = holder.norm if "norm" in holder else holder.norm_f
    return norm


def ends_of(language_model: Any, holder: Any) -> tuple[Matrices, Matrices] | None:
    """The embedding and the matrix of the logits; None unless both are native.

    `language_model` has the module `holder`, which has the layers of a known family. Nothing else
    is before these, and nothing but the norm between them and the logits.
    """
    embedding = holder.embed_tokens if "embed_tokens" in holder else holder.wte
    head = language_model.get("lm_head")
    if head is None and getattr(language_model.args, "tie_word_embeddings", False):
        head = embedding
    if not hasattr(embedding, "_matmul") or not hasattr(head, "_matmul"):
        return None
    return embedding._matmul.weight, head._matmul.weight


def parts_of(model: Any) -> list[LayerParts] | None:
    """The layers of `model` taken apart, in order; None unless all of them can be.

    The model's linear layers are native by now: they know their sizes.
    """
    found = [LAYERS.get(key_of(layer)) for layer in model.layers]
    if None in found:
        return None
    return [
        take(model, layer, i) for i, (take, layer) in enumerate(zip(found, model.layers)) if take
    ]
