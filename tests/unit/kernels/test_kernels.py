"""The C kernels against numpy in float64, over whatever formats and sizes there may be.

numpy decodes the weights by itself, from what MLX writes about its formats.
`tests/c/test_kernels.c` goes into detail, and looks at memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from zmoe.native import Dtype, Format, Isa, Precision, Status, ffi, lib

Array = npt.NDArray[Any]
ISAS = [isa for isa in Isa if isa.supported]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)


# ---- numbers ----------------------------------------------------------------------


def round_to(x: Array, dtype: Dtype) -> Array:
    """The nearest numbers of `dtype`, in float64."""
    if dtype is Dtype.F16:
        return x.astype(np.float16).astype(np.float64)
    single = x.astype(np.float32)
    if dtype is Dtype.BF16:
        bits = single.view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        single = bits.view(np.float32)
    return single.astype(np.float64)


def encode(x: Array, dtype: Dtype) -> bytes:
    """Numbers that `dtype` holds, as its bytes."""
    if dtype is Dtype.F16:
        return x.astype(np.float16).tobytes()
    bits = x.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).tobytes() if dtype is Dtype.BF16 else bits.tobytes()


def decode_e4m3(codes: Array) -> Array:
    exponent, fraction = (codes >> 3 & 15).astype(np.int64), codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return np.where(codes & 128, -1, 1) * np.where(exponent, normal, fraction * 2.0**-9)


# ---- weights ------------------------------------------------------------------------


@dataclass
class Weight:
    """A weight as bytes for C, and decoded here."""

    raw: Any  # zmoe_weight *
    alive: list[Any]  # what it points to
    values: Array  # (out_features, in_features) float64
    sizes: Array  # of the parts of each value that may be multiplied apart
    codes: Array  # of each value without its bias
    bias: Array  # (out_features)


def place(alive: list[Any], data: bytes, offset: int) -> Any:
    """`data` in memory of its own, `offset` bytes off alignment."""
    memory = ffi.new("uint8_t[]", len(data) + offset)
    ffi.memmove(memory + offset, data, len(data))
    alive.append(memory)
    return memory + offset


def unpack(data: Array, out_features: int, bits: int) -> Array:
    """Codes of `bits` bits from MLX's stream: from the lowest bit of each byte on."""
    stream = np.unpackbits(data.reshape(out_features, -1), axis=1, bitorder="little")
    groups = stream.reshape(out_features, -1, bits).astype(np.int64)
    return (groups << np.arange(bits)).sum(axis=2)


