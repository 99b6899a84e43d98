"""Convert a checkpoint folder of some families to GGUF, for llama.cpp: one tensor at a time.

Takes what mlx-lm loads, plain or quantised; quantised weights are dequantised
as MLX does it and quantised anew. Router and norms stay float32, as llama.cpp
has them; rotations are not scaled, whatever the checkpoint asks for. The file's vocabulary is made
up, so only token ids make sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_delta
import mlx.core as mx
import numpy as np
from disk import to_disk_only
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from process import BAD_INPUT, PeerFailure

try:
    from gguf import (
        MODEL_ARCH_NAMES,
        ExpertGatingFuncType,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        TokenType,
        get_tensor_name_map,
        quants,
    )
except ImportError as error:
    sys.exit(f"gguf_model.py: cannot import gguf: {error}")

# By mlx-lm's model_type.
ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "minimax": "minimax-m2",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
}
SIGMOID = ("deepseek_v3", "glm4_moe", "minimax")  # routers
TYPES = {
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
F32 = GGMLQuantizationType.F32
UNQUANTISED = ("ffn_gate_inp", "ssm_conv1d")
# What mlx-lm calls otherwise than the published checkpoints, whose names gguf knows.
RENAMED = {
    "language_model.": "",
    "block_sparse_moe.switch_mlp": "mlp.experts",
    "switch_mlp": "experts",
}
DELTA_NET = "linear_attn."
INNER = {
    "self_attn.embed_q.weight": "attn_k_b.weight",
    "self_attn.unembed_out.weight": "attn_v_b.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
}
Floats = gguf_delta.Floats


class Source:
    """One parameter of the checkpoint, which the model no longer keeps."""

    def __init__(self, module: Any, parameter: str) -> None:
        parts = {"weight": module[parameter]}
        if parameter == "weight":
            parts |= {part: module[part] for part in ("scales", "biases") if part in module}
        for part in (parameter, *list(parts)[1:]):
            module.pop(part)  # or the model would keep what has been read
        self._parts = parts
        self._how = (
            {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            if "scales" in parts
            else {}
        )
        packed = parts["weight"].shape
        columns = packed[-1] * 32 // module.bits if self._how else packed[-1]
        self.shape: tuple[int, ...] = (*packed[:-1], columns)

    def matrices(self) -> Iterator[Floats]:
        """The weight in float32, expert by expert where there are several."""
        if len(self.shape) < 3 or self.shape[-1] == 1:  # a convolution's taps are one matrix
            yield self._floats(self._parts)
            return
        for expert in range(self.shape[0]):
            yield self._floats({name: part[expert] for name, part in self._parts.items()})

    def _floats(self, parts: dict[str, mx.array]) -> Floats:
        array = parts["weight"]
        if self._how:
            array = mx.dequantize(array, parts["scales"], parts.get("biases"), **self._how)
        made: Floats = np.array(array.astype(mx.float32))
        mx.clear_cache()
        return made


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, made of a parameter when it is asked for and then forgotten."""

    name: str
    source: Source
    shape: tuple[int, ...]
    change: Callable[[Floats], Floats] = lambda matrix: matrix

    def kind(self, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
        """What to store it as: `wanted`, but for norms, convolutions and routers."""
        small = len(self.shape) == 1 or any(part in self.name for part in UNQUANTISED)
        return F32 if small else wanted

    def stored(self, kind: GGMLQuantizationType) -> np.ndarray[Any, np.dtype[Any]]:
        """The bytes that the file holds."""
        parts = [quants.quantize(self.change(each), kind) for each in self.source.matrices()]
        return parts[0].reshape(*self.shape[:-1], -1) if len(parts) == 1 else np.stack(parts)


def gguf_name(architecture: str, parameter: str, layers: int) -> str:
    """llama.cpp's name for mlx-lm's `parameter`."""
    layer, inner = _split(parameter)
    if inner in INNER:
        return f"blk.{layer}.{INNER[inner]}"
    published = parameter
    for ours, theirs in RENAMED.items():
        published = published.replace(ours, theirs)
    number = next(each for each, name in MODEL_ARCH_NAMES.items() if name == architecture)
    found = get_tensor_name_map(number, layers).get_name(published, (".weight", ".bias"))
    if found is None:
        raise PeerFailure(f"no place in {architecture} for {parameter}", BAD_INPUT)
    return str(found)


def _split(parameter: str) -> tuple[str, str]:
    """Number of its layer, and name within it."""
    _, _, rest = parameter.partition("model.layers.")
    layer, _, inner = rest.partition(".")
    return layer, inner


def weights_of(model: Any, architecture: str, config: dict[str, Any]) -> list[Weight]:
    """All weights of `model`, unread."""
    modules = dict(model.named_modules())
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    found = []
    for name, _ in parameters:
        path, _, parameter = name.rpartition(".")
        if parameter in ("scales", "biases"):
            continue
        source = Source(modules[path], parameter)
        layer, inner = _split(name)
        if inner.startswith(DELTA_NET):
            for to in gguf_delta.places(config, inner.removeprefix(DELTA_NET), source.shape):
                found.append(Weight(f"blk.{layer}.{to.name}", source, to.shape, to.change))
            continue
        # A gate of one output is a vector there.
        shape = source.shape[1:] if source.shape[0] == 1 else source.shape
        its_name = gguf_name(architecture, name, config["num_hidden_layers"])
        found.append(Weight(its_name, source, shape))
    return found


def describe(writer: GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    """The metadata that llama.cpp asks for, from the checkpoint's config."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    rope = config.get("rope_parameters", config)
    experts = ("num_experts", "n_routed_experts", "num_local_experts")
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(
        config.get("moe_intermediate_size", config["intermediate_size"])
    )
    writer.add_expert_count(next(config[name] for name in experts if name in config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(heads)
    if "kv_lora_rank" in config:
        _add_latents(writer, config)
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        turned = config.get("rotary_dim", head_dim * rope.get("partial_rotary_factor", 1))
        writer.add_rope_dimension_count(int(turned))
    if "linear_num_key_heads" in config:
        _add_delta_nets(writer, config)
    if config["model_type"] in SIGMOID:
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if "n_shared_experts" in config:
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    _add_vocabulary(writer, config["vocab_size"])


def _add_latents(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Of latent attention: one head of keys, the sizes of the heads beside it."""
    latent, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + turned)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(turned)
    writer.add_vocab_size(config["vocab_size"])


def _add_delta_nets(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Of gated delta nets, and of the shared expert of the models that have them."""
    values = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * config["linear_value_head_dim"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Words of no meaning for all ids, behind SentencePiece's special tokens and bytes."""
    special, octets = ["<unk>", "<s>", "</s>"], [f"<0x{n:02X}>" for n in range(256)]
    words = [f"\u2581w{n}" for n in range(size - len(special) - len(octets))]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * len(octets)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *octets, *words])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * len(words)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def convert(folder: Path, output: Path, kind: str) -> None:
    """Write `output`; PeerFailure for what is no checkpoint of one of ARCHITECTURES."""
    try:
        model, config = load_model(folder, lazy=True)
    except (OSError, ValueError, KeyError) as error:
        raise PeerFailure(
            f"cannot load {folder}: {' '.join(str(error).split())}", BAD_INPUT
        ) from None
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise PeerFailure(
            f"{folder} is {family}: only {', '.join(ARCHITECTURES)} are converted", BAD_INPUT
        )
    wanted, file_type = TYPES[kind]
    writer = GGUFWriter(output, ARCHITECTURES[family])
    config = config.get("text_config", config)
    describe(writer, config, file_type)
    weights = weights_of(model, ARCHITECTURES[family], config)
    for weight in weights:
        chosen = weight.kind(wanted)
        shape = quants.quant_shape_to_byte_shape(weight.shape, chosen) if chosen != F32 else ()
        dtype = np.dtype(np.uint8 if shape else np.float32)
        size = int(np.prod(shape or weight.shape)) * dtype.itemsize
        writer.add_tensor_info(weight.name, shape or weight.shape, dtype, size, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights.reverse()
    while weights:
        weight = weights.pop()  # and with it what MLX has read of it
        writer.write_tensor_data(weight.stored(weight.kind(wanted)))
    writer.close()
    for file in (output, *folder.glob("*.safetensors")):  # those that were read here, too
        to_disk_only(file)


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("model", type=Path, help="checkpoint folder, such as make_model.py writes")
    made.add_argument("output", type=Path, help="file to write; must not exist yet")
    made.add_argument("--type", choices=sorted(TYPES), default="q4_0", help="default q4_0")
    options = made.parse_args()
    if options.output.exists():
        made.error(f"{options.output} exists already")
    if not options.model.is_dir():
        made.error(f"{options.model} is no folder")
    try:
        convert(options.model, options.output, options.type)
    except (PeerFailure, OSError) as error:
        options.output.unlink(missing_ok=True)
        print(f"gguf_model.py: {error}", file=sys.stderr)
        return error.status if isinstance(error, PeerFailure) else 1
    except BaseException:
        options.output.unlink(missing_ok=True)  # half a file looks like a whole one
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
