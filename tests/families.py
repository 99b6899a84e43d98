"""Small random models of every family that mlx-lm knows, saved as checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

Weights = dict[str, mx.array]

VOCAB = 96
DIM = 64
EXPERTS = 6
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Family:
    """How to build one family: its config, and its Hugging Face layout if it has one."""

    config: dict[str, Any]
    to_hf: Callable[[Weights, dict[str, Any]], Weights] | None = None


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


# ---- Hugging Face layouts ----------------------------------------------------


def one_by_one(
    block: str, names: dict[str, str], source: str = "switch_mlp", target: str = "experts"
) -> Callable[[Weights, dict[str, Any]], Weights]:
    """Each expert's tensors apart: `{block}.{target}.{e}.{name}.weight`."""

    def convert(weights: Weights, config: dict[str, Any]) -> Weights:
        out: Weights = {}
        for key, value in weights.items():
            head, found, tail = key.partition(f"{block}.{source}.")
            if not found:
                out[key] = value
                continue
            projection, kind = tail.split(".")
            for e in range(value.shape[0]):
                out[f"{head}{block}.{target}.{e}.{names[projection]}.{kind}"] = value[e]
        return out

    return convert


GLU = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
W123 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def renamed(*pairs: tuple[str, str]) -> Callable[[Weights, dict[str, Any]], Weights]:
    def convert(weights: Weights, config: dict[str, Any]) -> Weights:
        out: Weights = {}
        for key, value in weights.items():
            for old, new in pairs:
                key = key.replace(old, new)
            out[key] = value
        return out

    return convert


def chain(
    *steps: Callable[[Weights, dict[str, Any]], Weights],
) -> Callable[[Weights, dict[str, Any]], Weights]:
    def convert(weights: Weights, config: dict[str, Any]) -> Weights:
        for step in steps:
            weights = step(weights, config)
        return weights

    return convert


def fused(
    source: str, gate_up: str, down: str, *, transpose: bool = False, interleave: bool = False
) -> Callable[[Weights, dict[str, Any]], Weights]:
    """All experts in one tensor each for gate and up together, and for down."""

    def convert(weights: Weights, config: dict[str, Any]) -> Weights:
        out = dict(weights)
        for key in weights:
            head, found, tail = key.partition(f".{source}.gate_proj.")
            if not found:
                continue
            suffix = "_bias" if tail == "bias" else ""
            gate = out.pop(key)
            up = out.pop(f"{head}.{source}.up_proj.{tail}")
            axis = 1
            if interleave:
                both = mx.stack([gate, up], axis=2).flatten(1, 2)
            else:
                both = mx.concatenate([gate, up], axis=axis)
            low = out.pop(f"{head}.{source}.down_proj.{tail}")
            if transpose and tail == "weight":
                both, low = both.swapaxes(1, 2), low.swapaxes(1, 2)
            out[f"{head}.{gate_up}{suffix}"] = both
            out[f"{head}.{down}{suffix}"] = low
        return out

    return convert


def gpt_oss_hf(weights: Weights, config: dict[str, Any]) -> Weights:
    """Experts in mxfp4 blocks of bytes, gate and up rows by turns."""
    config["quantization_config"] = {"quant_method": "mxfp4"}
    out: Weights = {}
    both = fused("experts", "experts.gate_up_proj", "experts.down_proj", interleave=True)
    for key, value in both(weights, config).items():
        if ".experts." not in key or key.endswith("_bias"):
            out[key] = value
            continue
        packed, scales = mx.quantize(value, group_size=32, bits=4, mode="mxfp4")
        out[f"{key}_blocks"] = packed.view(mx.uint8).reshape(*scales.shape, 16)
        out[f"{key}_scales"] = scales
    return out


def deepseek_fp8_hf(weights: Weights, config: dict[str, Any]) -> Weights:
    """Projections in fp8 with a scale per block of 128 x 128."""
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    out: Weights = {}
    for key, value in MLP_EXPERTS(weights, config).items():
        if key.endswith("_proj.weight"):
            out[key] = mx.to_fp8(value * 32)
            out[f"{key}_scale_inv"] = mx.full((1, 1), 1 / 32)
        else:
            out[key] = value
    return out


def dbrx_hf(weights: Weights, config: dict[str, Any]) -> Weights:
    """As Databricks publishes it: the rows of all experts in one matrix."""
    out: Weights = {}
    groups: dict[str, dict[int, mx.array]] = {}
    for key, value in weights.items():
        head, found, tail = key.partition(".experts.")
        if not found:
            out[key] = value
            continue
        expert, projection, _ = tail.split(".")
        value = value.T if projection == "w2" else value
        groups.setdefault(f"{head}.experts.mlp.{projection}", {})[int(expert)] = value
    for key, values in groups.items():
        out[key] = mx.concatenate([values[e] for e in sorted(values)], axis=0)
    return out


