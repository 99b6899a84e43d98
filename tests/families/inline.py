"""Families of patterns B, C and D: the block routes by itself."""

from __future__ import annotations

from tests.families.base import (
    DEEPSEEK,
    DIM,
    EXPERTS,
    KDA,
    LINEAR_ATTENTION,
    QWEN3_MOE,
    VOCAB,
    Family,
    config,
    nested,
)
from tests.families.layouts import (
    GLU,
    MLP_EXPERTS,
    OWN_NAME,
    W123,
    chain,
    dbrx_hf,
    fused,
    gpt_oss_hf,
    one_by_one,
    qwen3_next_hf,
    renamed,
)

MISTRAL4 = config(
    "mistral4",
    DEEPSEEK,
    first_k_dense_replace=0,
    num_hidden_layers=2,
    rope_parameters={
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "llama_4_scaling_beta": 0.1,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
)

QWEN3_5 = config(
    "qwen3_5_moe_text",
    LINEAR_ATTENTION,
    rope_parameters={
        "type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
)

KIMI_LINEAR = dict(
    linear_attn_config=KDA,
    model_max_length=512,
    num_experts=EXPERTS,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    num_experts_per_token=3,
    num_shared_experts=1,
    routed_scaling_factor=1.5,
    num_key_value_heads=4,
)

FAMILIES: dict[str, Family] = {
    # B: softmax, then top-k
    "qwen3_moe": Family(config("qwen3_moe", QWEN3_MOE), MLP_EXPERTS),
    "qwen3_vl_moe": Family(
        nested("qwen3_vl_moe", config("qwen3_moe", QWEN3_MOE)),
        fused("switch_mlp", "experts.gate_up_proj", "experts.down_proj", transpose=True),
    ),
    "olmoe": Family(config("olmoe", num_experts=EXPERTS), MLP_EXPERTS),
    "mellum": Family(
        config(
            "mellum",
            num_experts=EXPERTS,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_theta": 10000.0},
                "full_attention": {"rope_theta": 10000.0},
            },
        ),
        MLP_EXPERTS,
    ),
    "qwen2_moe": Family(
        config("qwen2_moe", num_experts=EXPERTS, shared_expert_intermediate_size=64),
        MLP_EXPERTS,
    ),
    "qwen3_next": Family(config("qwen3_next", LINEAR_ATTENTION), qwen3_next_hf),
    "qwen3_5": Family(nested("qwen3_5", QWEN3_5)),
    "qwen3_5_moe": Family(
        nested("qwen3_5_moe", QWEN3_5),
        fused("switch_mlp", "experts.gate_up_proj", "experts.down_proj"),
    ),
    "hunyuan": Family(
        config(
            "hunyuan",
            moe_topk=3,
            num_experts=EXPERTS,
            num_shared_expert=1,
            use_mixed_mlp_moe=True,
            use_qk_norm=True,
            use_cla=False,
            cla_share_factor=2,
            rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1.0},
        ),
        MLP_EXPERTS,
    ),
    "ernie4_5_moe": Family(
        config(
            "ernie4_5_moe",
            use_bias=False,
            moe_num_experts=EXPERTS,
            moe_k=3,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
        MLP_EXPERTS,
    ),
    "mistral4": Family(MISTRAL4, MLP_EXPERTS),
    "mistral3": Family(
        nested("mistral3", MISTRAL4),
        fused("switch_mlp", "experts.gate_up_proj", "experts.down_proj"),
    ),
    "dbrx": Family(
        {
            "model_type": "dbrx",
            "vocab_size": VOCAB,
            "d_model": DIM,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 512,
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": EXPERTS, "moe_top_k": 3},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
        dbrx_hf,
    ),
    # C: top-k, then softmax
    "mixtral": Family(
        config("mixtral", num_local_experts=EXPERTS), one_by_one("block_sparse_moe", W123)
    ),
    "jamba": Family(
        config(
            "jamba",
            attn_layer_offset=1,
            attn_layer_period=2,
            expert_layer_offset=0,
            expert_layer_period=1,
            mamba_d_conv=4,
            mamba_d_state=8,
            mamba_expand=2,
            num_experts=EXPERTS,
        ),
        one_by_one("feed_forward", GLU),
    ),
    "phixtral": Family(
        {
            "model_type": "phixtral",
            "num_vocab": VOCAB,
            "model_dim": DIM,
            "num_heads": 4,
            "num_layers": 2,
            "rotary_dim": 8,
            "num_experts_per_tok": 3,
            "num_local_experts": EXPERTS,
        },
        one_by_one("moe", {"fc1": "fc1", "fc2": "fc2"}, target="mlp"),
    ),
    "gpt_oss": Family(
        config(
            "gpt_oss",
            num_local_experts=EXPERTS,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        gpt_oss_hf,
    ),
    "phimoe": Family(
        config("phimoe", num_local_experts=EXPERTS), one_by_one("block_sparse_moe", W123)
    ),
    # D: sigmoid with a bias for the choice
    "minimax": Family(
        config("minimax", num_local_experts=EXPERTS, shared_intermediate_size=64, rotary_dim=8),
        one_by_one("block_sparse_moe", W123),
    ),
    "minimax_m3_vl": Family(
        nested(
            "minimax_m3_vl",
            config(
                "minimax_m3",
                num_local_experts=EXPERTS,
                dense_intermediate_size=64,
                shared_intermediate_size=64,
                moe_layer_freq=[0, 1],
            ),
        ),
        one_by_one("block_sparse_moe", W123),
    ),
    "kimi_linear": Family(
        config("kimi_linear", KIMI_LINEAR, first_k_dense_replace=1),
        chain(
            one_by_one("mlp", W123),
            renamed(
                (".mlp.experts.", ".block_sparse_moe.experts."),
            ),
        ),
    ),
    "lfm2_moe": Family(
        config(
            "lfm2_moe",
            num_experts=EXPERTS,
            use_expert_bias=True,
            num_dense_layers=1,
            norm_eps=1e-5,
            conv_bias=False,
            conv_L_cache=3,
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
        ),
        one_by_one("feed_forward", W123),
    ),
    "afmoe": Family(
        config(
            "afmoe",
            num_experts=EXPERTS,
            n_group=3,
            topk_group=2,
            num_dense_layers=1,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
        ),
        OWN_NAME,
    ),
    "Klear": Family(config("Klear", QWEN3_MOE, n_shared_experts=1), OWN_NAME),
}
