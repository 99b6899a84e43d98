"""Model families that bench/make_model.py writes: configurations, and tensors as published."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _llama_config(o: argparse.Namespace) -> dict[str, Any]:
    return {
        "hidden_size": o.hidden,
        "num_hidden_layers": o.layers,
        "num_attention_heads": o.heads,
        "num_key_value_heads": o.kv_heads,
        "num_experts_per_tok": o.top_k,
        "vocab_size": o.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": o.context,
        "tie_word_embeddings": False,
    }


def _llama(o: argparse.Namespace, moe: Callable[[str], Shapes]) -> Shapes:
    queries, keys = o.heads * o.head_dim, o.kv_heads * o.head_dim
    attention = (
        ("q_proj", (queries, o.hidden)),
        ("k_proj", (keys, o.hidden)),
        ("v_proj", (keys, o.hidden)),
        ("o_proj", (o.hidden, queries)),
    )
    yield "model.embed_tokens.weight", (o.vocab, o.hidden)
    for layer in range(o.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (o.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (o.hidden,)
        for name, shape in attention:
            yield f"{prefix}.self_attn.{name}.weight", shape
        yield from moe(prefix)
    yield "model.norm.weight", (o.hidden,)
    yield "lm_head.weight", (o.vocab, o.hidden)


def _glu(prefix: str, o: argparse.Namespace, ffn: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (ffn, o.hidden)
    yield f"{prefix}.up_proj.weight", (ffn, o.hidden)
    yield f"{prefix}.down_proj.weight", (o.hidden, ffn)


def _dense_ffn(o: argparse.Namespace) -> int:
    """Of a layer without experts: as much as a token's experts have elsewhere, all together."""
    return int((o.top_k + 1) * o.ffn)


