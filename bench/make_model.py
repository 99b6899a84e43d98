"""Write a checkpoint of random weights in any size, plain or quantised, in safetensors.

For measuring where no published model of the wanted size is at hand; its text
is noise. Plain ones have Hugging Face's names and layout; with `--bits`,
`--group-size` or `--mode` they are what mlx_lm.convert makes of them, which
for `--bits 16` is the same unquantised. The tokenizer is zmoe-tiny's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import BENCH, BenchError, main, positive
from families import FAMILIES, FIXED_HEADS, PRESETS
from noise import DTYPES, Tensor, plain, write_safetensors

TOKENIZER = BENCH.parent / "zmoe" / "data" / "zmoe-tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
UNQUANTISED = 16  # bits
DEFAULTS: dict[str, Any] = {
    "family": "mixtral",
    "dtype": "float32",
    "layers": 6,
    "hidden": 1024,
    "heads": 16,
    "kv_heads": 4,
    "experts": 8,
    "top_k": 2,
    "ffn": 2048,
    "vocab": 8192,
    "context": 4096,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("folder", type=Path, help="where the checkpoint goes; must not exist yet")
    made.add_argument(
        "--shape",
        choices=sorted(PRESETS),
        help="a Qwen3-MoE of 0.95 (small) or 6.8 (medium) billion parameters, layers of DBRX's "
        "size, 3.2 billion each, or a few layers of a family, scaled down; in bfloat16; other "
        "flags change parts of it",
    )
    made.add_argument("--family", choices=sorted(FAMILIES), help="default mixtral")
    made.add_argument("--dtype", choices=sorted(DTYPES), help="default float32")
    for name in list(DEFAULTS)[2:]:
        flag = f"--{name.replace('_', '-')}"
        made.add_argument(flag, type=positive, help=f"default {DEFAULTS[name]}")
    made.add_argument(
        "--head-dim",
        type=positive,
        help="width of a head; default hidden / heads",
    )
    made.add_argument(
        "--bits", type=positive, help="quantise to that many bits a weight; 16: MLX's layout only"
    )
    made.add_argument("--group-size", type=positive, help="weights that share a scale")
    made.add_argument("--mode", choices=MODES, help="of quantisation; default affine")
    made.add_argument("--seed", type=int, default=0)
    return made


def arguments() -> argparse.Namespace:
    made = parser()
    options = made.parse_args()
    preset: dict[str, Any] = {}
    if options.shape is not None or options.bits == UNQUANTISED:
        preset = {"dtype": "bfloat16", **PRESETS.get(options.shape, {})}
    for name, value in {**DEFAULTS, **preset}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.heads % options.kv_heads:
        made.error("--kv-heads must divide --heads")
    if options.head_dim is None:
        if options.hidden % options.heads:
            made.error("--heads must divide --hidden where there is no --head-dim")
        options.head_dim = options.hidden // options.heads
    elif options.family in FIXED_HEADS:
        made.error(f"--head-dim: {options.family} has no such choice")
    if options.top_k > options.experts:
        made.error(f"--top-k {options.top_k} of only {options.experts} --experts")
    if options.vocab < 1024:
        made.error("--vocab must be at least the tokenizer's 1024")
    if options.bits == UNQUANTISED and (options.mode or options.group_size):
        made.error("--bits 16 is not quantised: it has no --mode and no --group-size")
    if options.bits == UNQUANTISED and options.dtype != "bfloat16":
        made.error(f"--bits 16 is bfloat16, not {options.dtype}")
    if options.seed < 0:
        made.error(f"--seed {options.seed}: expected 0 or more")
    if options.folder.exists():
        made.error(f"{options.folder} exists already")
    return options


def prepared(options: argparse.Namespace) -> tuple[dict[str, Any], Sequence[Tensor], str]:
    """Config, tensors and who is to have written them; ValueError for what MLX refuses."""
    config, shapes = FAMILIES[options.family](options)
    config |= {"model_type": options.family, "torch_dtype": options.dtype, "eos_token_id": 0}
    if not (options.bits or options.group_size or options.mode):
        label = DTYPES[options.dtype]
        tensors = [
            plain(name, shape, label, number, options.seed)
            for number, (name, shape) in enumerate(shapes)
        ]
        return config, tensors, "pt"
    from quantised import Quantisation, filled, plan  # mlx, which plain checkpoints don't need

    wanted: Quantisation | None = None
    if options.bits != UNQUANTISED:
        wanted = Quantisation(options.bits, options.group_size, options.mode or "affine")
        wanted.check(options.hidden)
    config, parameters, modules = plan(config, options.dtype, wanted)
    return config, filled(parameters, modules, options.dtype, options.seed), "mlx"


def benchmark() -> int:
    options = arguments()
    try:
        config, tensors, written_by = prepared(options)
    except ValueError as error:
        words = str(error).strip().splitlines()
        print(f"make_model.py: error: cannot quantise so: {words[0]}", file=sys.stderr)
        return 2
    weights = options.folder / "model.safetensors"
    try:
        options.folder.mkdir(parents=True)
        for name in TOKENIZER_FILES:
            shutil.copy(TOKENIZER / name, options.folder)
        (options.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        size = write_safetensors(weights, tensors, written_by)
    except OSError as error:
        raise BenchError(f"cannot write {options.folder}: {error.strerror}") from None
    print(f"{weights}: {size / 2**20:.0f} MiB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    main(benchmark)
