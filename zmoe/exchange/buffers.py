"""Persistent MLX buffers that sums are received into, and MLX arrays as C sees them.

C writes into memory that MLX owns, so that a result needs no copy. Three rules
make that sound. The arrays that own the memory are never rebound, by `+=` for
one. They, and the views that are handed out, share one allocation, of which MLX
therefore never makes a temporary. And a view handed out is rewritten by the
second next exchange, when every rank has consumed it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmoe.errors import InputError
from zmoe.exchange.native import OutBuffer
from zmoe.native import Dtype

DTYPES: dict[mx.Dtype, Dtype] = {
    mx.float32: Dtype.F32,
    mx.float16: Dtype.F16,
    mx.bfloat16: Dtype.BF16,
}
_WIRE_DTYPES = ("auto", "f32", "bf16", "f16", "q8")
_MOST_VIEWS = 256


def wire_of(name: str) -> Dtype | None:
    """How partials travel, by its name; None for "auto". Raises InputError."""
    if name not in _WIRE_DTYPES:
        raise InputError(f"wire_dtype is {name}: expected {' or '.join(_WIRE_DTYPES)}")
    return None if name == "auto" else Dtype[name.upper()]


class _Buffer:
    """One allocation of `elements` and its evaluated views, by shape."""

    def __init__(self, dtype: mx.Dtype, elements: int) -> None:
        self._whole = mx.zeros((max(1, elements),), dtype)
        mx.eval(self._whole)
        self.target = OutBuffer(self._whole)
        self._views: dict[tuple[int, int], mx.array] = {}

    def view(self, rows: int, width: int) -> mx.array:
        """A new array object (rows, width), already evaluated, on this memory."""
        view = self._views.get((rows, width))
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._whole[: rows * width].reshape(rows, width)
            mx.eval(view)
            self._views[rows, width] = view
        # A reshape to the same shape adds no operation to the graph, and keeps
        # the cached object out of reach of the caller's `+=`.
        return view.reshape(rows, width)


class ResultPool:
    """Two buffers per dtype in use, taken in turn.

    Each buffer holds the largest sum whose partials take `max_bytes` bytes in
    `wire` (None: in the dtype of the sum). A sum stays valid until the second
    next one of its dtype is received.
    """

    def __init__(self, max_bytes: int, wire: Dtype | None = None) -> None:
        self._max_bytes, self._wire = max_bytes, wire
        self._pairs: dict[mx.Dtype, tuple[_Buffer, _Buffer]] = {}
        self._parity = 0

    def next(self, dtype: mx.Dtype) -> OutBuffer:
        """The buffer for the next sum, of float32, float16 or bfloat16."""
        self._parity ^= 1
        return self._buffer(dtype).target

    def view(self, dtype: mx.Dtype, rows: int, width: int) -> mx.array:
        """The sum in the buffer that `next` gave last, as (rows, width)."""
        return self._buffer(dtype).view(rows, width)

    def _buffer(self, dtype: mx.Dtype) -> _Buffer:
        pair = self._pairs.get(dtype)
        if pair is None:
            wire = DTYPES[dtype] if self._wire is None else self._wire
            elements = wire.most_elements(self._max_bytes)
            pair = (_Buffer(dtype, elements), _Buffer(dtype, elements))
            self._pairs[dtype] = pair
        return pair[self._parity]

    @staticmethod
    def source(array: mx.array, elements: int) -> tuple[Any, Dtype]:
        """`array`, evaluated, as a C-contiguous buffer and the dtype of its elements.

        Only strided arrays and dtypes that C does not know are copied, the latter
        to float32. Raises ValueError unless it has `elements` elements.
        """
        if array.size != elements:
            raise ValueError(f"an array of shape {array.shape} has not {elements} elements")
        if array.dtype not in DTYPES:
            array = array.astype(mx.float32)
        view = _memory(array)
        if not view.c_contiguous:  # a strided one would be read in the wrong order
            array = mx.contiguous(array)
            view = _memory(array)
        return view, DTYPES[array.dtype]


def _memory(array: mx.array) -> memoryview:
    """Evaluates `array` and shows its memory; MLX does not declare its buffer protocol."""
    buffer: Any = array
    return memoryview(buffer)
