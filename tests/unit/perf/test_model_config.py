"""Shapes from config.json: the spellings of several families, and damage."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from zmoe.cli.plan.known_models import MODELS
from zmoe.errors import ModelError
from zmoe.perf.model_config import read_shape
from zmoe.perf.shape import BF16, FP8_BLOCKS, MXFP4, affine

# The fields that matter, as the published files spell them.
CONFIGS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_layers": 40,
        "n_heads": 48,
        "vocab_size": 100352,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "attn_config": {"kv_n_heads": 8},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "vocab_size": 151936,
    },
    "deepseek-v3": {
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "gpt-oss-120b": {
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "sliding_window": 128,
        "vocab_size": 201088,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "glm-4.5-air": {
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "vocab_size": 151552,
    },
}
DBRX = CONFIGS["dbrx"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def read(path: Path, config: object, **how: Any) -> Any:
    path.write_text(json.dumps(config))
    return read_shape(path, "x", **how)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_equals_the_table(name: str, config_file: Path) -> None:
    assert read(config_file, CONFIGS[name]) == replace(MODELS[name], name="x")


def test_the_embedded_model() -> None:
    shape = read_shape(Path(str(files("zmoe") / "data" / "zmoe-tiny" / "config.json")), "zmoe-tiny")
    assert shape.parameters == pytest.approx(2.0e6, rel=0.02)
    assert shape.dense_format.bits == 32


def test_parts_of_other_families(config_file: Path) -> None:
    mixtral = CONFIGS["mixtral-8x7b"]
    qwen2 = {**mixtral, "shared_expert_intermediate_size": 20480}
    assert read(config_file, qwen2).shared_hidden == 20480
    nested = {"model_type": "llama4", "text_config": {**mixtral, "interleave_moe_layer_step": 2}}
    assert read(config_file, nested).moe_layers == 16
    listed = {**mixtral, "decoder_sparse_step": 1, "mlp_only_layers": [0, 5]}
    assert read(config_file, listed).dense_layers == 2
    tied = {**mixtral, "tie_word_embeddings": True}
    assert read(config_file, tied).tied


def test_formats(config_file: Path) -> None:
    quantised = {**DBRX, "quantization": {"bits": 4, "group_size": 32}}
    assert read(config_file, quantised).expert_format == affine(4, 32)
    assert read(config_file, quantised, weights=BF16).expert_format == BF16
    gptq = {**DBRX, "quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 128}}
    assert read(config_file, gptq).dense_format == affine(8, 128)
    mxfp4 = {**DBRX, "quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}
    assert read(config_file, mxfp4).dense_format == MXFP4
    assert read(config_file, CONFIGS["deepseek-v3"]).dense_format == FP8_BLOCKS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": None}, "field vocab_size is missing"),
        ({"vocab_size": "many"}, 'field vocab_size is "many"'),
        ({"n_layers": 0}, "field n_layers is 0"),
        ({"d_model": True}, "field d_model is true"),
        ({"ffn_config": {}}, "names no experts"),
        (
            {"ffn_config": {**DBRX["ffn_config"], "moe_top_k": 17}},
            "field moe_top_k is 17: more experts per token than the 16",
        ),
        ({"ffn_config": {**DBRX["ffn_config"], "moe_num_experts": 2000}}, "at most 1024"),
        ({"mlp_only_layers": 3}, "field mlp_only_layers"),
        ({"mlp_only_layers": list(range(40))}, "no layer has experts"),
        ({"quantization": {"bits": "four"}}, 'bits "four"'),
        ({"quantization_config": {"quant_method": "magic"}}, 'quant_method is "magic"'),
    ],
)
def test_a_malformed_field_is_named(change: dict[str, Any], words: str, config_file: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(config_file, {**DBRX, **change})
    assert words in str(caught.value)
    assert str(config_file) in str(caught.value)


def test_files_that_are_no_config(config_file: Path) -> None:
    with pytest.raises(ModelError, match="holds no config.json"):
        read_shape(config_file, "x")
    config_file.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_shape(config_file, "x")
    config_file.write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object"):
        read_shape(config_file, "x")


def test_layers_that_keep_a_state(tmp_path: Path) -> None:
    """Qwen3-Next-80B-A3B: three of four layers keep 2 MiB of heads and three rows of 8192."""
    config = {
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shape = read_shape(path, "qwen3-next")
    assert shape.cache_bytes(1000) == 12 * 1000 * 2 * 2 * 256 * 2
    assert shape.state_bytes == 36 * ((2 << 20) + 3 * 8192 * 2)
    kinds = ["linear_attention"] * 40 + ["full_attention"] * 8
    path.write_text(json.dumps({**config, "layer_types": kinds}))
    assert read_shape(path, "qwen3-next").state_bytes == 40 * ((2 << 20) + 3 * 8192 * 2)
