"""The layouts that Hugging Face publishes, made from mlx-lm's own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

Weights = dict[str, mx.array]
Layout = Callable[[Weights, dict[str, Any]], Weights]


def one_by_one(
    block: str, names: dict[str, str], source: str = "switch_mlp", target: str = "experts"
) -> Layout:
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


def renamed(*pairs: tuple[str, str]) -> Layout:
    def convert(weights: Weights, config: dict[str, Any]) -> Weights:
        out: Weights = {}
        for key, value in weights.items():
            for old, new in pairs:
                key = key.replace(old, new)
            out[key] = value
        return out

    return convert


def chain(
    *steps: Layout,
) -> Layout:
    def convert(weights: Weights, config: dict[str, Any]) -> Weights:
        for step in steps:
            weights = step(weights, config)
        return weights

    return convert


def fused(
    source: str, gate_up: str, down: str, *, transpose: bool = False, interleave: bool = False
) -> Layout:
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


MLP_EXPERTS = one_by_one("mlp", GLU)
OWN_NAME = one_by_one("mlp", GLU, source="experts")
