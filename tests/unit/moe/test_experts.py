"""Products of the local experts and their sum, against references in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from tests.ranks import owning
from zmoe.moe.experts import MlxExperts, combine, expert_outputs, gathered, grouped
from zmoe.placement.pairs import LocalPairs

EXPERTS, DIM, HIDDEN = 5, 64, 128
EPSILON = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}  # unit roundoff


def switch(kind: str, dtype: mx.Dtype = mx.float32) -> Any:
    mx.random.seed(3)
    layer: Any
    if kind == "mlp":
        layer = SwitchMLP(DIM, HIDDEN, EXPERTS, bias=True)
    elif kind == "oai":
        layer = SwitchGLU(DIM, HIDDEN, EXPERTS, activation=SwigluOAI(), bias=True)
    else:
        layer = SwitchGLU(DIM, HIDDEN, EXPERTS)
    layer.apply(lambda a: mx.random.normal(a.shape).astype(dtype) / a.shape[-1] ** 0.5)
    return layer


def routing(rows: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(EXPERTS)[:k] for _ in range(rows)]).astype(np.int32)
    weights = rng.random((rows, k), np.float32)
    return ids, weights / weights.sum(axis=1, keepdims=True)


def local(ids: np.ndarray, owned: tuple[int, ...] = (0, 2, 3)) -> LocalPairs:
    return owning(EXPERTS, owned).pairs(ids)


def cut(layer: Any, owned: tuple[int, ...] = (0, 2, 3)) -> Any:
    layer.apply(lambda a: a[mx.array(owned)])
    return layer


def dense(layer: Any) -> np.ndarray:
    """The weights (experts, out, in) in float64, whatever their format."""
    if hasattr(layer, "scales"):
        weight = mx.dequantize(
            layer.weight,
            layer.scales,
            layer.get("biases"),
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )
    else:
        weight = layer.weight
    return np.array(weight.astype(mx.float32)).astype(np.float64)


def reference(layer: Any, x: mx.array, pairs: LocalPairs) -> np.ndarray:
    """Each pair's output (pairs, DIM) of a plain SwitchGLU, in float64."""
    rows = np.array(x.astype(mx.float32)).astype(np.float64)[pairs.rows]
    projections = layer.gate_proj, layer.up_proj, layer.down_proj
    gate, up, down = (dense(projection)[pairs.experts] for projection in projections)
    g = np.einsum("pd,phd->ph", rows, gate)
    hidden = g / (1 + np.exp(-g)) * np.einsum("pd,phd->ph", rows, up)
    return np.einsum("ph,pdh->pd", hidden, down)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kind", ["glu", "oai", "mlp"])
def test_both_ways_agree_in_float32(kind: str, rows: int) -> None:
    layer, x = cut(switch(kind)), mx.random.normal((rows, DIM))
    pairs = local(routing(rows, 3)[0])
    one, other = gathered(layer, x, pairs), grouped(layer, x, pairs)
    assert one.shape == other.shape == (len(pairs.rows), DIM)
    assert mx.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 17])
def test_partial_sums_against_float64(dtype: mx.Dtype, rows: int) -> None:
    """Within what rounding the inputs of each product can make.

    A pair's output rounds about four times (gate, up, their product, down) at
    its own scale; the sum over pairs is in float32, and rounds once more.
    """
    layer = cut(switch("glu", dtype))
    x = mx.random.normal((rows, DIM)).astype(dtype)
    ids, weights = routing(rows, 3)
    pairs = local(ids)
    part = MlxExperts(layer).partial(x, pairs, weights, dtype)
    assert part.dtype == dtype and part.shape == (rows, DIM)
    each = reference(layer, x, pairs)
    want, scale = np.zeros((rows, DIM)), np.zeros((rows, 1))
    for row, slot, y in zip(pairs.rows, pairs.slots, each, strict=True):
        want[row] += weights[row, slot] * y
        scale[row] += weights[row, slot] * np.abs(y).max()
    error = np.abs(np.array(part.astype(mx.float32)) - want)
    assert (error <= 8 * EPSILON[dtype] * scale + 1e-12).all()
    assert error.max() > 0  # float64 it is not


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("mode", [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32)], ids=str)
def test_quantised_experts_against_float64(mode: tuple[str, int, int], dtype: mx.Dtype) -> None:
    """The weights as dequantised are exact here: only the products round.

    MLX's quantised CPU products accumulate in the dtype of the input, so the
    error grows with the length of the sums, 128 at most, of whose roundings
    the root is typical.
    """
    if mode[0] == "mxfp4" and dtype == mx.float16:
        pytest.skip("mxfp4 models are bfloat16")
    layer = switch("glu", dtype)
    nn.quantize(layer, group_size=mode[2], bits=mode[1], mode=mode[0])
    layer = cut(layer)
    x = mx.random.normal((7, DIM)).astype(dtype)
    pairs = local(routing(7, 3)[0])
    want = reference(layer, x, pairs)
    got = np.array(expert_outputs(layer, x, pairs).astype(mx.float32))
    assert np.abs(got - want).max() <= 2 * HIDDEN**0.5 * EPSILON[dtype] * np.abs(want).max()


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_layers_half_of_which_are_quantised(part: str) -> None:
    layer = switch("glu", mx.bfloat16)
    nn.quantize(layer, group_size=32, bits=8, class_predicate=lambda path, _: path == part)
    layer = cut(layer)
    x = mx.random.normal((6, DIM)).astype(mx.bfloat16)
    pairs = local(routing(6, 3)[0])
    got = np.array(expert_outputs(layer, x, pairs).astype(mx.float32))
    want = reference(layer, x, pairs)
    assert np.abs(got - want).max() <= 2 * HIDDEN**0.5 * 2**-8 * np.abs(want).max()


@pytest.mark.parametrize("owned", [(0, 1, 2, 3, 4), (1,), (0, 4)], ids=str)
def test_rows_may_have_any_number_of_local_pairs(owned: tuple[int, ...]) -> None:
    ids, weights = routing(23, 3, seed=5)
    pairs = local(ids, owned)
    y = mx.random.normal((len(pairs.rows), 4))
    got = np.array(combine(y, pairs, weights, 23))
    want = np.zeros((23, 4))
    np.add.at(want, pairs.rows, np.array(y) * weights[pairs.rows, pairs.slots][:, None])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_halves_are_summed_in_float32() -> None:
    """256 + 1 - 256 is 0 in bfloat16, summed in any order but one."""
    pairs = LocalPairs(*(np.array(a, np.int32) for a in ([0, 0, 0], [0, 1, 2], [0, 1, 2])))
    y = mx.array([[256.0], [1.0], [-256.0]], mx.bfloat16)
    assert combine(y, pairs, np.ones((1, 3), np.float32), 1).item() == 1.0
