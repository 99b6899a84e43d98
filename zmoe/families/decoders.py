"""Decoder layers taken apart, for families whose attention is the usual one.

What is not here runs layer by layer in MLX, its products on the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx.nn.layers.base import Module

from zmoe.families.sites import key_of
from zmoe.kernels.attention import AttentionParts
from zmoe.kernels.decoder import SOFTMAX_TOP_K, TOP_K_SOFTMAX, RouterParts


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer h = x + attention(norm(x)); h + feed_forward(norm(h)).

    `feed_forward` is the name of that module in `layer`.
    """

    attention: AttentionParts
    norm: Module
    feed_forward: str


# ---- attention ---------------------------------------------------------------------


def _attention(layer: Any, **more: Any) -> AttentionParts:
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
        head_dim=attn.q_proj._matmul.weight.out_features // heads,
        scale=attn.sm_scale if hasattr(attn, "sm_scale") else attn.scale,
        rope=attn.rope,
        query_norm=attn.get("q_norm"),
        key_norm=attn.get("k_norm"),
        **more,
    )


def _usual(feed_forward: str) -> Callable[[Any, Any, int], LayerParts]:
    def parts(model: Any, layer: Any, index: int) -> LayerParts:
        return LayerParts(_attention(layer), layer.post_attention_layernorm, feed_forward)

    return parts


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


LAYERS: dict[str, Callable[[Any, Any, int], LayerParts]] = {
    "qwen3_moe.Qwen3MoeDecoderLayer": _usual("mlp"),
    "qwen2_moe.Qwen2MoeDecoderLayer": _usual("mlp"),
    "olmoe.TransformerBlock": _usual("mlp"),
    "mixtral.MixtralDecoderLayer": _usual("block_sparse_moe"),
    "glm4_moe.DecoderLayer": _usual("mlp"),
    "gpt_oss.TransformerBlock": _gpt_oss,
    "dbrx.DecoderLayer": _dbrx,
}


# ---- routers -----------------------------------------------------------------------


def _softmax(block: Any) -> RouterParts:
    return RouterParts(block.gate, SOFTMAX_TOP_K, block.top_k, bool(block.norm_topk_prob))


def _softmax_unnormalized(block: Any) -> RouterParts:
    return RouterParts(block.gate, SOFTMAX_TOP_K, block.top_k)


def _dbrx_router(block: Any) -> RouterParts:
    return RouterParts(block.router.layer, SOFTMAX_TOP_K, block.num_experts_per_tok, True)


def _top_k_softmax(block: Any) -> RouterParts:
    gate = block.gate if "gate" in block else block.router
    return RouterParts(gate, TOP_K_SOFTMAX, block.num_experts_per_tok)


ROUTERS: dict[str, Callable[[Any], RouterParts]] = {
    "qwen3_moe.Qwen3MoeSparseMoeBlock": _softmax,
    "olmoe.OlmoeSparseMoeBlock": _softmax,
    "qwen2_moe.Qwen2MoeSparseMoeBlock": _softmax_unnormalized,
    "dbrx.SparseMoeBlock": _dbrx_router,
    "mixtral.MixtralSparseMoeBlock": _top_k_softmax,
    "gpt_oss.MLPBlock": _top_k_softmax,
}


def final_norm_of(holder: Any) -> Module:
    """The norm after the last layer, in the module that holds a known family's layers."""
    norm: Module = holder.norm if "norm" in holder else holder.norm_f
    return norm


def parts_of(model: Any) -> list[LayerParts] | None:
    """The layers of `model` taken apart; None unless all of them can be."""
    found = []
    for index, layer in enumerate(model.layers):
        take_apart = LAYERS.get(key_of(layer))
        if take_apart is None:
            return None
        found.append(take_apart(model, layer, index))
    return found
