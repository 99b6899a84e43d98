"""Weights to measure matmuls with: a layer's experts in a mapped file, like a checkpoint's.

Speed does not depend on what numbers they are, so that one file serves all formats.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from zmoe.kernels.experts import NativeExperts
from zmoe.kernels.linear import Matmul, Parts
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import Quantization, Stored, matrices
from zmoe.native import ffi
from zmoe.placement.pairs import LocalPairs

if TYPE_CHECKING:
    from zmoe.native import CData

FORMATS = {
    "f32": None,
    "bf16": None,
    "affine-4-g64": Quantization("affine", 4, 64),
    "affine-8-g64": Quantization("affine", 8, 64),
    "mxfp4": Quantization("mxfp4", 4, 32),
}
TOP_K = 4
ROWS = 128  # where arithmetic is the limit
PIECE_BYTES = 16 << 20  # of what is only read
_BYTE = 0x3C  # twice, or four times, 0.0115 in bfloat16 and float32
_ALIGNMENT = 64


@dataclass(frozen=True)
class Shape:
    """Of an expert."""

    width: int
    hidden: int

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(outs, ins)."""
        up, down = (self.hidden, self.width), (self.width, self.hidden)
        return {"gate_proj": up, "up_proj": up, "down_proj": down}


LARGE, SMALL = Shape(2048, 1024), Shape(1024, 512)


def write_weights(path: Path, size: int) -> None:
    """Make the file of `size` bytes."""
    block = bytes([_BYTE]) * (1 << 20)
    with path.open("wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)


def _dtype(name: str) -> mx.Dtype:
    """Of activations."""
    return mx.float32 if name == "f32" else mx.bfloat16


def _columns(name: str, ins: int) -> dict[str, tuple[mx.Dtype, int]]:
    """Type and columns of each part of a matrix."""
    how = FORMATS[name]
    if how is None:
        return {"weight": (_dtype(name), ins)}
    packed, groups = (mx.uint32, ins * how.bits // 32), ins // how.group_size
    if how.mode != "affine":
        return {"weight": packed, "scales": (mx.uint8, groups)}
    return {"weight": packed, "scales": (mx.bfloat16, groups), "biases": (mx.bfloat16, groups)}


def expert_bytes(name: str, shape: Shape) -> int:
    """Of one expert."""
    return sum(
        dtype.size * outs * columns
        for outs, ins in shape.layers.values()
        for dtype, columns in _columns(name, ins).values()
    )


def _stacks(memory: CData, size: int, name: str, shape: Shape) -> tuple[int, dict[str, Parts]]:
    """How many experts there are in `size` bytes, and their layers, stacked."""
    parts = {
        (layer, part): (dtype, (outs, columns))
        for layer, (outs, ins) in shape.layers.items()
        for part, (dtype, columns) in _columns(name, ins).items()
    }
    count, at = size // expert_bytes(name, shape), 0
    found: dict[str, Parts] = {layer: {} for layer in shape.layers}
    for (layer, part), (dtype, matrix) in parts.items():
        stored = Stored(memory, (memory + at,), dtype, (count, *matrix))
        found[layer][part] = stored
        at += stored.nbytes // _ALIGNMENT * _ALIGNMENT
    return count, found


def _matrix(parts: Parts, index: int) -> Parts:
    """One of a stack."""
    return {
        part: Stored(s.memory, (s.matrix(index, s.shape[0]),), s.dtype, s.shape[1:])
        for part, s in parts.items()
    }


def _switch(shape: Shape, how: Quantization | None) -> SwitchGLU:
    """Of one expert, whose weights stand for mapped ones and are never computed."""
    switch = SwitchGLU(shape.width, shape.hidden, 1)
    if how is not None:
        for layer, (outs, ins) in shape.layers.items():
            switch[layer] = QuantizedSwitchLinear(
                ins, outs, 1, False, how.group_size, how.bits, mode=how.mode
            )
    return switch


class Weights:
    """The file's weights on a thread pool: matmuls whose calls return what they have done."""

    def __init__(self, pool: ThreadPool, path: Path) -> None:
        self._pool, self._size = pool, path.stat().st_size
        self._mapped = np.memmap(path, np.uint8, "r")
        int(self._mapped[:: os.sysconf("SC_PAGE_SIZE")].sum())  # paged in, as loading does it
        self._memory = ffi.from_buffer("uint8_t[]", self._mapped)

    def read(self, share: tuple[int, int]) -> Callable[[], float]:
        """The own part, with nothing done to it; bytes. `share` is that of experts()."""
        part, parts = share
        own = self._mapped[part * self._size // parts : (part + 1) * self._size // parts]
        pieces = cycle(np.array_split(own, max(1, len(own) // PIECE_BYTES)))

        def run() -> float:
            piece = next(pieces)
            self._pool.read(piece)
            return len(piece)

        return run

    def dense(self, name: str, draw: Random) -> Callable[[], float]:
        """One row through a matrix of a layer's projections' size, each in turn; bytes."""
        matmuls = self._matmuls(name)
        row, order = _rows(1, LARGE, name), cycle(draw.sample(matmuls, len(matmuls)))
        size = sum(part.nbytes for part in matmuls[0].weight.parts.values())

        def run() -> float:
            next(order)(row)
            return size

        return run

    def many(self, name: str) -> Callable[[], float]:
        """ROWS rows; operations."""
        matmul, rows = self._matmuls(name)[0], _rows(ROWS, LARGE, name)

        def run() -> float:
            matmul(rows)
            return 2.0 * ROWS * matmul.weight.out_features * matmul.weight.in_features

        return run

    def _matmuls(self, name: str) -> list[Matmul]:
        count, layers = _stacks(self._memory, self._size, name, LARGE)
        return [
            Matmul(self._pool, matrices(layer, _matrix(layers[layer], index), FORMATS[name]))
            for index in range(count)
            for layer in ("gate_proj", "up_proj")
        ]

    def experts(
        self, name: str, shape: Shape, share: tuple[int, int], draw: Random
    ) -> Callable[[], float]:
        """One row through TOP_K of the own ones, each in turn; their number.

        `share`: (i, n) for the i-th of n parts of all.
        """
        count, layers = _stacks(self._memory, self._size, name, shape)
        mapped = {f".{layer}": parts for layer, parts in layers.items()}
        experts = NativeExperts("", _switch(shape, FORMATS[name]), self._pool, TOP_K, mapped)
        part, parts = share
        own = range(part * count // parts, (part + 1) * count // parts)
        order, row = cycle(draw.sample(own, len(own))), _rows(1, shape, name)
        zeros, slots = np.zeros(TOP_K, np.int32), np.arange(TOP_K, dtype=np.int32)
        weights = np.ones((1, TOP_K), np.float32)

        def run() -> float:
            chosen = np.array(sorted(islice(order, TOP_K)), np.int32)
            experts.partial(row, LocalPairs(zeros, slots, chosen), weights, row.dtype)
            return TOP_K

        return run


def _rows(count: int, shape: Shape, name: str) -> mx.array:
    rows = mx.random.normal((count, shape.width)).astype(_dtype(name))
    mx.eval(rows)
    return rows
