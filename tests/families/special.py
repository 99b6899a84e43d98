"""Families of pattern E."""

from __future__ import annotations

from tests.families.base import EXPERTS, GROUPS, KDA, MLA, Family, config, nested
from tests.families.inline import KIMI_LINEAR
from tests.families.layouts import MLP_EXPERTS, W123, chain, fused, one_by_one, renamed

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
    # E: special
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
