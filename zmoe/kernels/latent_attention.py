"""Multi-head latent attention as one call of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.attention import Attention, fill_norm
from zmoe.kernels.linear import quantization_of, take_parts
from zmoe.kernels.paged import PagedCache
from zmoe.kernels.rope import RopeTables
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import Matrices, matrices
from zmoe.native import ffi, lib


@dataclass(frozen=True)
class LatentParts:
    """A latent attention taken apart: see zmoe_latent_attention in csrc/kernels/decoder.h.

    The linear layers are native; `key_heads` and `value_heads` hold a matrix per head.
    """

    norm: Any
    query_down: Any  # with query_norm; or both None
    query_norm: Any
    query: Any
    down: Any
    latent_norm: Any
    key_heads: Any
    value_heads: Any
    output: Any
    rope_dims: int
    scale: float
    rope: Any

    @property
    def rope_width(self) -> int:
        """The size of the vectors that `rope` turns."""
        return self.rope_dims

    def make(self, *given: Any) -> Attention:
        """The attention that they make, from what NativeLatentAttention takes besides."""
        return NativeLatentAttention(self, *given)


class NativeLatentAttention(Attention):
    """h += attention(norm(h)), of latents."""

    def __init__(
        self,
        parts: LatentParts,
        rope_tables: RopeTables,
        pool: ThreadPool,
        dtype: mx.Dtype,
    ) -> None:
        keys, values = (_heads(part) for part in (parts.key_heads, parts.value_heads))
        keep: list[Any] = [parts, keys, values]
        raw = ffi.new("zmoe_latent_attention *")
        fill_norm(raw.input, parts.norm, keep)
        fill_norm(raw.query_norm, parts.query_norm, keep)
        fill_norm(raw.latent_norm, parts.latent_norm, keep)
        for name in ("query_down", "query", "down", "output"):
            linear = getattr(parts, name)
            setattr(raw, name, ffi.NULL if linear is None else linear._matmul.weight.array)
        raw.key_heads, raw.value_heads, raw.heads = keys.array, values.array, keys.count
        raw.latent_dim, raw.rope_dims = values.in_features, parts.rope_dims
        raw.key_dim, raw.value_dim = keys.in_features, values.out_features
        raw.scale, raw.rope_traditional = parts.scale, rope_tables.traditional
        raw.dtype = int(DTYPES[dtype])
        cache = PagedCache(1, raw.latent_dim + raw.rope_dims, dtype, is_latent=True)
        super().__init__("latent", raw, cache, rope_tables, keep)
        pool.reserve(lib.zmoe_latent_attention_scratch(raw, pool.threads))


def _heads(layer: Any) -> Matrices:
    """The matrices of mlx-lm's MultiLinear."""
    return matrices("attention", take_parts(layer, None), quantization_of(layer))
