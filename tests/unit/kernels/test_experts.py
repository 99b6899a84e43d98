"""Native experts against MLX's switch layers in float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchMLP

from tests.ranks import owning
from zmoe.kernels.experts import NativeExperts, activation_of, can_be_native
from zmoe.kernels.threads import ThreadPool
from zmoe.moe.experts import MlxExperts

EXPERTS, DIM, HIDDEN = 5, 64, 96


class Squared(nn.Module):
    """An activation that the kernels do not know."""

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return up * mx.square(gate)


SWITCHES = {
    "swiglu": lambda: SwitchGLU(DIM, HIDDEN, EXPERTS),
    "oai with biases": lambda: SwitchGLU(DIM, HIDDEN, EXPERTS, SwigluOAI(limit=1.0), bias=True),
    "unknown": lambda: SwitchGLU(DIM, HIDDEN, EXPERTS, Squared()),
    "gelu": lambda: SwitchMLP(DIM, HIDDEN, EXPERTS, nn.GELU()),
    "gelu tanh": lambda: SwitchMLP(DIM, HIDDEN, EXPERTS, bias=True),
    "relu2": lambda: SwitchMLP(DIM, HIDDEN, EXPERTS, nn.ReLU2()),
    "silu alone": lambda: SwitchMLP(DIM, HIDDEN, EXPERTS, nn.SiLU()),
}


def made(kind: str) -> Any:
    mx.random.seed(5)
    switch = SWITCHES[kind]()
    switch.apply(lambda a: mx.random.normal(a.shape) * (2 / a.shape[-1] ** 0.5))
    return switch


def pairs_of(rows: int, k: int = 3) -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(rows)
    ids = np.stack([rng.permutation(EXPERTS + 2)[:k] for _ in range(rows)]).astype(np.int32)
    weights = rng.random((rows, k), np.float32)
    return owning(EXPERTS + 2, range(EXPERTS)).pairs(ids), weights


@pytest.mark.parametrize("rows", [1, 2, 150])
@pytest.mark.parametrize("kind", list(SWITCHES))
def test_sums_and_outputs(kind: str, rows: int) -> None:
    switch = made(kind)
    x = mx.random.normal((rows, DIM))
    pairs, weights = pairs_of(rows)
    want = MlxExperts(switch)
    native = NativeExperts("m", switch, ThreadPool(2), 3, {})
    outputs = want.outputs(x, pairs)
    scale = float(mx.abs(outputs).max())
    assert mx.allclose(native.outputs(x, pairs), outputs, rtol=0, atol=1e-5 * scale)
    total = want.partial(x, pairs, weights, mx.float32)
    got = native.partial(x, pairs, weights, mx.float32)
    assert got.shape == (rows, DIM)
    assert mx.allclose(got, total, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("mode", [("affine", 4, 32), ("affine", 8, 32), ("mxfp4", 4, 32)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_quantised(mode: tuple[str, int, int], dtype: mx.Dtype) -> None:
    """MLX computes the reference in float32 from the same codes and inputs."""
    switch = made("swiglu")
    switch.set_dtype(mx.bfloat16)
    nn.quantize(switch, mode[2], mode[1], mode=mode[0])
    pairs, weights = pairs_of(20)
    x = mx.random.normal((20, DIM)).astype(dtype)
    native = NativeExperts("m", switch, ThreadPool(), 3, {})
    got = native.partial(x, pairs, weights, mx.float32)
    if mode[0] == "affine":
        switch.set_dtype(mx.float32)
    want = MlxExperts(switch).partial(x.astype(mx.float32), pairs, weights, mx.float32)
    # In bf16 the activations between the products are rounded, by 2^-9 at most.
    bound = (2e-5 if dtype == mx.float32 else 2**-7) * float(mx.abs(want).max())
    assert float(mx.abs(got - want).max()) <= bound


def test_which_activations_are_fused() -> None:
    fused = {kind: activation_of(made(kind)) is not None for kind in SWITCHES}
    assert [kind for kind, known in fused.items() if not known] == ["unknown", "silu alone"]


def test_switch_layers_of_other_classes_stay_with_mlx() -> None:
    class Other(SwitchGLU):
        pass

    assert can_be_native(made("swiglu"))
    assert not can_be_native(Other(DIM, HIDDEN, EXPERTS, SwiGLU()))
    assert not can_be_native(nn.Module())