def qwen3_next_hf(weights: Weights, config: dict[str, Any]) -> Weights:
    """Norms centred on zero, convolutions the other way round."""
    norms = (
        ".input_layernorm.weight",
        ".post_attention_layernorm.weight",
        "model.norm.weight",
        ".q_norm.weight",
        ".k_norm.weight",
    )
    out = one_by_one("mlp", GLU)(weights, config)
    for key, value in out.items():
        if key.endswith(norms):
            out[key] = value - 1.0
        elif "conv1d.weight" in key:
            out[key] = value.moveaxis(1, 2)
    return out


def step3p5_hf(weights: Weights, config: dict[str, Any]) -> Weights:
    names = renamed(
        (".mlp.switch_mlp.", ".moe."),
        (".mlp.gate.gate.", ".moe.gate."),
        (".mlp.gate.router_bias", ".moe.router_bias"),
        (".mlp.share_expert.", ".share_expert."),
    )
    out = names(weights, config)
    for key in out:
        if key.endswith(".weight") and "norm" in key:
            out[key] = out[key] - 1
    return out


# ---- the families --------------------------------------------------------------


def _config(model_type: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {**BASE, "model_type": model_type}
    for part in (*parts, more):
        config.update(part)
    return config


def _nested(model_type: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": text, "vocab_size": VOCAB, **more}


MLP_EXPERTS = one_by_one("mlp", GLU)
OWN_NAME = one_by_one("mlp", GLU, source="experts")
BAILING = {
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
BAILING_HF = chain(MLP_EXPERTS, renamed((".mlp.gate.gate_proj.", ".mlp.gate.")))
GEMMA4 = _config(
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
MISTRAL4 = _config(
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
QWEN3_5 = _config(
    "qwen3_5_moe_text",
    LINEAR_ATTENTION,
    rope_parameters={
        "type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
)

FAMILIES: dict[str, Family] = {
    # A: a router submodule
    "deepseek": Family(
        _config(
            "deepseek",
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            num_hidden_layers=3,
        ),
        MLP_EXPERTS,
    ),
    "deepseek_v2": Family(
        _config(
            "deepseek_v2",
            DEEPSEEK,
            topk_method="group_limited_greedy",
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        MLP_EXPERTS,
    ),
    "deepseek_v3": Family(_config("deepseek_v3", DEEPSEEK), MLP_EXPERTS),
    "deepseek_v32": Family(
        _config("deepseek_v32", DEEPSEEK, index_head_dim=32, index_n_heads=2, index_topk=16),
        MLP_EXPERTS,
    ),
    "glm_moe_dsa": Family(
        _config(
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
    "kimi_k25": Family(_nested("kimi_k25", _config("kimi_k2", DEEPSEEK)), MLP_EXPERTS),
    "kimi_vl": Family(_nested("kimi_vl", _config("deepseek_v3", DEEPSEEK)), MLP_EXPERTS),
    "exaone_moe": Family(
        _config(
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
        _config(
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
        _config(
            "solar_open",
            GROUPS,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            partial_rotary_factor=1.0,
        ),
        MLP_EXPERTS,
    ),
    "glm4_moe_lite": Family(_config("glm4_moe_lite", DEEPSEEK), MLP_EXPERTS),
    "mimo_v2_flash": Family(
        _config(
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
        _config(
            "dots1", GROUPS, n_routed_experts=EXPERTS, n_shared_experts=1, first_k_dense_replace=1
        ),
        OWN_NAME,
    ),
    "bailing_moe": Family(
        _config(
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
        _config(
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
        _config("bailing_hybrid", MLA, BAILING, GROUPS, layer_group_size=2, group_norm_size=1),
        BAILING_HF,
    ),
    "bailing_moe_v3": Family(
        _config(
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
        _config(
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
        _config(
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
        _config(
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
        _config(
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
    # B: softmax, then top-k
    "qwen3_moe": Family(_config("qwen3_moe", QWEN3_MOE), MLP_EXPERTS),
    "qwen3_vl_moe": Family(
        _nested("qwen3_vl_moe", _config("qwen3_moe", QWEN3_MOE)),
        fused("switch_mlp", "experts.gate_up_proj", "experts.down_proj", transpose=True),
    ),
    "olmoe": Family(_config("olmoe", num_experts=EXPERTS), MLP_EXPERTS),
    "mellum": Family(
        _config(
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
        _config("qwen2_moe", num_experts=EXPERTS, shared_expert_intermediate_size=64),
        MLP_EXPERTS,
    ),
    "qwen3_next": Family(_config("qwen3_next", LINEAR_ATTENTION), qwen3_next_hf),
    "qwen3_5": Family(_nested("qwen3_5", QWEN3_5)),
    "qwen3_5_moe": Family(
        _nested("qwen3_5_moe", QWEN3_5),
        fused("switch_mlp", "experts.gate_up_proj", "experts.down_proj"),
    ),
    "hunyuan": Family(
        _config(
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
        _config(
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
        _nested("mistral3", MISTRAL4),
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
        _config("mixtral", num_local_experts=EXPERTS), one_by_one("block_sparse_moe", W123)
    ),
    "jamba": Family(
        _config(
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
        _config(
            "gpt_oss",
            num_local_experts=EXPERTS,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        gpt_oss_hf,
    ),
    "phimoe": Family(
        _config("phimoe", num_local_experts=EXPERTS), one_by_one("block_sparse_moe", W123)
    ),
    # D: sigmoid with a bias for the choice
    "minimax": Family(
        _config("minimax", num_local_experts=EXPERTS, shared_intermediate_size=64, rotary_dim=8),
        one_by_one("block_sparse_moe", W123),
    ),
    "minimax_m3_vl": Family(
        _nested(
            "minimax_m3_vl",
            _config(
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
        _config("kimi_linear", KIMI_LINEAR, first_k_dense_replace=1),
        chain(
            one_by_one("mlp", W123),
            renamed(
                (".mlp.experts.", ".block_sparse_moe.experts."),
            ),
        ),
    ),
    "lfm2_moe": Family(
        _config(
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
        _config(
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
    "Klear": Family(_config("Klear", QWEN3_MOE, n_shared_experts=1), OWN_NAME),
    # E: special
    "nemotron_h": Family(
        _config(
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
        _nested(
            "kimi_k3",
            _config(
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
        _nested(
            "llama4",
            _config(
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
    "longcat_flash": Family(_config("longcat_flash", MLA, LONGCAT), MLP_EXPERTS),
    "longcat_flash_ngram": Family(
        _config(
            "longcat_flash_ngram",
            MLA,
            LONGCAT,
            ngram_vocab_size_ratio=2,
            emb_neighbor_num=3,
            emb_split_num=2,
        ),
    ),
    "deepseek_v41": Family(
        _config(
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
    "gemma4": Family(_nested("gemma4", GEMMA4)),
}


def random_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's own model with weights of a sensible scale and a decided router."""
    config = copy.deepcopy(config)
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    drawn = [(name, _draw(name, array)) for name, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten(drawn))
    model.eval()
    mx.eval(model.parameters())
    return model


def _draw(name: str, array: mx.array) -> mx.array:
    noise = mx.random.normal(array.shape)
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    leaf = name.rpartition(".")[2]
    if "e_score_correction_bias" in name or leaf in ("expert_bias", "router_bias"):
        return 0.05 * noise
    if leaf in ("A_log", "dt_bias", "D", "dt_proj"):
        return array.astype(mx.float32)
    if array.ndim == 1:  # a norm or a bias
        return (array + 0.1 * noise).astype(mx.float32)
    if "conv" in name:
        return 0.5 * noise
    spread = 4.0 if _routes(name) else 1.5
    return noise * (spread / array.shape[-1] ** 0.5)


def _routes(name: str) -> bool:
    parts = name.split(".")[:-1]
    return "gate" in parts or "router" in parts


def build(
    name: str,
    folder: Path,
    dtype: str = "float32",
    quantize: tuple[str, int, int] | None = None,
    layout: str = "mlx",
    seed: int = 0,
) -> Path:
    """Save a random model of the family `name` into `folder` and return it.

    `quantize` is (mode, bits, group size). `layout` "hf" writes the tensors as
    Hugging Face publishes them, "mlx" as mlx-lm converts them.
    """
    family = FAMILIES[name]
    config = copy.deepcopy(family.config)
    model = random_model(config, seed)
    floats = {
        key: value.astype(DTYPES[dtype]) if mx.issubdtype(value.dtype, mx.floating) else value
        for key, value in tree_flatten(model.parameters())
    }
    model.update(tree_unflatten(list(floats.items())))
    if quantize is not None:
        mode, bits, group = quantize
        nn.quantize(model, group_size=group, bits=bits, mode=mode, class_predicate=_quantizable)
        config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
    weights = dict(tree_flatten(model.parameters()))
    if layout == "hf":
        assert family.to_hf is not None, f"{name} has no Hugging Face layout here"
        weights = family.to_hf(weights, config)
    return save(folder, config, weights)


def _quantizable(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and not _routes(path + ".weight")


def save(folder: Path, config: dict[str, Any], weights: Weights, files: int = 2) -> Path:
    """Write config.json and the weights, spread over `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    for number in range(files):
        part = {key: mx.contiguous(weights[key]) for key in names[number::files]}
        path = folder / f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        mx.save_safetensors(str(path), part, metadata={"format": "mlx"})
    return folder
