"""Feed-forward networks that every token goes through: dense layers and shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import empty, writable
from zmoe.kernels.attention import fill_norm, weights_of
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Activation, Dtype, RouteKind, Status, ffi, lib
from zmoe.placement.pairs import Floats

if TYPE_CHECKING:
    from zmoe.native import CData


@dataclass(frozen=True)
class MlpParts:
    """down(silu(gate(x)) * up(x)); `linears` are these three. With `weight`, a linear layer
    with one output, its logistic function multiplies the result.
    """

    linears: tuple[Any, Any, Any]
    weight: Any = None


class MlpMemory:
    """What the MLPs of all layers read and write, for as many tokens as there have been.

    `x` (rows, hidden_size) of the model's dtype; `out` (rows, hidden_size) and `weights` (rows,)
    f32; every pair is a token and expert 0.
    """

    def __init__(self, dtype: mx.Dtype) -> None:
        self.dtype, self._rows, self._width = dtype, 0, 0

    def reserve(self, rows: int, width: int) -> None:
        """Make room for `rows` tokens of `width` elements; what lies there is lost."""
        if rows <= self._rows and width == self._width:
            return
        self._rows, self._width = rows, width
        self.x = writable(empty((rows, width), self.dtype))
        self.out = np.empty((rows, width), np.float32)
        self.pair_rows = _ints(np.arange(rows, dtype=np.int32))
        self.pair_experts, self.ids = (_ints(np.zeros(rows, np.int32)) for _ in range(2))
        self.ones, self.weights = (_floats(np.ones(rows, np.float32)) for _ in range(2))


def _ints(array: Any) -> CData:
    return ffi.from_buffer("int32_t[]", array, require_writable=True)


def _floats(array: Any) -> CData:
    return ffi.from_buffer("float[]", array, require_writable=True)


class NativeMlp:
    """h += mlp(norm(h)): the MLP is an expert to which every token goes."""

    def __init__(self, norm: Any, parts: MlpParts, memory: MlpMemory, pool: ThreadPool) -> None:
        self._memory, self._pool = memory, pool
        self._weights = weights_of(parts.linears)
        self._keep: list[Any] = [parts]
        self._norm = ffi.new("zmoe_norm *")
        up = parts.linears[1]._matmul.weight
        self._norm.width = self._width = up.in_features
        fill_norm(self._norm, norm, self._keep)
        self._layer = ffi.new("zmoe_expert_layer *")
        self._layer.gate, self._layer.up, self._layer.down = (self._weights + i for i in range(3))
        self._layer.experts, self._layer.activation = 1, int(Activation.SILU)
        self._router: CData | None = None
        if parts.weight is not None:
            self._keep.append(weights_of([parts.weight]))
            self._router = ffi.new("zmoe_router *")
            self._router.input, self._router.gate = self._norm[0], self._keep[-1]
            self._router.kind, self._router.top_k = int(RouteKind.SIGMOID_TOP_K), 1
            pool.reserve(lib.zmoe_route_scratch(self._router))
        pool.reserve(lib.zmoe_experts_scratch(up.in_features, up.out_features, 1))

    def __call__(self, h: CData, memory: Floats) -> None:
        """Of h (tokens, hidden_size) f32 in place, as C and as numpy see it."""
        memory += self.output(h, len(memory))

    def output(self, h: CData, rows: int) -> Floats:
        """mlp(norm(h)) for h (rows, hidden_size) f32, until another MLP runs. Raises ZmoeError."""
        at, pool = self._memory, self._pool
        at.reserve(rows, self._width)
        dtype, weights, out = DTYPES[at.dtype], at.ones, at.out[:rows]
        if self._router is None:
            status = lib.zmoe_norm_rows(pool.handle, self._norm, h, rows, at.x, dtype)
        else:
            weights = at.weights
            status = lib.zmoe_route(
                pool.handle, self._router, h, rows, at.x, dtype, at.ids, weights
            )
        if status == Status.OK:
            pairs = (at.pair_rows, at.pair_experts, weights, rows)
            target = (writable(out), Dtype.F32, pool.precision)
            status = lib.zmoe_experts(pool.handle, self._layer, at.x, dtype, rows, *pairs, *target)
        if status != Status.OK:
            raise ZmoeError(f"an MLP failed: {Status(status).name}")
        return out
