"""Small configs that several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.families.layouts import Layout

VOCAB = 96
DIM = 64
EXPERTS = 6


@dataclass(frozen=True)
class Family:
    """How to build one family: its config, and its Hugging Face layout if it has one."""

    config: dict[str, Any]
    to_hf: Layout | None = None


BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": True,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "topk_method": "noaux_tc",
}
GROUPS = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5}
DEEPSEEK = {
    **MLA,
    **GROUPS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "moe_layer_freq": 1,
}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.25,
    "num_experts": EXPERTS,
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
KDA = {
    "kda_layers": [1],
    "full_attn_layers": [2],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
QWEN3_MOE = {"num_experts": EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}


def config(model_type: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {**BASE, "model_type": model_type}
    for part in (*parts, more):
        config.update(part)
    return config


def nested(model_type: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": text, "vocab_size": VOCAB, **more}
