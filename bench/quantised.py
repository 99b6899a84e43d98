"""A checkpoint as `mlx_lm.convert` writes it, planned by mlx-lm and filled with noise.

mlx-lm's own model class and quantize_model decide what is quantised, how, and
under which name; none of their arrays is ever evaluated, so the plan costs no
memory. The content comes from MLX's own quantiser, a block at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model
from noise import STRIDE, Tensor, noise, plain, spread

LABELS = {mx.float32: "F32", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}
PACKED = ("weight", "scales", "biases")  # what a quantised module holds, in mx.quantize's order


@dataclass(frozen=True)
class Quantisation:
    """What mx.quantize is told; None is the mode's own default."""

    bits: int | None
    group_size: int | None
    mode: str

    def check(self, columns: int) -> None:
        """Raise ValueError, in MLX's words, when rows of `columns` cannot be quantised so."""
        mx.quantize(mx.zeros((1, columns)), self.group_size, self.bits, mode=self.mode)


def plan(
    config: dict[str, Any], dtype: str, wanted: Quantisation | None
) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, Quantisation]]:
    """Config, unevaluated parameters and quantised modules by path, as mlx-lm has them.

    `wanted` None: nothing is quantised.
    """
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    if wanted is not None:
        with redirect_stdout(sys.stderr):
            model, config = quantize_model(
                model, config, wanted.group_size, wanted.bits, mode=wanted.mode
            )
    modules = {
        path: Quantisation(module.bits, module.group_size, module.mode)
        for path, module in model.named_modules()
        if "scales" in module
    }
    return config, dict(tree_flatten(model.parameters())), modules


@cache
def _packed_rows(
    columns: int, spread: float, how: Quantisation, dtype: str, seed: int
) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The noise of that row length, quantised: rows of bytes of each part."""
    rows = mx.array(noise(columns, spread, seed)).astype(getattr(mx, dtype))
    parts = mx.quantize(rows, how.group_size, how.bits, mode=how.mode)
    return {name: np.array(part.view(mx.uint8)) for name, part in zip(PACKED, parts)}


def filled(
    parameters: Mapping[str, mx.array],
    modules: Mapping[str, Quantisation],
    dtype: str,
    seed: int,
) -> list[Tensor]:
    """Everything to write, in mlx-lm's order."""
    made, numbers = [], {path: number for number, path in enumerate(modules)}
    for number, (name, array) in enumerate(parameters.items()):
        path, _, part = name.rpartition(".")
        label, shape = LABELS[array.dtype], tuple(array.shape)
        if path not in modules or part not in PACKED:
            made.append(plain(name, shape, label, number, seed))
            continue
        how = modules[path]
        assert how.group_size is not None
        columns = parameters[f"{path}.scales"].shape[-1] * how.group_size
        size = spread(f"{path}.weight", columns)
        rows = _packed_rows(columns, size, how, dtype, seed)[part]
        made.append(Tensor(name, label, shape, rows, numbers[path] * STRIDE))
    return made
