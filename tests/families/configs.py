"""A small config of every family, grouped by router as in zmoe/families/table.py."""

from __future__ import annotations

from tests.families.base import (
    DEEPSEEK,
    DIM,
    EXPERTS,
    GROUPS,
    KDA,
    LINEAR_ATTENTION,
    MLA,
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
    step3p5_hf,
)

BAILING = {
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}

BAILING_HF = chain(MLP_EXPERTS, renamed((".mlp.gate.gate_proj.", ".mlp.gate.")))

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

GEMMA4 = config(
    "gemma4_text",
    enable_moe_block=True,
    num_experts=EXPERTS,
    top_k_experts=3,
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
    global_head_dim=16,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"],
    tie_word_embeddings=False,
    use_double_wide_mlp=False,
)

LONGCAT = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    ffn_hidden_size=64,
    moe_topk=3,
    expert_ffn_hidden_size=64,
    n_routed_experts=EXPERTS,
    zero_expert_num=3,
    num_layers=2,
    routed_scaling_factor=1.5,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)

FAMILIES: dict[str, Family] = {
    # ---- a submodule returns ids and weights ----
    "deepseek": Family(
        config(
            "deepseek",
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            num_hidden_layers=3,
        ),
        MLP_EXPERTS,
    ),
    "deepseek_v2": Family(
        config(
            "deepseek_v2",
            DEEPSEEK,
            topk_method="group_limited_greedy",
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        MLP_EXPERTS,
    ),
    "deepseek_v3": Family(
        config(
            "deepseek_v3",
            DEEPSEEK,
            qk_nope_head_dim=32,  # so that heads can be quantised
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
            },
        ),
        MLP_EXPERTS,
    ),
    "deepseek_v32": Family(
        config("deepseek_v32", DEEPSEEK, index_head_dim=32, index_n_heads=2, index_topk=16),
        MLP_EXPERTS,
    ),
    "glm_moe_dsa": Family(
        config(
            "glm_moe_dsa",
            DEEPSEEK,
            index_head_dim=32,
            index_n_heads=2,
            index_topk=16,
            scoring_func="sigmoid",
            rope_parameters={"rope_theta": 10000.0},
        ),
        MLP_EXPERTS,
    ),
    "kimi_k25": Family(nested("kimi_k25", config("kimi_k2", DEEPSEEK)), MLP_EXPERTS),
    "kimi_vl": Family(nested("kimi_vl", config("deepseek_v3", DEEPSEEK)), MLP_EXPERTS),
    "exaone_moe": Family(
        config(
            "exaone_moe",
            GROUPS,
            num_experts=EXPERTS,
            num_shared_experts=1,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            is_moe_layer=[False, True],
        ),
        MLP_EXPERTS,
    ),
    "glm4_moe": Family(
        config(
            "glm4_moe",
            GROUPS,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            rope_scaling=None,
            use_qk_norm=True,
            partial_rotary_factor=0.5,
        ),
        MLP_EXPERTS,
    ),
    "solar_open": Family(
        config(
            "solar_open",
            GROUPS,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            partial_rotary_factor=1.0,
        ),
        MLP_EXPERTS,
    ),
    "glm4_moe_lite": Family(config("glm4_moe_lite", DEEPSEEK, q_lora_rank=None), MLP_EXPERTS),
    "mimo_v2_flash": Family(
        config(
            "mimo_v2_flash",
            GROUPS,
            n_routed_experts=EXPERTS,
            n_shared_experts=None,
            hybrid_layer_pattern=[0, 1],
            moe_layer_freq=[0, 1],
            add_swa_attention_sink_bias=True,
            add_full_attention_sink_bias=False,
            sliding_window_size=16,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            layernorm_epsilon=1e-5,
            swa_rope_theta=10000.0,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            v_head_dim=16,
            swa_head_dim=16,
            swa_v_head_dim=16,
            partial_rotary_factor=0.5,
        ),
        MLP_EXPERTS,
    ),
    "dots1": Family(
        config(
            "dots1", GROUPS, n_routed_experts=EXPERTS, n_shared_experts=1, first_k_dense_replace=1
        ),
        OWN_NAME,
    ),
    "bailing_moe": Family(
        config(
            "bailing_moe",
            BAILING,
            GROUPS,
            score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            use_qk_norm=True,
        ),
        BAILING_HF,
    ),
    "bailing_moe_linear": Family(
        config(
            "bailing_moe_linear",
            BAILING,
            n_group=1,
            topk_group=1,
            layer_group_size=2,
            group_norm_size=1,
            norm_head=False,
            num_key_value_heads=4,
        ),
        BAILING_HF,
    ),
    "bailing_hybrid": Family(
        config("bailing_hybrid", MLA, BAILING, GROUPS, layer_group_size=2, group_norm_size=1),
        BAILING_HF,
    ),
    "bailing_moe_v3": Family(
        config(
            "bailing_moe_v3",
            MLA,
            BAILING,
            GROUPS,
            layer_group_size=2,
            moe_shared_expert_intermediate_size=64,
        ),
        MLP_EXPERTS,
    ),
    "step3p5": Family(
        config(
            "step3p5",
            num_attention_groups=2,
            moe_num_experts=EXPERTS,
            moe_top_k=3,
            share_expert_dim=64,
            sliding_window=16,
            swiglu_limits=[0.0, 1.0],
            layer_types=["full_attention", "sliding_attention"],
        ),
        step3p5_hf,
    ),
    "laguna": Family(
        config(
            "laguna",
            num_experts=EXPERTS,
            shared_expert_intermediate_size=64,
            moe_routed_scaling_factor=1.5,
            moe_router_score_func="sqrtsoftplus",
            sliding_window=16,
            num_hidden_layers=3,
        ),
        chain(
            MLP_EXPERTS,
            renamed((".mlp.gate.proj.", ".mlp.gate."), (".gate.e_score", ".experts.e_score")),
        ),
    ),
    "granitemoe": Family(
        config(
            "granitemoe",
            num_local_experts=EXPERTS,
            logits_scaling=1.0,
            attention_multiplier=0.25,
            embedding_multiplier=1.0,
            residual_multiplier=0.5,
            tie_word_embeddings=True,
        ),
        fused("switch_mlp", "input_linear.weight", "output_linear.weight"),
    ),
    "granitemoehybrid": Family(
        config(
            "granitemoehybrid",
            num_local_experts=EXPERTS,
            logits_scaling=1.0,
            attention_multiplier=0.25,
            embedding_multiplier=1.0,
            residual_multiplier=0.5,
            layer_types=["mamba", "attention"],
            shared_intermediate_size=64,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_proj_bias=False,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_n_groups=1,
            mamba_conv_bias=True,
            tie_word_embeddings=True,
        ),
        fused("switch_mlp", "input_linear.weight", "output_linear.weight"),
    ),
    # ---- softmax, then top-k ----
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
    # ---- top-k, then softmax ----
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
    # ---- sigmoid, with a bias for the selection alone ----
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
    # ---- experts see another input than the block, and other specialities ----
    "nemotron_h": Family(
        config(
            "nemotron_h",
            GROUPS,
            mamba_num_heads=4,
            mamba_head_dim=32,
            mamba_proj_bias=False,
            ssm_state_size=16,
            conv_kernel=4,
            n_groups=1,
            mlp_bias=False,
            layer_norm_epsilon=1e-5,
            use_bias=False,
            use_conv_bias=True,
            hybrid_override_pattern=["M", "E", "*", "E"],
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=64,
            moe_latent_size=32,
            num_hidden_layers=4,
        ),
        one_by_one("mixer", {"fc1": "up_proj", "fc2": "down_proj"}),
    ),
    "kimi_k3": Family(
        nested(
            "kimi_k3",
            config(
                "kimi_linear",
                KIMI_LINEAR,
                hidden_act="situ",
                attn_res_block_size=2,
                q_lora_rank=32,
                num_hidden_layers=3,
                routed_expert_hidden_size=32,
                latent_moe_use_norm=True,
                first_k_dense_replace=1,
                linear_attn_config={**KDA, "kda_layers": [1, 2], "full_attn_layers": [3]},
            ),
        ),
        chain(
            one_by_one("mlp", W123),
            renamed(
                (".mlp.experts.", ".block_sparse_moe.experts."),
            ),
        ),
    ),
    "llama4": Family(
        nested(
            "llama4",
            config(
                "llama4_text",
                attention_chunk_size=16,
                interleave_moe_layer_step=1,
                intermediate_size_mlp=64,
                num_local_experts=EXPERTS,
                num_experts_per_tok=1,
                rope_scaling=None,
                use_qk_norm=True,
                num_hidden_layers=4,
            ),
        ),
        fused("experts", "experts.gate_up_proj", "experts.down_proj", transpose=True),
    ),
    "longcat_flash": Family(config("longcat_flash", MLA, LONGCAT), MLP_EXPERTS),
    "longcat_flash_ngram": Family(
        config(
            "longcat_flash_ngram",
            MLA,
            LONGCAT,
            ngram_vocab_size_ratio=2,
            emb_neighbor_num=3,
            emb_split_num=2,
        ),
    ),
    "deepseek_v41": Family(
        config(
            "deepseek_v41",
            q_lora_rank=32,
            qk_rope_head_dim=8,
            o_groups=2,
            o_lora_rank=16,
            n_routed_experts=EXPERTS,
            sliding_window=16,
            compress_ratios=[0, 4, 4],
            kv_source_layer_ids=[1],
            index_source_layer_ids=[1],
            index_n_heads=2,
            index_head_dim=16,
            index_topk=4,
            hc_mult=2,
            rms_norm_eps=1e-6,
            num_hidden_layers=3,
        ),
    ),
    "gemma4_text": Family(
        GEMMA4, fused("experts.switch_glu", "experts.gate_up_proj", "experts.down_proj")
    ),
    "gemma4": Family(nested("gemma4", GEMMA4)),
}
