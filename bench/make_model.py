"""Write a checkpoint of random weights in any size: Hugging Face names, safetensors.

For measuring where no published model of the wanted size is at hand; its text
is noise. One block of random numbers is repeated, so a gigabyte takes seconds.
The tokenizer is zmoe-tiny's.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import BENCH, BenchError, main, positive

TOKENIZER = BENCH.parent / "zmoe" / "data" / "zmoe-tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
BLOCK = 1 << 20  # random numbers that repeat
SPREAD = 0.02  # their standard deviation, as in most initialisers

Shapes = Iterator[tuple[str, tuple[int, ...]]]


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
        "head_dim": o.hidden // o.heads,
        **_llama_config(o),
    }

    def moe(prefix: str) -> Shapes:
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{norm}.weight", (o.hidden // o.heads,)
        yield f"{prefix}.mlp.gate.weight", (o.experts, o.hidden)
        for expert in range(o.experts):
            name = f"{prefix}.mlp.experts.{expert}"
            yield f"{name}.gate_proj.weight", (o.ffn, o.hidden)
            yield f"{name}.up_proj.weight", (o.ffn, o.hidden)
            yield f"{name}.down_proj.weight", (o.hidden, o.ffn)

    return config, _llama(o, moe)


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
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def _llama(o: argparse.Namespace, moe: Any) -> Shapes:
    kv = o.hidden // o.heads * o.kv_heads
    yield "model.embed_tokens.weight", (o.vocab, o.hidden)
    for layer in range(o.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (o.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (o.hidden,)
        for name, rows in (("q", o.hidden), ("k", kv), ("v", kv), ("o", o.hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, o.hidden)
        yield from moe(prefix)
    yield "model.norm.weight", (o.hidden,)
    yield "lm_head.weight", (o.vocab, o.hidden)


def dbrx(o: argparse.Namespace) -> tuple[dict[str, Any], Shapes]:
    """Config and tensors in the shape of DBRX, the experts of a layer stacked."""
    config = {
        "d_model": o.hidden,
        "n_layers": o.layers,
        "n_heads": o.heads,
        "max_seq_len": 4096,
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


FAMILIES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "dbrx": dbrx}


def encoded(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> bytes:
    """`values` as the checkpoint's dtype; bfloat16 by cutting off, which is good enough."""
    if dtype == "float32":
        return values.tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_weights(path: Path, tensors: Shapes, dtype: str, seed: int) -> int:
    """Write one safetensors file; returns its size in bytes."""
    label, item = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes, end = [], 0
    for name, shape in tensors:
        begin, end = end, end + math.prod(shape) * item
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [begin, end]}
        sizes.append((end - begin, len(shape)))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32) * SPREAD
    noise, ones = encoded(random, dtype), encoded(np.ones(BLOCK, np.float32), dtype)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (size, dimensions) in enumerate(sizes):
            # Norms are vectors of ones. Matrices begin at different places of the block.
            source = ones if dimensions == 1 else noise
            at = number * 7919 * item % len(source)
            while size > 0:
                part = source[at : at + size]
                file.write(part)
                size, at = size - len(part), 0
        return file.tell()


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("folder", type=Path, help="where the checkpoint goes; must not exist yet")
    made.add_argument("--family", choices=sorted(FAMILIES), default="mixtral")
    made.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    sizes = {"layers": 6, "hidden": 1024, "heads": 16, "kv-heads": 4, "experts": 8}
    for name, value in {**sizes, "top-k": 2, "ffn": 2048, "vocab": 8192}.items():
        made.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args()
    if options.hidden % options.heads or options.heads % options.kv_heads:
        made.error("--heads must divide --hidden, and --kv-heads must divide --heads")
    if options.top_k > options.experts:
        made.error(f"--top-k {options.top_k} of only {options.experts} --experts")
    if options.vocab < 1024:
        made.error("--vocab must be at least the tokenizer's 1024")
    return options


def benchmark() -> int:
    options = arguments()
    config, tensors = FAMILIES[options.family](options)
    config |= {"model_type": options.family, "torch_dtype": options.dtype, "eos_token_id": 0}
    try:
        options.folder.mkdir(parents=True)
    except OSError as error:
        raise BenchError(f"cannot make {options.folder}: {error.strerror}") from None
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, options.folder)
    (options.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = options.folder / "model.safetensors"
    size = write_weights(weights, tensors, options.dtype, options.seed)
    print(f"{weights}: {size / 2**20:.0f} MiB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    main(benchmark)
