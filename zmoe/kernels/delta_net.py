"""Gated delta nets as one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.attention import fill_norm, weights_of
from zmoe.kernels.chain import Sublayer
from zmoe.kernels.threads import ThreadPool
from zmoe.native import ffi, lib


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

    input_norm: Any
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


class NativeDeltaNet:
    """h += net(norm(h)) of one layer, which keeps `state_bytes` of each sequence."""

    def __init__(self, parts: DeltaParts, pool: ThreadPool, dtype: mx.Dtype) -> None:
        conv = np.array(parts.conv.astype(mx.float32))[..., 0].T.copy()
        decay = np.exp(np.array(parts.log_decay.astype(mx.float32)))
        offset = np.array(parts.offset.astype(mx.float32))
        projections, output = weights_of(parts.projections), weights_of([parts.output])
        slices = ffi.new("zmoe_slices[]", [tuple(each) for each in parts.slices])
        keep: list[Any] = [parts, conv, decay, offset, projections, output, slices]
        raw = ffi.new("zmoe_delta_net *")
        fill_norm(raw.input, parts.input_norm, keep)
        fill_norm(raw.norm, parts.norm, keep)
        raw.projections, raw.n_projections = projections, len(parts.projections)
        raw.output, raw.parts = output, slices
        raw.key_heads, raw.value_heads = parts.key_heads, parts.value_heads
        raw.key_dim, raw.value_dim, raw.taps = parts.key_dim, parts.value_dim, len(conv)
        raw.conv, raw.decay, raw.offset = (
            ffi.from_buffer("float[]", values) for values in (conv, decay, offset)
        )
        raw.dtype = int(DTYPES[dtype])
        self._raw = raw
        self.sublayer = Sublayer.of("delta", raw, keep)
        self.state_bytes: int = lib.zmoe_delta_state_bytes(raw)
        pool.reserve(lib.zmoe_delta_scratch(raw, pool.threads))

    def place(self, at: int) -> None:
        """Have it keep its part of a sequence's state from byte `at` on."""
        self._raw.state_at = at
