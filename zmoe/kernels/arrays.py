"""MLX arrays as the kernels see them, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.native import ffi

if TYPE_CHECKING:
    from zmoe.native import CData

_NUMPY: dict[mx.Dtype, Any] = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.uint8: np.uint8,
    mx.bfloat16: np.uint16,  # numpy has no bfloat16; its bits pass through
}
Buffer = npt.NDArray[Any]


def pointer(array: mx.array) -> CData:
    """The memory of `array`, evaluated and in row-major order; keeps it alive."""
    view: Any = array
    if not memoryview(view).c_contiguous:  # evaluates; from_buffer would ignore the strides
        array = mx.contiguous(array)
    return ffi.from_buffer("uint8_t[]", array)


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> Buffer:
    """Memory for a result, of numpy's equivalent of `dtype`."""
    return np.empty(shape, _NUMPY[dtype])


def as_array(buffer: Buffer, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    """A copy of `buffer` as an MLX array of `dtype` and `shape`."""
    array = mx.array(buffer.reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def writable(buffer: Buffer) -> CData:
    """Memory that C may write to; keeps it alive."""
    return ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
