"""Weights to measure products with: a layer's experts in a mapped file, like a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from zmoe.compute.experts import NativeExperts
from zmoe.compute.linear import Parts, Product
from zmoe.compute.team import Team
from zmoe.compute.weight import PARTS, Quantization, Stored, matrices
from zmoe.moe.router import LocalPairs
from zmoe.native import ffi

FORMATS = {
    "f32": None,
    "bf16": None,
    "affine-4-g64": Quantization("affine", 4, 64),
    "affine-8-g64": Quantization("affine", 8, 64),
    "mxfp4": Quantization("mxfp4", 4, 32),
}
WIDTH, HIDDEN, TOP_K = 2048, 1024, 4
LAYERS = {
    "gate_proj": (HIDDEN, WIDTH),
    "up_proj": (HIDDEN, WIDTH),
    "down_proj": (WIDTH, HIDDEN),
}  # (outs, ins)
BLOCK = 64  # rows of a weight that are made; they repeat
ROWS = 128  # where arithmetic is the limit
_PAGE_BYTES = 4096


def _dtype(name: str) -> mx.Dtype:
    """Of activations."""
    return mx.float32 if name == "f32" else mx.bfloat16


def _parts(name: str) -> Iterator[tuple[str, str, mx.array]]:
    """Layer, part, and BLOCK rows of it in the format `name`, in the file's order."""
    how = FORMATS[name]
    for layer, (_, ins) in LAYERS.items():
        weight = (mx.random.normal((BLOCK, ins)) * ins**-0.5).astype(_dtype(name))
        if how is None:
            blocks = [weight]
        else:
            blocks = list(mx.quantize(weight, how.group_size, how.bits, mode=how.mode))
        for part, block in zip(PARTS, blocks):
            yield layer, part, block


def _blocks(layer: str, count: int) -> int:
    """In the weights of `count` experts."""
    return count * LAYERS[layer][0] // BLOCK


def write_experts(path: Path, name: str, size: int) -> int:
    """Fill the file with experts of some `size` bytes, TOP_K at least; their number."""
    parts = list(_parts(name))
    one = sum(block.nbytes * _blocks(layer, 1) for layer, _, block in parts)
    count = max(TOP_K, size // one)
    with path.open("wb") as file:
        for layer, _, block in parts:
            view: Any = block
            data = bytes(memoryview(view).cast("B"))
            for _ in range(_blocks(layer, count)):
                file.write(data)
    return count


def _map_experts(path: Path, name: str, count: int) -> dict[str, Parts]:
    """The file's parts by layer, stacked (count, outs, columns)."""
    memory = np.memmap(path, np.uint8, "r")
    int(memory[::_PAGE_BYTES].sum())  # paged in, as loading does it
    base, at = ffi.from_buffer("uint8_t[]", memory), 0
    found: dict[str, Parts] = {layer: {} for layer in LAYERS}
    for layer, part, block in _parts(name):
        shape = (count, LAYERS[layer][0], block.shape[1])
        found[layer][part] = Stored((memory, base), (base + at,), block.dtype, shape)
        at += block.nbytes * _blocks(layer, count)
    return found


def _matrix(parts: Parts, index: int) -> Parts:
    """One of a stack of matrices."""
    return {
        part: Stored(s.memory, (s.matrix(index, s.shape[0]),), s.dtype, s.shape[1:])
        for part, s in parts.items()
    }


def _switch(how: Quantization | None) -> SwitchGLU:
    """Of one expert, whose weights stand for mapped ones and are never computed."""
    switch = SwitchGLU(WIDTH, HIDDEN, 1)
    if how is not None:
        for layer, (outs, ins) in LAYERS.items():
            switch[layer] = QuantizedSwitchLinear(
                ins, outs, 1, False, how.group_size, how.bits, mode=how.mode
            )
    return switch


class Weights:
    """The experts of a file on a team: products whose calls return what they have done."""

    def __init__(self, team: Team, path: Path, name: str, count: int) -> None:
        layers, how, dtype = _map_experts(path, name, count), FORMATS[name], _dtype(name)
        self._expert_bytes = sum(p.nbytes for parts in layers.values() for p in parts.values())
        self._expert_bytes //= count
        self._matrices = [
            Product(team, matrices(layer, _matrix(layers[layer], index), how))
            for index in range(count)
            for layer in ("gate_proj", "up_proj")
        ]
        self._matrix_bytes = sum(p.nbytes for p in layers["gate_proj"].values()) // count
        mapped = {f".{layer}": parts for layer, parts in layers.items()}
        self._experts = NativeExperts("", _switch(how), team, TOP_K, mapped)
        self._row, self._rows = (
            mx.random.normal((rows, WIDTH)).astype(dtype) for rows in (1, ROWS)
        )
        mx.eval(self._row, self._rows)

    def dense(self, draw: Random) -> Callable[[], float]:
        """One row through a matrix of a layer's projections' size, each in turn; bytes."""
        order = cycle(draw.sample(self._matrices, len(self._matrices)))

        def run() -> float:
            next(order)(self._row)
            return self._matrix_bytes

        return run

    def many(self) -> float:
        """ROWS rows; operations."""
        self._matrices[0](self._rows)
        return 2.0 * ROWS * HIDDEN * WIDTH

    def experts(self, of: Sequence[int], draw: Random) -> Callable[[], float]:
        """One row through TOP_K `of` them, each in turn; bytes."""
        zeros, slots = np.zeros(TOP_K, np.int32), np.arange(TOP_K, dtype=np.int32)
        weights, x = np.ones((1, TOP_K), np.float32), self._row
        order = cycle(draw.sample(of, len(of)))

        def run() -> float:
            chosen = sorted(islice(order, TOP_K))
            self._experts.partial(
                x, LocalPairs(zeros, slots, np.array(chosen, np.int32)), weights, x.dtype
            )
            return TOP_K * self._expert_bytes

        return run