def _sigmoid_moe(prefix: str, o: argparse.Namespace) -> Shapes:
    """A MoE block with a shared expert, but in the first layer an MLP."""
    if prefix.endswith(".0"):
        yield from _glu(f"{prefix}.mlp", o, _dense_ffn(o))
        return
    yield f"{prefix}.mlp.gate.weight", (o.experts, o.hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (o.experts,)
    yield from _glu(f"{prefix}.mlp.shared_experts", o, o.ffn)
    for expert in range(o.experts):
        yield from _glu(f"{prefix}.mlp.experts.{expert}", o, o.ffn)


def _sigmoid_config(o: argparse.Namespace) -> dict[str, Any]:
    return {
        "n_routed_experts": o.experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": o.ffn,
        "intermediate_size": _dense_ffn(o),
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "attention_bias": False,
        **_llama_config(o),
    }


def mixtral(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of Mixtral."""
    config = {"num_local_experts": o.experts, "intermediate_size": o.ffn, **_llama_config(o)}

    def moe(prefix: str) -> Shapes:
        yield f"{prefix}.block_sparse_moe.gate.weight", (o.experts, o.hidden)
        for expert in range(o.experts):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            yield f"{name}.w1.weight", (o.ffn, o.hidden)
            yield f"{name}.w2.weight", (o.hidden, o.ffn)
            yield f"{name}.w3.weight", (o.ffn, o.hidden)

    return config, _llama(o, moe)


def qwen3_moe(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of Qwen3-MoE."""
    config = {
        "num_experts": o.experts,
        "moe_intermediate_size": o.ffn,
        "intermediate_size": o.ffn,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "head_dim": o.head_dim,
        **_llama_config(o),
    }

    def moe(prefix: str) -> Shapes:
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{norm}.weight", (o.head_dim,)
        yield f"{prefix}.mlp.gate.weight", (o.experts, o.hidden)
        for expert in range(o.experts):
            yield from _glu(f"{prefix}.mlp.experts.{expert}", o, o.ffn)

    return config, _llama(o, moe)


def glm4_moe(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of GLM-4.5."""
    config = {
        "head_dim": o.head_dim,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        **_sigmoid_config(o),
    }

    def moe(prefix: str) -> Shapes:
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{norm}.weight", (o.head_dim,)
        yield from _sigmoid_moe(prefix, o)

    return config, _llama(o, moe)


def minimax(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of MiniMax-M2."""
    config, mixtral_shapes = mixtral(o)
    config |= {
        "head_dim": o.head_dim,
        "rotary_dim": o.head_dim // 2,
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
    }

    def tensors() -> Shapes:
        yield from mixtral_shapes
        for layer in range(o.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.block_sparse_moe.e_score_correction_bias", (o.experts,)
            yield f"{prefix}.self_attn.q_norm.weight", (o.head_dim * o.heads,)
            yield f"{prefix}.self_attn.k_norm.weight", (o.head_dim * o.kv_heads,)

    return config, tensors()


def deepseek_v3(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of DeepSeek-V3, each head's parts as large as there."""
    latent, rank, rope, head = o.hidden // 4, o.hidden // 2, 64, 128
    config = {
        "kv_lora_rank": latent,
        "q_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": head,
        "v_head_dim": head,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        **_sigmoid_config(o),
        "num_key_value_heads": o.heads,
    }
    attention = (
        ("q_a_proj", (rank, o.hidden)),
        ("q_a_layernorm", (rank,)),
        ("q_b_proj", (o.heads * (head + rope), rank)),
        ("kv_a_proj_with_mqa", (latent + rope, o.hidden)),
        ("kv_a_layernorm", (latent,)),
        ("kv_b_proj", (o.heads * 2 * head, latent)),
        ("o_proj", (o.hidden, o.heads * head)),
    )

    def tensors() -> Shapes:
        for name, shape in _llama(o, lambda prefix: _sigmoid_moe(prefix, o)):
            if ".self_attn." not in name:
                yield name, shape
        for layer in range(o.layers):
            for part, shape in attention:
                yield f"model.layers.{layer}.self_attn.{part}.weight", shape

    return config, tensors()


def dbrx(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of DBRX, the experts of a layer stacked."""
    config = {
        "d_model": o.hidden,
        "n_layers": o.layers,
        "n_heads": o.heads,
        "max_seq_len": o.context,
        "vocab_size": o.vocab,
        "attn_config": {"kv_n_heads": o.kv_heads, "clip_qkv": 8.0, "rope_theta": 5e5},
        "ffn_config": {
            "ffn_hidden_size": o.ffn,
            "moe_num_experts": o.experts,
            "moe_top_k": o.top_k,
        },
        "tie_word_embeddings": False,
    }

    def tensors() -> Shapes:
        qkv = o.hidden + 2 * (o.hidden // o.heads * o.kv_heads)
        yield "transformer.wte.weight", (o.vocab, o.hidden)
        for layer in range(o.layers):
            prefix = f"transformer.blocks.{layer}"
            for norm in ("norm_1", "norm_2"):
                yield f"{prefix}.norm_attn_norm.{norm}.weight", (o.hidden,)
            yield f"{prefix}.norm_attn_norm.attn.Wqkv.weight", (qkv, o.hidden)
            yield f"{prefix}.norm_attn_norm.attn.out_proj.weight", (o.hidden, o.hidden)
            yield f"{prefix}.ffn.router.layer.weight", (o.experts, o.hidden)
            for matrix in ("w1", "v1", "w2"):
                yield f"{prefix}.ffn.experts.mlp.{matrix}", (o.experts * o.ffn, o.hidden)
        yield "transformer.norm_f.weight", (o.hidden,)
        yield "lm_head.weight", (o.vocab, o.hidden)

    return config, tensors()


def _delta_config(o: argparse.Namespace) -> dict[str, Any]:
    """Gated delta nets: heads half as wide as those of attention, twice as many for values."""
    return {
        "linear_num_value_heads": 2 * o.heads,
        "linear_num_key_heads": o.heads,
        "linear_key_head_dim": o.head_dim // 2,
        "linear_value_head_dim": o.head_dim // 2,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "shared_expert_intermediate_size": o.ffn,
    }


def _delta(o: argparse.Namespace, qwen3: Shapes, projections: Mapping[str, int]) -> Shapes:
    """Qwen3-MoE's tensors with gates and a shared expert, and in three layers of four a gated delta
    net of these `projections`, name and rows, in the place of attention.
    """
    keys = values = o.heads * o.head_dim  # keys and queries together
    net = (
        *((f"{name}.weight", (rows, o.hidden)) for name, rows in projections.items()),
        ("conv1d.weight", (keys + values, 1, 4)),
        ("A_log", (2 * o.heads,)),
        ("dt_bias", (2 * o.heads,)),
        ("norm.weight", (o.head_dim // 2,)),
        ("out_proj.weight", (o.hidden, values)),
    )
    for name, shape in qwen3:
        if ".self_attn." not in name:
            yield name, shape
        elif int(name.split(".")[2]) % 4 == 3:
            yield name, (2 * shape[0], shape[1]) if "q_proj" in name else shape
    for layer in range(o.layers):
        prefix = f"model.layers.{layer}"
        yield from _glu(f"{prefix}.mlp.shared_expert", o, o.ffn)
        yield f"{prefix}.mlp.shared_expert_gate.weight", (1, o.hidden)
        for part, shape in net if layer % 4 != 3 else ():
            yield f"{prefix}.linear_attn.{part}", shape


def qwen3_next(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of Qwen3-Next, whose every fourth layer has attention."""
    config, qwen3 = qwen3_moe(o)
    config |= {"partial_rotary_factor": 0.25, **_delta_config(o)}
    keys = values = o.heads * o.head_dim
    return config, _delta(o, qwen3, {"in_proj_qkvz": keys + 2 * values, "in_proj_ba": 4 * o.heads})


def qwen3_5_moe(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of the text model of Qwen3.5-MoE."""
    config, qwen3 = qwen3_moe(o)
    rope = {
        "type": "default",
        "mrope_section": [11, 11, 10],
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": 0.25,
    }
    text = {**config, "model_type": "qwen3_5_moe_text", "rope_parameters": rope, **_delta_config(o)}
    keys = values = o.heads * o.head_dim
    projections = {"in_proj_qkv": keys + values, "in_proj_z": values}
    projections |= {"in_proj_b": 2 * o.heads, "in_proj_a": 2 * o.heads}

    def tensors() -> Shapes:
        for name, shape in _delta(o, qwen3, projections):
            if ".experts." not in name:
                yield name.replace("model.", "model.language_model.", 1), shape
        for layer in range(o.layers):  # whose experts are stacked, gate and up in one
            prefix = f"model.language_model.layers.{layer}.mlp.experts"
            yield f"{prefix}.gate_up_proj", (o.experts, 2 * o.ffn, o.hidden)
            yield f"{prefix}.down_proj", (o.experts, o.hidden, o.ffn)

    return {"text_config": text, "tie_word_embeddings": False}, tensors()


FAMILIES = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe": qwen3_5_moe,
    "glm4_moe": glm4_moe,
    "minimax": minimax,
    "deepseek_v3": deepseek_v3,
    "dbrx": dbrx,
}

# Their heads are as wide as hidden / heads, or as DeepSeek's.
FIXED_HEADS = ("mixtral", "dbrx", "deepseek_v3")

# Of layers as wide as those of the published models, or whose parts are to each other as theirs
# are; few of them, with some of the experts: 0.3 to 0.5 GB in 4 bits, of which a token reads a
# third, more than a CPU's caches hold.
_SCALED = {"layers": 4, "hidden": 2048, "experts": 32, "top_k": 8, "vocab": 8192}
SCALED: dict[str, dict[str, Any]] = {
    "mixtral": {"heads": 16, "kv_heads": 4, "experts": 8, "top_k": 2, "ffn": 3584},
    "qwen3_moe": {"heads": 32, "kv_heads": 4, "head_dim": 128, "ffn": 768},
    "qwen3_next": {"heads": 16, "kv_heads": 2, "head_dim": 256, "top_k": 10, "ffn": 512},
    "qwen3_5_moe": {"heads": 16, "kv_heads": 2, "head_dim": 256, "ffn": 512},
    "glm4_moe": {"heads": 48, "kv_heads": 4, "head_dim": 128, "ffn": 704},
    "minimax": {"heads": 32, "kv_heads": 4, "head_dim": 128, "ffn": 1024},
    "deepseek_v3": {"heads": 32, "kv_heads": 32, "ffn": 576},
}

# The shapes that figures are given for: about 0.95 and 6.8 billion parameters, DBRX's layers, 3.2
# billion each, with a head so small that it does not count among a few of them, and the families.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "family": "qwen3_moe",
        "layers": 12,
        "hidden": 1024,
        "heads": 16,
        "kv_heads": 4,
        "experts": 32,
        "top_k": 4,
        "ffn": 768,
        "vocab": 4096,
    },
    "medium": {
        "family": "qwen3_moe",
        "layers": 16,
        "hidden": 2048,
        "heads": 16,
        "kv_heads": 16,
        "experts": 64,
        "top_k": 8,
        "ffn": 1024,
        "vocab": 16384,
    },
    "dbrx": {
        "family": "dbrx",
        "layers": 4,
        "hidden": 6144,
        "heads": 48,
        "kv_heads": 8,
        "experts": 16,
        "top_k": 4,
        "ffn": 10752,
        "vocab": 4096,
    },
    **{family: {"family": family, **_SCALED, **own} for family, own in SCALED.items()},
}
