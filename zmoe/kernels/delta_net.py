"""Gated delta nets between layers that MLX runs, on mlx-lm's caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import as_array, empty, pointer, writable
from zmoe.kernels.attention import fill_norm
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Status, ffi, lib

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


class NativeDeltaNet(Module):
    """Stands in for a gated delta net of mlx-lm, with its caches."""

    def __init__(self, net: Module, parts: DeltaParts, pool: ThreadPool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.net = net
        self._parts, self._pool = parts, pool
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
        self._weights = [module._matmul.weight for module in parts.projections]
        count = len(self._weights)
        self._pointers = ffi.new("zmoe_weight *[]", [weight[0] for weight in self._weights])
        self._targets = ffi.new("void *[]", count)
        widths = [weight.out_features for weight in self._weights]
        self._strides = ffi.new("size_t[]", widths)
        self._slices = ffi.new("zmoe_slices[]", lib.ZMOE_DELTA_PARTS)
        for to, part in zip(self._slices, parts.slices, strict=True):
            to.width, to.at, to.stride = widths[part.projection], part.at, part.stride
        pool.reserve(lib.zmoe_linear_scratch(self._weights[0].in_features))
        pool.reserve(lib.zmoe_delta_scratch(raw, pool.threads))

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """From x (sequences, rows, hidden_size), alike."""
        if mask is not None or cache is None or cache.lengths is not None:
            plain: mx.array = self.net(x, mask, cache)
            return plain
        sequences, rows, _ = x.shape
        parts, net = self._parts, self._raw
        self._project(x)
        conv = mx.zeros((sequences, net.taps - 1, self._channels), x.dtype)
        state = mx.zeros((sequences, net.value_heads, net.value_dim, net.key_dim))
        mx.eval(conv, state)  # C writes into their memory, which nobody else has yet
        out = empty((sequences * rows, net.value_heads * net.value_dim), x.dtype)
        status = lib.zmoe_delta_step(
            self._pool.handle,
            net,
            self._slices,
            DTYPES[x.dtype],
            sequences,
            rows,
            _memory(cache[0], "uint8_t[]", x.dtype),
            ffi.from_buffer("uint8_t[]", conv, require_writable=True),
            _memory(cache[1], "float[]", mx.float32),
            ffi.from_buffer("float[]", state, require_writable=True),
            writable(out),
        )
        if status != Status.OK:
            raise ZmoeError(f"a gated delta net failed: {Status(status).name}")
        cache[0], cache[1] = conv, state
        cache.advance(rows)
        y: mx.array = parts.output(as_array(out, x.dtype, (sequences, rows, out.shape[1])))
        return y

    def _project(self, x: mx.array) -> None:
        """All projections of x, into memory to which the slices then point."""
        rows = x.size // x.shape[-1]
        made = [empty((rows, weight.out_features), x.dtype) for weight in self._weights]
        for i, buffer in enumerate(made):
            self._targets[i] = writable(buffer)
        status = lib.zmoe_linear(
            self._pool.handle,
            self._pointers,
            len(made),
            pointer(x),
            DTYPES[x.dtype],
            rows,
            self._targets,
            self._strides,
            DTYPES[x.dtype],
            self._pool.precision,
        )
        if status != Status.OK:
            raise ZmoeError(f"a matmul failed: {Status(status).name}")
        self._made = made
        for to, part in zip(self._slices, self._parts.slices):
            to.data = self._targets[part.projection]


def _memory(array: mx.array | None, ctype: str, dtype: mx.Dtype) -> CData:
    """What a cache holds, kept alive; NULL where it holds nothing yet."""
    if array is None:
        return ffi.NULL
    array = mx.contiguous(array.astype(dtype))
    mx.eval(array)
    return ffi.from_buffer(ctype, array)
