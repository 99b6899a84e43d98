"""Small random models of every family that mlx-lm knows, saved as checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from tests.families.base import DIM, EXPERTS, VOCAB, Family
from tests.families.configs import FAMILIES
from tests.families.layouts import Weights

__all__ = ["DIM", "EXPERTS", "FAMILIES", "VOCAB", "Family", "build", "random_model", "save"]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


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
    **changes: Any,
) -> Path:
    """Save a random model of the family `name` into `folder` and return it.

    `quantize` is (mode, bits, group size). `layout` "hf" writes the tensors as
    Hugging Face publishes them, "mlx" as mlx-lm converts them. `changes` are entries of the config.
    """
    family = FAMILIES[name]
    config = {**copy.deepcopy(family.config), **changes}
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
