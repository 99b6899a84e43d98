"""Native linear layers against MLX's dequantised weights in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from zmoe.config import EngineConfig
from zmoe.errors import InputError, ModelError, ZmoeError
from zmoe.kernels.arrays import pointer
from zmoe.kernels.linear import Head, make_native
from zmoe.kernels.threads import ThreadPool, common_isa, make_thread_pool
from zmoe.kernels.weights import Quantization, Stored, matrices
from zmoe.native import Isa, Precision

INS, OUTS = 192, 70
MODES = [("affine", b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64)]
MODES += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
UNITS = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def seeded() -> None:
    mx.random.seed(11)


class Model(nn.Module):
    """One layer, as a model would have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def native(
    layer: Any,
    precision: Precision = Precision.EXACT,
    threads: int = 2,
    isa: Isa | None = None,
) -> Any:
    model = Model(layer)
    make_native(model, ThreadPool(threads, precision, isa), {}, Head(mx.float32))
    return model.layer


def as_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dense(layer: Any) -> np.ndarray:
    if "scales" not in layer:
        return as_float64(layer.weight)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    scales, biases = layer.scales, layer.get("biases")
    if layer.mode == "affine":  # in float32, or MLX would round the weights to the scales' type
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return as_float64(mx.dequantize(layer.weight, scales, biases, **settings))


def close(got: mx.array, x: mx.array, weight: np.ndarray, unit: float) -> bool:
    """Within `unit` of the sum of the products' sizes, which bounds any order of summing."""
    want, scale = as_float64(x) @ weight.T, np.abs(as_float64(x)) @ np.abs(weight).T
    return bool((np.abs(as_float64(got) - want) <= unit * (scale + 1e-30)).all())


