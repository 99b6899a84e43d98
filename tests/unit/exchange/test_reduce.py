"""The sum against numpy; tests/c/test_reduce.c goes into detail."""

from __future__ import annotations

import numpy as np
import pytest

from zmoe import native
from zmoe.native import Dtype, Isa, Status, ffi, lib

ISAS = [isa for isa in Isa if isa.supported]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_sum_in_rank_order(isa: Isa, ranks: int, kind: type[np.floating]) -> None:
    random = np.random.default_rng(7)
    parts = [random.normal(size=1003).astype(kind) for _ in range(ranks)]
    expected = parts[0].astype(np.float32)
    for part in parts[1:]:
        expected = expected + part.astype(np.float32)
    out = np.empty(1003, kind)
    dtype = Dtype.F32 if kind is np.float32 else Dtype.F16
    views = [ffi.from_buffer(part) for part in parts]
    pointers = ffi.new("void *[]", views)
    raw = ffi.cast("const void *const *", pointers)
    target = ffi.from_buffer(out)
    assert lib.zmoe_reduce(target, dtype, raw, ranks, dtype, out.size, isa) == Status.OK
    np.testing.assert_array_equal(out, expected.astype(kind))


def test_digest_depends_on_every_byte() -> None:
    data = bytearray(100)
    seen = {native.digest(data)}
    for i in range(100):
        data[i] = 1
        seen.add(native.digest(data))
    assert len(seen) == 101
    assert native.digest(np.arange(4)) == native.digest(np.arange(4).tobytes())
