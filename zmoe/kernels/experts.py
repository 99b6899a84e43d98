"""A node's own experts of one layer on the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import as_array, empty, pointer, writable
from zmoe.kernels.linear import Parts, quantization_of, take_parts
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import Matrices, matrices
from zmoe.moe.experts import combine, with_padding
from zmoe.native import Activation, Dtype, Status, ffi, lib
from zmoe.placement.pairs import Floats, LocalPairs

if TYPE_CHECKING:
    from zmoe.native import CData

# By class: what is not here is computed by MLX between two calls of the kernels.
_GATED = {
    "switch_layers.SwiGLU": Activation.SILU,
    "muse_spark.PreciseSwiGLU": Activation.SILU,
    "activations.SwigluOAI": Activation.CLAMPED_SWIGLU,
    "gemma4_text.GeGLU": Activation.GELU_TANH,
}
_GELUS = {
    "none": Activation.GELU_ONLY,
    "precise": Activation.GELU_TANH_ONLY,
    "tanh": Activation.GELU_TANH_ONLY,
}


def switch_layers(switch: Any) -> tuple[str, ...]:
    """The names of the layers of a SwitchGLU or SwitchMLP."""
    glu = isinstance(switch, SwitchGLU)
    return ("gate_proj", "up_proj", "down_proj") if glu else ("fc1", "fc2")


def can_be_native(switch: Any) -> bool:
    """Whether `switch` is a SwitchGLU or SwitchMLP of layers that the kernels know."""
    if type(switch) not in (SwitchGLU, SwitchMLP):
        return False
    return all(
        type(switch[name]) in (SwitchLinear, QuantizedSwitchLinear)
        and switch[name].get("global_scale") is None
        for name in switch_layers(switch)
    )


def activation_of(switch: Any) -> Activation | None:
    """The kernels' name for the activation of `switch`; None where they have none."""
    function = switch.activation
    name = f"{type(function).__module__.rpartition('.')[2]}.{type(function).__name__}"
    if isinstance(switch, SwitchGLU):
        return _GATED.get(name)
    if name == "activations.GELU":
        return _GELUS.get(function._approx)
    return Activation.RELU2 if name == "activations.ReLU2" else None


