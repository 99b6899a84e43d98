"""Weights as the kernels take them: where their bytes are, and in which format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from zmoe.errors import ModelError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import pointer
from zmoe.native import Format, Status, ffi, lib

if TYPE_CHECKING:
    from zmoe.native import CData

_MODES = {
    "affine": Format.AFFINE,
    "mxfp4": Format.MXFP4,
    "nvfp4": Format.NVFP4,
    "mxfp8": Format.MXFP8,
}
PARTS = ("weight", "scales", "biases", "bias")


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in memory, row-major: of an MLX array, or of mapped files.

    `pointers` is one for all of it, or one for each index of its first axis:
    the experts of a layer may lie anywhere.
    """

    memory: Any  # keeps the bytes alive
    pointers: tuple[CData, ...]
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(array: mx.array) -> Stored:
        """The memory of an array, which is evaluated."""
        return Stored(array, (pointer(array),), array.dtype, tuple(array.shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    def as_array(self) -> mx.array:
        """A copy that MLX can compute with."""
        array = mx.zeros(self.shape, self.dtype)
        count = len(self.pointers)
        for index in range(count):
            to = pointer(array) + index * (self.nbytes // count)
            ffi.memmove(to, self.pointers[index], self.nbytes // count)
        return array

    def matrix(self, index: int, count: int) -> CData:
        """Where part `index` of `count` equal ones begins."""
        if len(self.pointers) == count:
            return self.pointers[index]
        assert len(self.pointers) == 1
        return self.pointers[0] + index * (self.nbytes // count)


@dataclass(frozen=True)
class Quantization:
    """MLX's names for the format of a quantised weight."""

    mode: str
    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.mode} with {self.bits} bits in groups of {self.group_size}"


@dataclass(frozen=True)
class Matrices:
    """One matrix (out_features, in_features), or a stack of `count` of them, ready for C.

    `array` is a zmoe_weight[count]; `scale_dtype` what MLX would promote x with.
    """

    array: CData
    count: int
    out_features: int
    in_features: int
    dtypes: tuple[mx.Dtype, ...]
    parts: dict[str, Stored]

    def __getitem__(self, index: int) -> CData:
        return self.array + index


def matrices(name: str, parts: dict[str, Stored], quantization: Quantization | None) -> Matrices:
    """The weight `name` of `parts` ("weight", "scales", "biases", "bias").

    Raises ModelError, which names the weight, for what no kernel knows.
    """
    weight = parts["weight"]
    stacked = len(weight.shape) == 3
    count = weight.shape[0] if stacked else 1
    out_features, columns = weight.shape[-2:]
    model = ffi.new("zmoe_weight *")
    model.out_features = out_features
    if quantization is None:
        if weight.dtype not in DTYPES:
            raise ModelError(f"{name} holds {weight.dtype}, which the CPU kernels do not know")
        model.in_features, model.format = columns, int(DTYPES[weight.dtype])
    else:
        _set_quantization(model, name, parts, quantization)
    if "bias" in parts:
        model.bias_dtype = int(DTYPES[parts["bias"].dtype])
    array = ffi.new("zmoe_weight[]", count)
    for i in range(count):
        array[i] = model[0]
        for part, field in zip(PARTS, ("data", "scales", "biases", "bias")):
            if part in parts:
                setattr(array[i], field, parts[part].matrix(i, count))
    if count and lib.zmoe_weight_check(array) != Status.OK:
        what = quantization or f"a {weight.dtype} matrix of {out_features} x {columns}"
        raise ModelError(f"{name}: {what} is not known to the CPU kernels")
    shown = [stored.dtype for part, stored in parts.items() if part != "weight"]
    if quantization is None:
        shown.append(weight.dtype)
    floats = tuple(dtype for dtype in shown if dtype in DTYPES)
    return Matrices(array, count, out_features, int(model.in_features), floats, parts)


def _set_quantization(
    model: CData, name: str, parts: dict[str, Stored], quantization: Quantization
) -> None:
    if quantization.mode not in _MODES:
        raise ModelError(f"{name}: quantisation {quantization} is not known to the CPU kernels")
    scales = parts["scales"]
    model.format = int(_MODES[quantization.mode])
    model.bits, model.group = quantization.bits, quantization.group_size
    model.in_features = scales.shape[-1] * quantization.group_size
    if quantization.mode == "affine":
        if scales.dtype not in DTYPES:
            raise ModelError(f"{name} has scales of {scales.dtype}: expected floats")
        model.scale_dtype = int(DTYPES[scales.dtype])
