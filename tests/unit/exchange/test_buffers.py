"""Sums land in MLX memory in place, and MLX never makes that memory a temporary."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from zmoe.exchange.buffers import DTYPES, ResultPool
from zmoe.native import Dtype, ffi


def address(array: Any) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer("uint8_t[]", array)))


def fill(target: Any, values: np.ndarray) -> None:
    """What C does: write through the pointer."""
    data = values.tobytes()
    ffi.buffer(target.pointer, len(data))[:] = data


def bits(values: list[float], dtype: mx.Dtype) -> np.ndarray:
    array = mx.array(values, mx.float32).astype(dtype)
    return np.array(memoryview(array).cast("B"))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_results_are_written_in_place(dtype: mx.Dtype) -> None:
    buffers = ResultPool(1024)
    target = buffers.next(dtype)
    fill(target, bits([1, 2, 3, 4, 5, 6], dtype))
    result = buffers.view(dtype, 2, 3)
    assert result.shape == (2, 3) and result.dtype == dtype
    assert address(result) == int(ffi.cast("uintptr_t", target.pointer))
    assert result.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_consumers_see_what_is_written_each_time() -> None:
    buffers = ResultPool(1024)
    weight = mx.random.normal((4, 4))
    for i in range(20):
        values = [float(i), 1, 2, 3]
        fill(buffers.next(mx.float32), bits(values, mx.float32))
        result = buffers.view(mx.float32, 1, 4)
        out = (result + 1) @ weight
        expected = (mx.array([values]) + 1) @ weight
        assert mx.array_equal(out, expected)


def test_two_results_live_at_a_time() -> None:
    buffers = ResultPool(1024)
    results = []
    for i in range(2):
        fill(buffers.next(mx.float32), bits([float(i)], mx.float32))
        results.append(buffers.view(mx.float32, 1, 1))
    assert [result.item() for result in results] == [0, 1]
    fill(buffers.next(mx.float32), bits([2.0], mx.float32))
    assert address(buffers.view(mx.float32, 1, 1)) == address(results[0])


def test_in_place_arithmetic_of_the_caller_does_no_harm() -> None:
    buffers = ResultPool(1024)
    for i in range(6):
        target = buffers.next(mx.float32)
        fill(target, bits([float(i), 5.0], mx.float32))
        result = buffers.view(mx.float32, 1, 2)
        assert address(result) == int(ffi.cast("uintptr_t", target.pointer))
        assert result.tolist() == [[i, 5]]
        result += 100
        result[0, 1] = -1
        mx.eval(result)
        assert result.tolist() == [[i + 100, -1]]


def test_memory_is_never_donated() -> None:
    """An operation whose only input dies with it may reuse its memory; not ours."""
    buffers = ResultPool(1 << 16)
    for i in range(50):
        target = buffers.next(mx.float32)
        fill(target, np.full(16384, i, np.float32))
        out = mx.exp(mx.negative(buffers.view(mx.float32, 1, 16384)))
        mx.eval(out)
        assert address(out) != int(ffi.cast("uintptr_t", target.pointer))
        assert buffers.view(mx.float32, 1, 16384)[0, 7].item() == i


def test_many_shapes() -> None:
    buffers = ResultPool(4096)
    for rows in range(1, 600):
        buffers.next(mx.float16)
        assert buffers.view(mx.float16, rows, 3).shape == (rows, 3)


def test_sources_are_contiguous_and_of_a_wire_dtype() -> None:
    grid = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    for array in (grid, grid.T, grid[:, 1:3], grid[::2], mx.broadcast_to(grid[:1], (3, 4))):
        view, dtype = ResultPool.source(array, array.size)
        assert dtype is Dtype.F32
        read = np.frombuffer(ffi.buffer(ffi.from_buffer("uint8_t[]", view)), np.float32)
        np.testing.assert_array_equal(read, np.array(array).ravel())
    view, dtype = ResultPool.source(grid, 12)
    assert address(view) == address(grid)  # what is contiguous is not copied
    assert ResultPool.source(grid.astype(mx.bfloat16), 12)[1] is Dtype.BF16
    assert ResultPool.source(grid.astype(mx.int32), 12)[1] is Dtype.F32
    with pytest.raises(ValueError, match="has not 13 elements"):
        ResultPool.source(grid, 13)