class NativeExperts:
    """The experts of a switch layer; see zmoe.moe.experts.Experts."""

    def __init__(
        self,
        path: str,
        switch: Any,
        pool: ThreadPool,
        pairs_per_row: int,
        mapped: Mapping[str, Parts],
    ) -> None:
        """`switch` is at `path` in its model; `mapped`, by path, lies in files."""
        self._pool, self._switch = pool, switch
        self._weights = []
        for name in switch_layers(switch):
            layer, at = switch[name], f"{path}.{name}"
            parts = take_parts(layer, mapped.get(at))
            self._weights.append(matrices(at, parts, quantization_of(layer)))
        *gate, up, down = self._weights
        self._layer: CData | None = None
        activation = activation_of(switch)
        if activation is not None:
            self._layer = ffi.new("zmoe_expert_layer *")
            self._layer.gate = gate[0].array if gate else ffi.NULL
            self._layer.up, self._layer.down = up.array, down.array
            self._layer.experts, self._layer.activation = up.count, int(activation)
            if activation is Activation.CLAMPED_SWIGLU:
                self._layer.alpha = switch.activation._alpha
                self._layer.limit = switch.activation._limit
        self.width = down.out_features
        pool.reserve(lib.zmoe_experts_scratch(up.in_features, up.out_features, pairs_per_row))

    def partial(self, x: mx.array, pairs: LocalPairs, weights: Floats, dtype: mx.Dtype) -> mx.array:
        """The weighted sum of the pairs of each row: (rows, width) of `dtype`."""
        if self._layer is None:
            return combine(self.outputs(x, pairs), pairs, weights, x.shape[0]).astype(dtype)
        scale = np.zeros(len(pairs.rows) + len(pairs.padding), np.float32)
        scale[: len(pairs.rows)] = weights[pairs.rows, pairs.slots]
        padded, run = with_padding(x, pairs)
        total = self._run(padded, run, scale, (padded.shape[0], self.width), dtype)
        return total[: x.shape[0]] if len(pairs.padding) else total

    def outputs(self, x: mx.array, pairs: LocalPairs) -> mx.array:
        """The output of each pair: (pairs, width), of the type of x."""
        y = self._outputs(*with_padding(x, pairs))
        return y[: len(pairs.rows)] if len(pairs.padding) else y

    def _outputs(self, x: mx.array, pairs: LocalPairs) -> mx.array:
        if self._layer is not None:
            return self._run(x, pairs, None, (len(pairs.rows), self.width), x.dtype)
        function = self._switch.activation
        if len(self._weights) == 3:
            gate, up = (self._gather(weight, x, pairs) for weight in self._weights[:2])
            hidden = function(up, gate)
        else:
            hidden = function(self._gather(self._weights[0], x, pairs))
        count = len(pairs.rows)
        own = LocalPairs(np.arange(count, dtype=np.int32), pairs.slots, pairs.experts)
        return self._gather(self._weights[-1], hidden, own)

    @property
    def raw(self) -> CData:
        """Those that are fused, as a zmoe_expert_layer."""
        assert self._layer is not None
        return self._layer

    @property
    def is_fused(self) -> bool:
        """Whether the activation is the kernels' too, as sum_pairs needs it."""
        return self._layer is not None

    def sum_pairs(self, x: CData, x_dtype: mx.Dtype, rows: int, pairs: CData, out: Floats) -> None:
        """The same as `partial` from memory to memory: `pairs` is a zmoe_pairs, out f32."""
        chosen = (pairs.rows, pairs.experts, pairs.weights, pairs.count)
        self._multiply(x, DTYPES[x_dtype], rows, chosen, writable(out), Dtype.F32)

    def _run(
        self,
        x: mx.array,
        pairs: LocalPairs,
        scale: Floats | None,
        shape: tuple[int, int],
        dtype: mx.Dtype,
    ) -> mx.array:
        out = empty(shape, dtype)
        chosen = (
            ffi.from_buffer("int32_t[]", pairs.rows),
            ffi.from_buffer("int32_t[]", pairs.experts),
            ffi.NULL if scale is None else ffi.from_buffer("float[]", scale),
            len(pairs.rows),
        )
        x_dtype, target = DTYPES[x.dtype], writable(out)
        self._multiply(pointer(x), x_dtype, x.shape[0], chosen, target, DTYPES[dtype])
        return as_array(out, dtype, shape)

    def _multiply(
        self,
        x: CData,
        x_dtype: Dtype,
        rows: int,
        pairs: tuple[CData, CData, CData, int],
        out: CData,
        out_dtype: Dtype,
    ) -> None:
        """The experts' call: `pairs` are their rows, experts, weights and number."""
        pool = self._pool
        _check(
            lib.zmoe_experts(
                pool.handle, self._layer, x, x_dtype, rows, *pairs, out, out_dtype, pool.precision
            )
        )

    def _gather(self, weight: Matrices, x: mx.array, pairs: LocalPairs) -> mx.array:
        shape = (len(pairs.rows), weight.out_features)
        dtype = mx.result_type(x.dtype, *weight.dtypes)
        out = empty(shape, dtype)
        status = lib.zmoe_gather_linear(
            self._pool.handle,
            weight.array,
            weight.count,
            pointer(x),
            DTYPES[x.dtype],
            x.shape[0],
            ffi.from_buffer("int32_t[]", pairs.rows),
            ffi.from_buffer("int32_t[]", pairs.experts),
            len(pairs.rows),
            writable(out),
            DTYPES[dtype],
            self._pool.precision,
        )
        _check(status)
        return as_array(out, dtype, shape)


def _check(status: int) -> None:
    if status != Status.OK:
        raise ZmoeError(f"the experts' matmuls failed: {Status(status).name}")