@pytest.mark.parametrize("dtype", list(UNITS), ids=str)
@pytest.mark.parametrize("rows", [1, 3, 21])
def test_float_layers(dtype: mx.Dtype, rows: int) -> None:
    layer = nn.Linear(INS, OUTS, bias=False)
    layer.set_dtype(dtype)
    x = mx.random.normal((2, rows, INS)).astype(dtype)
    weight = dense(layer)
    y = native(layer)(x)
    assert isinstance(layer, nn.Linear)
    assert y.shape == (2, rows, OUTS) and y.dtype == dtype
    assert close(y, x, weight, 2 * UNITS[dtype] + 16 * 2.0**-24)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_quantised_layers(mode: tuple[str, int, int], dtype: mx.Dtype) -> None:
    layer = nn.Linear(INS, OUTS, bias=False)
    layer.set_dtype(mx.bfloat16)
    layer = nn.QuantizedLinear.from_linear(layer, mode[2], mode[1], mode=mode[0])
    weight = dense(layer)
    layer = native(layer)
    for rows in (1, 5, 40):
        x = mx.random.normal((rows, INS)).astype(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert close(y, x, weight, UNITS[dtype] + 16 * 2.0**-24)


@pytest.mark.parametrize("isa", [i for i in Isa if i.supported and i is not Isa.GENERIC], ids=str)
@pytest.mark.parametrize("mode", [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32)], ids=str)
def test_int8_activations_round_x_to_a_127th(mode: tuple[str, int, int], isa: Isa) -> None:
    """Half a step of the largest of 32, so at most that much of each product; but some of it."""
    layer = nn.Linear(INS, OUTS, bias=False)
    layer = nn.QuantizedLinear.from_linear(layer, mode[2], mode[1], mode=mode[0])
    weight = dense(layer)
    x = mx.random.normal((3, INS))
    y = as_float64(native(layer, Precision.INT8, isa=isa)(x))
    blocks = as_float64(x).reshape(3, -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127 / 2
    bound = (np.broadcast_to(step, blocks.shape).reshape(3, INS) * 1.001) @ np.abs(weight).T
    error = np.abs(y - as_float64(x) @ weight.T)
    assert (error <= bound + 1e-5).all()
    assert np.median(error) > 1e-4  # what is exact is off by 1e-6


def test_int8_activations_are_refused_where_no_kernel_rounds_to_them() -> None:
    with pytest.raises(InputError, match="--activations int8"):
        make_thread_pool(EngineConfig(activations="int8"), Isa.GENERIC.name)


def test_a_bias_and_strided_inputs() -> None:
    layer = nn.Linear(INS, OUTS)
    layer.bias = mx.random.normal((OUTS,))
    x = mx.random.normal((INS, 6)).T
    want = layer(x)
    assert mx.allclose(native(layer)(x), want, rtol=1e-4, atol=1e-4)


def test_strided_memory_is_copied_in_order() -> None:
    x = mx.arange(6, dtype=mx.float32).reshape(2, 3).T
    memory = np.frombuffer(bytes(_bytes(pointer(x))), np.float32)
    assert memory.tolist() == [0, 3, 1, 4, 2, 5]


def _bytes(memory: Any) -> bytearray:
    return bytearray(memory[i] for i in range(24))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", [None, ("affine", 4, 64), ("affine", 8, 64), ("mxfp4", 4, 32)])
def test_nan_and_infinity_come_out_as_from_the_reference(
    value: float, mode: tuple[str, int, int] | None
) -> None:
    layer = nn.Linear(INS, OUTS, bias=False)
    if mode is not None:
        layer = nn.QuantizedLinear.from_linear(layer, mode[2], mode[1], mode=mode[0])
    weight = dense(layer)
    for precision in Precision:
        for rows in (2, 30):
            x = np.random.default_rng(0).standard_normal((rows, INS)).astype(np.float32)
            x[1, 7] = value
            with np.errstate(invalid="ignore"):
                want = x.astype(np.float64) @ weight.T
            got = as_float64(native(layer, precision)(mx.array(x)))
            assert (np.isnan(got) == np.isnan(want)).all()
            infinite = np.isinf(want)
            assert (got[infinite] == want[infinite]).all()
            assert np.isfinite(got[0]).all()


def test_only_the_wanted_rows_of_logits_are_computed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(OUTS, INS)
            self.lm_head = nn.Linear(INS, OUTS, bias=False)

    model, head = Tied(), Head(mx.float32)
    x = mx.random.normal((1, 4, INS))
    wants = model.embed.as_linear(x), model.lm_head(x)
    make_native(model, ThreadPool(), {}, head)
    for product, want in zip((model.embed.as_linear, model.lm_head), wants):
        head.rows = None
        assert mx.allclose(product(x), want[:, -1:], rtol=1e-4, atol=1e-4)
        for rows in ([2], [0, 3], [0, 1, 2, 3]):
            head.rows = np.array(rows, np.int32)
            assert mx.allclose(product(x), want[:, mx.array(rows)], rtol=1e-4, atol=1e-4)
        head.rows = np.empty(0, np.int32)
        assert product(x).shape == (1, 0, OUTS)


def test_the_number_of_threads_changes_no_bit() -> None:
    layer = nn.QuantizedLinear.from_linear(nn.Linear(INS, 300, bias=False), 64, 4)
    for rows in (1, 50):
        x = mx.random.normal((rows, INS)).astype(mx.bfloat16)
        results = [np.array(native(layer, threads=n)(x).astype(mx.float32)) for n in (1, 2, 3)]
        assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_what_no_kernel_knows_is_refused_by_name() -> None:
    packed = Stored.of(mx.zeros((4, 8), mx.uint32))
    scales = Stored.of(mx.zeros((4, 1), mx.uint8))
    parts = {"weight": packed, "scales": scales}
    with pytest.raises(ModelError, match="model.x: quantisation fp3 with 4 bits in groups of 64"):
        matrices("model.x", parts, Quantization("fp3", 4, 64))
    with pytest.raises(ModelError, match="model.x: mxfp4 with 4 bits in groups of 48"):
        matrices("model.x", parts, Quantization("mxfp4", 4, 48))
    with pytest.raises(ModelError, match="model.x holds mlx.core.uint32"):
        matrices("model.x", {"weight": packed}, None)


def test_working_memory_that_cannot_be_had_is_an_error_of_one_line() -> None:
    pool = ThreadPool()
    with pytest.raises(ZmoeError, match=r"^cannot reserve 1073741824.0 MiB of working memory"):
        pool.reserve(1 << 50)
    pool.reserve(1 << 10)  # the pool stays usable


def test_machines_agree_on_an_instruction_set() -> None:
    assert common_isa(["AVX512_BF16", "AVX2", "AVX512"]) == "AVX2"
    assert common_isa(["AVX512_BF16", "AVX512_VNNI"]) == "AVX512_VNNI"
    assert common_isa(["AVX_VNNI", "AVX512_BF16"]) == "AVX2"
    assert common_isa(["NEON_DOT", "NEON_BF16"]) == "NEON_DOT"
    assert common_isa(["NEON_DOT", "AVX2"]) == "GENERIC"
    assert common_isa(["GENERIC", "AVX512"]) == "GENERIC"
    with pytest.raises(InputError, match="'SSE9'"):
        common_isa(["AVX2", "SSE9"])


@pytest.mark.parametrize("isa", [isa for isa in Isa if isa.supported], ids=lambda isa: isa.name)
def test_every_instruction_set_of_this_machine(isa: Isa) -> None:
    layer = nn.QuantizedLinear.from_linear(nn.Linear(INS, OUTS, bias=False), 64, 4)
    weight = dense(layer)
    model = Model(layer)
    make_native(model, ThreadPool(1, isa=isa), {}, Head(mx.float32))
    for rows in (1, 20):
        x = mx.random.normal((rows, INS))
        assert close(model.layer(x), x, weight, 16 * 2.0**-24)