def quantised(
    random: np.random.Generator,
    kind: Format,
    bits: int,
    group: int,
    out_features: int,
    in_features: int,
) -> tuple[dict[str, bytes], Array, Array, Array, Array]:
    """The bytes of each part; the values, scales and biases of each element, the codes' size."""
    data = random.integers(0, 256, out_features * in_features * bits // 8, np.uint8)
    shape = (out_features, in_features // group)
    biases = np.zeros(shape)
    if kind is Format.AFFINE:
        scales = round_to(random.uniform(-2, 2, shape) / 2**bits, Dtype.F16)
        biases = round_to(random.uniform(-1, 1, shape), Dtype.F16)
        parts = {"scales": encode(scales, Dtype.F16), "biases": encode(biases, Dtype.F16)}
    else:
        codes = random.integers(8, 56, shape) if kind is Format.NVFP4 else None
        codes = random.integers(120, 128, shape) if codes is None else codes
        scales = decode_e4m3(codes) if kind is Format.NVFP4 else 2.0 ** (codes - 127)
        parts = {"scales": codes.astype(np.uint8).tobytes()}
    if kind is Format.MXFP8:
        data = np.where(data & 127 == 127, 0x31, data).astype(np.uint8)
    plain = unpack(data, out_features, bits).astype(np.float64)
    if kind is Format.MXFP8:
        plain = decode_e4m3(plain.astype(np.int64))
    elif kind is not Format.AFFINE:
        plain = np.where(plain >= 8, -1, 1) * E2M1[plain.astype(np.int64) % 8]
    wide_scales, wide_biases = (np.repeat(part, group, axis=1) for part in (scales, biases))
    centre = (2 ** (bits - 1) if kind is Format.AFFINE else 0) * np.abs(wide_scales)
    return (
        {"data": data.tobytes(), **parts},
        plain * wide_scales + wide_biases,
        wide_biases,
        np.abs(plain * wide_scales) + centre,
        wide_scales,
    )


def make_weight(
    random: np.random.Generator, kind: Format, bits: int, group: int, shape: tuple[int, int],
    offset: int, has_bias: bool,
) -> Weight:  # fmt: skip
    out_features, in_features = shape
    raw, alive = ffi.new("zmoe_weight *"), []
    raw.out_features, raw.in_features, raw.format, raw.bits, raw.group = (
        out_features,
        in_features,
        int(kind),
        bits,
        group,
    )
    if bits == 0:
        dtype = Dtype(int(kind))
        values = round_to(random.uniform(-1, 1, shape), dtype)
        parts, codes, sizes = {"data": encode(values, dtype)}, np.zeros(shape), np.abs(values)
    else:
        parts, values, biases, codes, scales = quantised(
            random, kind, bits, group, out_features, in_features
        )
        raw.scale_dtype = int(Dtype.F16)
        sizes = np.abs(values) + 2 * np.abs(biases) + 2 * codes + 12 * np.abs(scales)
    for part, data in parts.items():
        setattr(raw, part, place(alive, data, offset))
    bias = np.zeros(out_features)
    if has_bias:
        bias = round_to(random.uniform(-1, 1, out_features), Dtype.BF16)
        raw.bias, raw.bias_dtype = place(alive, encode(bias, Dtype.BF16), offset), int(Dtype.BF16)
    assert lib.zmoe_weight_check(raw) == Status.OK
    return Weight(raw, alive, values, sizes, codes, bias)


# ---- products -------------------------------------------------------------------------


@contextmanager
def a_pool(threads: int, isa: Isa, size: int) -> Iterator[Any]:
    out = ffi.new("zmoe_thread_pool **")
    assert lib.zmoe_thread_pool_create(threads, ffi.NULL, 0, isa, out) == Status.OK
    assert lib.zmoe_thread_pool_reserve(out[0], size) == Status.OK
    yield out[0]
    lib.zmoe_thread_pool_destroy(out[0])


def linear(weight: Weight, x: Array, dtype: Dtype, isa: Isa, precision: Precision, offset: int,
           threads: int) -> Array:  # fmt: skip
    rows, (out_features, in_features) = len(x), weight.values.shape
    alive: list[Any] = []
    y = np.full((rows, out_features), 7, np.float32)
    weights, ys = ffi.new("zmoe_weight *[1]", [weight.raw]), ffi.new("void *[1]")
    ys[0] = ffi.cast("void *", y.ctypes.data)
    with a_pool(threads, isa, lib.zmoe_linear_scratch(in_features)) as pool:
        status = lib.zmoe_linear(
            pool, weights, 1, place(alive, encode(x, dtype), offset), dtype, rows, ys,
            ffi.new("size_t[1]", [out_features]), Dtype.F32, precision,
        )  # fmt: skip
    assert status == Status.OK
    return y.astype(np.float64)


def largest(x: Array, group: int) -> Array:
    """The largest |x| of each group, for each element."""
    return np.repeat(
        np.abs(x).reshape(len(x), x.shape[1] // group, group).max(axis=2), group, axis=1
    )


def bound(weight: Weight, x: Array, group: int, precision: Precision) -> Array:
    """What rounding may add up to; see rig_expect in tests/c/kernel_rig.c."""
    in_features = x.shape[1]
    error = (in_features + 64) * 2.0**-24 * (
        np.abs(x) @ weight.sizes.T + np.abs(weight.bias)
    ) + 1e-30
    if group:
        error += 2.0**-21 * largest(x, group) @ weight.codes.T
    if group >= 32 and precision is Precision.INT8:
        error += largest(x, 32) / 253 @ weight.codes.T
    return error


@st.composite
def formats(draw: st.DrawFn) -> tuple[Format, int, int, int]:
    """Format, bits, group, and how wide."""
    kind = draw(st.sampled_from(Format))
    if kind in (Format.F32, Format.F16, Format.BF16):
        return kind, 0, 0, draw(st.integers(1, 600))
    bits, group = {Format.MXFP4: (4, 32), Format.NVFP4: (4, 16), Format.MXFP8: (8, 32)}.get(
        kind, (0, 0)
    )
    if kind is Format.AFFINE:
        bits, group = draw(st.sampled_from(AFFINE_BITS)), draw(st.sampled_from([32, 64, 128]))
    return kind, bits, group, group * draw(st.integers(1, 640 // group))


@settings(deadline=None, max_examples=150)
@given(
    form=formats(),
    out_features=st.integers(1, 70),
    rows=st.integers(0, 20) | st.sampled_from([128, 130]),
    dtype=st.sampled_from([Dtype.F32, Dtype.F16, Dtype.BF16]),
    offset=st.sampled_from([0, 1, 2, 4]),
    threads=st.integers(1, 3),
    has_bias=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products(
    form: tuple[Format, int, int, int], out_features: int, rows: int, dtype: Dtype, offset: int,
    threads: int, has_bias: bool, size: float, seed: int,
) -> None:  # fmt: skip
    kind, bits, group, in_features = form
    random = np.random.default_rng(seed)
    weight = make_weight(random, kind, bits, group, (out_features, in_features), offset, has_bias)
    x = round_to(random.standard_normal((rows, in_features)) * size, dtype)
    want = x @ weight.values.T + weight.bias
    for isa in ISAS:
        for precision in Precision:
            y = linear(weight, x, dtype, isa, precision, offset, threads)
            assert y.shape == want.shape
            excess = np.abs(y - want) - bound(weight, x, group, precision)
            assert (excess <= 0).all(), (isa, precision, excess.max())


@settings(deadline=None, max_examples=40)
@given(form=formats(), out_features=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_decoding(form: tuple[Format, int, int, int], out_features: int, seed: int) -> None:
    kind, bits, group, in_features = form
    weight = make_weight(
        np.random.default_rng(seed), kind, bits, group, (out_features, in_features), 0, False
    )
    row = np.empty(in_features, np.float32)
    for o in range(out_features):
        target = ffi.cast("float *", row.ctypes.data)
        assert lib.zmoe_weight_decode(weight.raw, o, target) == Status.OK
        np.testing.assert_allclose(row, weight.values[o], rtol=2**-23, atol=2**-23)


@settings(deadline=None, max_examples=40)
@given(
    form=formats(),
    rows=st.sampled_from([1, 3, 12]),
    where=st.integers(0, 2**16),
    odd=st.sampled_from([np.nan, np.inf, -np.inf]),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_numbers_stay_in_their_row(
    form: tuple[Format, int, int, int], rows: int, where: int, odd: float, seed: int
) -> None:
    kind, bits, group, in_features = form
    random = np.random.default_rng(seed)
    weight = make_weight(random, kind, bits, group, (33, in_features), 0, False)
    x = round_to(random.standard_normal((rows, in_features)), Dtype.F32)
    x[0, where % in_features] = odd
    with np.errstate(invalid="ignore"):
        want = x @ weight.values.T
    for isa in ISAS:
        for precision in Precision:
            y = linear(weight, x, Dtype.F32, isa, precision, 0, 1)
            np.testing.assert_array_equal(y[0], want[0])
            error = bound(weight, x[1:], group, precision)
            assert (np.abs(y[1:] - want[1:]) <= error).all(), (isa, precision)
