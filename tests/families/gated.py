"""Families of pattern A: a router submodule returns ids and weights."""

from __future__ import annotations

from tests.families.base import DEEPSEEK, EXPERTS, GROUPS, MLA, Family, config, nested
from tests.families.layouts import MLP_EXPERTS, OWN_NAME, chain, fused, renamed, step3p5_hf

BAILING = {
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}

BAILING_HF = chain(MLP_EXPERTS, renamed((".mlp.gate.gate_proj.", ".mlp.gate.")))

FAMILIES: dict[str, Family] = {
    # A: a router submodule
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
    "deepseek_v3": Family(config("deepseek_v3", DEEPSEEK), MLP_EXPERTS),
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
    "glm4_moe_lite": Family(config("glm4_moe_lite", DEEPSEEK), MLP_EXPERTS),
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
}
