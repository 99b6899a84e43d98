"""Gated delta nets as a few calls of the kernels, on mlx-lm's caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import empty, writable
from zmoe.kernels.attention import fill_norm
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Dtype, Status, ffi, lib
from zmoe.placement.pairs import Floats

if TYPE_CHECKING:
    from zmoe.native import CData


class Slices(NamedTuple):
    """A part of each head of keys in what one projection gives: see zmoe_slices."""

    projection: int
    at: int
    stride: int


@dataclass(frozen=True)
class DeltaParts:
    """A gated delta net taken apart; see zmoe_delta_net in csrc/kernels/decoder.h.

    `projections` and `output` are native linear layers; `slices` in the order of
    zmoe_delta_part. `conv` (channels, taps, 1); `log_decay` and `offset` (value_heads,).
    """

    projections: Sequence[Any]
    slices: Sequence[Slices]
    conv: mx.array
    log_decay: mx.array
    offset: mx.array
    norm: Any
    output: Any
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


class StateArrays:
    """Arrays for the new states of a step's gated delta nets, made for all of them at once.

    C writes into their memory, which nobody else has yet.
    """

    def __init__(self) -> None:
        self.nets = 0
        self._made: list[tuple[mx.array, mx.array]] = []
        self._like: Any = None

    def take(
        self, conv: tuple[int, ...], dtype: mx.Dtype, state: tuple[int, ...]
    ) -> tuple[mx.array, mx.array]:
        """Arrays of the shape `conv` and `dtype`, and of the shape `state` in float32."""
        if not self._made or self._like != (conv, dtype, state):
            self._like = conv, dtype, state
            self._made = [(mx.zeros(conv, dtype), mx.zeros(state)) for _ in range(self.nets)]
            mx.eval(self._made)
        return self._made.pop()


class NativeDeltaNet:
    """h += net(norm(h)) of some sequences with as many rows each."""

    def __init__(
        self, norm: Any, parts: DeltaParts, states: StateArrays, pool: ThreadPool, dtype: mx.Dtype
    ) -> None:
        self._parts, self._states, self._pool, self._dtype = parts, states, pool, dtype
        states.nets += 1
        conv = np.array(parts.conv.astype(mx.float32))[..., 0].T.copy()
        decay = np.exp(np.array(parts.log_decay.astype(mx.float32)))
        offset = np.array(parts.offset.astype(mx.float32))
        self._keep: list[Any] = [conv, decay, offset]
        raw = ffi.new("zmoe_delta_net *")
        raw.key_heads, raw.value_heads = parts.key_heads, parts.value_heads
        raw.key_dim, raw.value_dim, raw.taps = parts.key_dim, parts.value_dim, len(conv)
        raw.conv, raw.decay, raw.offset = (
            ffi.from_buffer("float[]", values) for values in self._keep
        )
        fill_norm(raw.norm, parts.norm, self._keep)
        self._raw, self._channels = raw, conv.shape[1]
        self._norm = ffi.new("zmoe_norm *")
        fill_norm(self._norm, norm, self._keep)
        weights = [module._matmul.weight for module in parts.projections]
        self._widths = [weight.out_features for weight in weights]
        self._projections = _Linear(weights, pool)
        self._output = _Linear([parts.output._matmul.weight], pool)
        self._slices = ffi.new("zmoe_slices[]", lib.ZMOE_DELTA_PARTS)
        for to, part in zip(self._slices, parts.slices, strict=True):
            to.width, to.at, to.stride = self._widths[part.projection], part.at, part.stride
        pool.reserve(lib.zmoe_delta_scratch(raw, pool.threads))

    def __call__(self, h: CData, memory: Floats, sequences: int, cache: Any) -> None:
        """Change h (rows of all sequences, hidden_size) f32 in place, as C and as numpy see it;
        `cache` gets the states after them. Raises ZmoeError.
        """
        net, dtype, kind = self._raw, self._dtype, DTYPES[self._dtype]
        rows, width = memory.shape
        x = writable(empty((rows, width), dtype))
        check(lib.zmoe_norm_rows(self._pool.handle, self._norm, h, rows, x, kind))
        made = [writable(empty((rows, each), dtype)) for each in self._widths]
        self._projections(x, kind, rows, made, kind)
        for to, part in zip(self._slices, self._parts.slices):
            to.data = made[part.projection]
        heads = (sequences, net.value_heads, net.value_dim, net.key_dim)
        conv, state = self._states.take((sequences, net.taps - 1, self._channels), dtype, heads)
        out = writable(empty((rows, net.value_heads * net.value_dim), dtype))
        check(
            lib.zmoe_delta_step(
                self._pool.handle,
                net,
                self._slices,
                kind,
                sequences,
                rows // sequences,
                _held(cache[0], "uint8_t[]", dtype),
                ffi.from_buffer("uint8_t[]", conv, require_writable=True),
                _held(cache[1], "float[]", mx.float32),
                ffi.from_buffer("float[]", state, require_writable=True),
                out,
            )
        )
        cache[0], cache[1] = conv, state
        cache.advance(rows // sequences)
        y = np.empty((rows, width), np.float32)
        self._output(out, kind, rows, [writable(y)], Dtype.F32)
        memory += y


class _Linear:
    """All matmuls of one input, from memory to memory."""

    def __init__(self, weights: Sequence[Any], pool: ThreadPool) -> None:
        self._pool, self._keep = pool, weights
        self._weights = ffi.new("zmoe_weight *[]", [weight[0] for weight in weights])
        self._strides = ffi.new("size_t[]", [weight.out_features for weight in weights])
        self._targets = ffi.new("void *[]", len(weights))
        pool.reserve(lib.zmoe_linear_scratch(weights[0].in_features))

    def __call__(
        self, x: CData, x_dtype: Dtype, rows: int, ys: Sequence[CData], y_dtype: Dtype
    ) -> None:
        for i, y in enumerate(ys):
            self._targets[i] = y
        given = (self._weights, len(ys), x, x_dtype, rows, self._targets, self._strides, y_dtype)
        check(lib.zmoe_linear(self._pool.handle, *given, self._pool.precision))


def check(status: int) -> None:
    """Raise ZmoeError unless a call succeeded."""
    if status != Status.OK:
        raise ZmoeError(f"a gated delta net failed: {Status(status).name}")


def _held(array: mx.array | None, ctype: str, dtype: mx.Dtype) -> CData:
    """What a cache holds, kept alive; NULL where it holds nothing yet."""
    if array is None:
        return ffi.NULL
    if array.dtype != dtype or not memoryview(array).c_contiguous:  # type: ignore[arg-type]
        array = mx.contiguous(array.astype(dtype))
        mx.eval(array)
    return ffi.from_buffer(ctype, array)
