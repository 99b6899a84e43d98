"""Convert a Qwen3-MoE checkpoint folder to GGUF, for llama.cpp: one tensor at a time.

Takes what mlx-lm loads, plain or quantised; quantised weights are dequantised
as MLX does it and quantised anew. Router and norms stay float32, as llama.cpp
has them. The file's vocabulary is made up, so only token ids make sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from process import BAD_INPUT, PeerFailure

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quants
except ImportError as error:
    sys.exit(f"gguf_model.py: cannot import gguf: {error}")

ARCHITECTURE = "qwen3moe"
TYPES = {
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
F32 = GGMLQuantizationType.F32
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
}
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Weight:
    """One weight of the checkpoint, read when it is asked for and then forgotten."""

    def __init__(self, module: Any, name: str) -> None:
        parts = {part: module[part] for part in ("weight", "scales", "biases") if part in module}
        for part in parts:
            module.pop(part)  # or the model would keep what has been read
        self.name = name
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
        """The weight in float32, expert by expert where it is stacked."""
        if len(self.shape) < 3:
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

    def kind(self, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
        """What to store it as: `wanted`, but for norms and router."""
        small = len(self.shape) == 1 or "ffn_gate_inp" in self.name
        return F32 if small else wanted


def gguf_name(path: str) -> str:
    """llama.cpp's name for mlx-lm's module `path`."""
    if path in OUTER:
        return f"{OUTER[path]}.weight"
    _, _, rest = path.partition("model.layers.")
    layer, _, inner = rest.partition(".")
    if inner not in INNER:
        raise PeerFailure(f"no place in {ARCHITECTURE} for {path}", BAD_INPUT)
    return f"blk.{layer}.{INNER[inner]}.weight"


def weights_of(model: Any) -> list[Weight]:
    """All weights of `model`, unread."""
    modules = dict(model.named_modules())
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    paths = [name.removesuffix(".weight") for name, _ in parameters if name.endswith(".weight")]
    return [Weight(modules[path], gguf_name(path)) for path in paths]


def describe(writer: GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    """The metadata that llama.cpp asks for, from the checkpoint's config."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    _add_vocabulary(writer, config["vocab_size"])


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


def stored(weight: Weight, kind: GGMLQuantizationType) -> np.ndarray[Any, np.dtype[Any]]:
    """`weight` in the bytes that the file holds."""
    parts = [quants.quantize(matrix, kind) for matrix in weight.matrices()]
    return parts[0] if len(weight.shape) < 3 else np.stack(parts)


def convert(folder: Path, output: Path, kind: str) -> None:
    """Write `output`; PeerFailure for what is no Qwen3-MoE checkpoint."""
    try:
        model, config = load_model(folder, lazy=True)
    except (OSError, ValueError, KeyError) as error:
        raise PeerFailure(
            f"cannot load {folder}: {' '.join(str(error).split())}", BAD_INPUT
        ) from None
    if config.get("model_type") != "qwen3_moe":
        raise PeerFailure(
            f"{folder} is {config.get('model_type')}: only qwen3_moe is converted", BAD_INPUT
        )
    wanted, file_type = TYPES[kind]
    writer = GGUFWriter(output, ARCHITECTURE)
    describe(writer, config, file_type)
    weights = weights_of(model)
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
        writer.write_tensor_data(stored(weight, weight.kind(wanted)))
    writer.close()


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
