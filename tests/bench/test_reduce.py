"""How fast partial outputs are added, in every variant that this CPU runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmoe import native
from zmoe.native import Dtype, Isa, Status, ffi, lib

SIZES = {"12KiB": 12 * 1024, "1.5MiB": 1536 * 1024}
NUMPY: dict[Dtype, np.dtype[Any]] = {
    Dtype.F32: np.dtype(np.float32),
    Dtype.F16: np.dtype(np.float16),
}
ISAS = [isa for isa in Isa if isa.supported]
ELEMENTS = [dtype for dtype in Dtype if dtype.itemsize]


def encoded(value: float, dtype: Dtype, size: int) -> bytearray:
    """`size` bytes of `value`, which all dtypes hold exactly."""
    if dtype is Dtype.BF16:  # the upper halves of float32
        return bytearray(np.full(size // 2, value, np.float32).view(np.uint16)[1::2].tobytes())
    return bytearray(np.full(size // dtype.itemsize, value, NUMPY[dtype]).tobytes())


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("dtype", ELEMENTS, ids=lambda dtype: dtype.name.lower())
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_reduce(benchmark: BenchmarkFixture, size: str, nodes: int, dtype: Dtype, isa: Isa) -> None:
    parts = [encoded(rank + 0.5, dtype, SIZES[size]) for rank in range(nodes)]
    out = bytearray(SIZES[size])
    views = [ffi.from_buffer(part) for part in parts]
    pointers = ffi.new("void *[]", views)
    raw, target = ffi.cast("const void *const *", pointers), ffi.from_buffer(out)
    elements = len(out) // dtype.itemsize
    status = benchmark(lib.zmoe_reduce, target, dtype, raw, nodes, dtype, elements, isa)
    assert status == Status.OK
    assert out == encoded(nodes * nodes / 2, dtype, SIZES[size])


@pytest.mark.parametrize("size", SIZES)
def test_digest(benchmark: BenchmarkFixture, size: str) -> None:
    data = bytearray(SIZES[size])
    before = benchmark(native.digest, data)
    data[-1] = 1
    assert native.digest(data) != before
