"""Attention of the usual kind as one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.chain import Sublayer
from zmoe.kernels.paged import PagedCache
from zmoe.kernels.rope import RopeTables
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import Matrices
from zmoe.native import ffi, lib

if TYPE_CHECKING:
    from zmoe.native import CData

_RMS, _LAYER = 1, 2
_KEPT = 4  # first keys that a window of --max-kv-size keeps


@dataclass(frozen=True)
class AttentionParts:
    """An attention module taken apart; `projections` are of queries, keys, values,
    or of all three in one. `is_gated`: those of queries have a gate after each head's query.
    """

    norm: Any
    projections: Sequence[Any]
    output: Any
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Any
    query_norm: Any = None
    key_norm: Any = None
    clip: float = 0.0
    sinks: mx.array | None = None
    window: int = 0
    is_gated: bool = False

    @property
    def rope_width(self) -> int:
        """The size of the vectors that `rope` turns, the whole of them or their first elements."""
        return self.head_dim

    def make(self, *given: Any) -> Attention:
        """The attention that they make, from what NativeAttention takes besides."""
        return NativeAttention(self, *given)


class Attention:
    """h += attention(norm(h)) of one layer.

    `kind` is the field of zmoe_sublayer for what `described` is, whose own window is `window`, and
    `keep` what it points to.
    """

    def __init__(
        self,
        kind: str,
        described: CData,
        cache: PagedCache,
        rope_tables: RopeTables,
        keep: Sequence[Any],
        window: int = 0,
    ) -> None:
        self._described, self._window, self.cache = described, window, cache
        self.sublayer = Sublayer.of(kind, described, [cache, rope_tables, keep])
        self.sublayer.raw.cache, self.sublayer.raw.rope = cache.raw, rope_tables.raw

    def limit(self, max_kv_size: int | None) -> None:
        """Let each row see the first 4 keys and the latest, `max_kv_size` in all; None: all."""
        self._described.window = self._window if max_kv_size is None else max_kv_size
        self._described.keep = 0 if max_kv_size is None else _KEPT


def fill_norm(raw: CData, norm: Any, keep: list[Any]) -> None:
    """Describe an RMSNorm or LayerNorm (or None) to C; `keep` holds on to its weights."""
    if norm is None:
        return
    raw.kind = _LAYER if type(norm).__name__ == "LayerNorm" else _RMS
    raw.eps = norm.eps
    for part in ("weight", "bias"):
        if part in norm:
            values = np.array(norm[part].astype(mx.float32))
            keep.append(values)
            raw.width = values.size
            setattr(raw, part, ffi.from_buffer("float[]", values))


def weights_of(modules: Sequence[Any]) -> CData:
    """The weights of native linear layers side by side: a zmoe_weight[]."""
    found: list[Matrices] = [module._matmul.weight for module in modules]
    array = ffi.new("zmoe_weight[]", len(found))
    for i, weight in enumerate(found):
        array[i] = weight.array[0]
    return array


class NativeAttention(Attention):
    """h += attention(norm(h)), for layers whose linear parts are native already."""

    def __init__(
        self,
        parts: AttentionParts,
        rope_tables: RopeTables,
        pool: ThreadPool,
        dtype: mx.Dtype,
    ) -> None:
        projections, output = weights_of(parts.projections), weights_of([parts.output])
        keep: list[Any] = [parts, projections, output]
        raw = ffi.new("zmoe_attention *")
        fill_norm(raw.input, parts.norm, keep)
        fill_norm(raw.query_norm, parts.query_norm, keep)
        fill_norm(raw.key_norm, parts.key_norm, keep)
        raw.projections, raw.n_projections = projections, len(parts.projections)
        raw.output = output
        raw.heads, raw.kv_heads, raw.head_dim = parts.heads, parts.kv_heads, parts.head_dim
        raw.scale, raw.clip, raw.window = parts.scale, parts.clip, parts.window
        raw.is_gated = parts.is_gated
        raw.rope_dims, raw.rope_traditional = rope_tables.dims, rope_tables.traditional
        if parts.sinks is not None:
            sinks = np.array(parts.sinks.astype(mx.float32))
            keep.append(sinks)
            raw.sinks = ffi.from_buffer("float[]", sinks)
        raw.dtype = int(DTYPES[dtype])
        cache = PagedCache(parts.kv_heads, parts.head_dim, dtype)
        super().__init__("attention", raw, cache, rope_tables, keep, parts.window)
        pool.reserve(lib.zmoe_attention_scratch(raw, pool.threads))
