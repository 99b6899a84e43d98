"""A model all of whose layers are in C: from tokens to logits, on paged caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from zmoe.errors import ZmoeError
from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.attention import Attention, fill_norm
from zmoe.kernels.decoder import FeedForward
from zmoe.kernels.delta_net import NativeDeltaNet
from zmoe.kernels.paged import PagedCache, PagedStep
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.weights import Matrices
from zmoe.native import Status, ffi, lib
from zmoe.placement.pairs import Floats

if TYPE_CHECKING:
    from zmoe.native import CData

Mixer = Attention | NativeDeltaNet
Run = Callable[["CData", Floats], None]  # of h (tokens, hidden_size) f32, as C and as numpy see it


class PagedModel:
    """`parts` of each layer, which `runs` run one after the other, between embedding and head.

    The residual stream h stays f32; `norm` is the one after the last layer. Of each sequence
    recurrent layers keep `state_bytes` in all.
    """

    def __init__(
        self,
        embedding: Matrices,
        norm: Any,
        head: Matrices,
        parts: Sequence[tuple[Mixer, FeedForward]],
        runs: Sequence[Run],
        step: PagedStep,
        pool: ThreadPool,
        dtype: mx.Dtype,
    ) -> None:
        self.parts, self.step = parts, step
        self.caches: dict[int, PagedCache] = {}  # by layer
        self._attentions: list[Attention] = []
        self.state_bytes = 0
        for layer, (mixer, _) in enumerate(parts):
            if isinstance(mixer, Attention):
                self.caches[layer] = mixer.cache
                self._attentions.append(mixer)
            else:
                mixer.place(self.state_bytes)
                self.state_bytes += mixer.state_bytes
        self._embedding, self._head, self._runs, self._pool = embedding, head, runs, pool
        # Modes whose scales are bytes (mxfp4 and kin) dequantise to bfloat16, as in MLX.
        self._embedding_dtype = DTYPES[(*embedding.dtypes, mx.bfloat16)[0]]
        self._dtype = DTYPES[dtype]
        self._keep: list[Any] = []
        self._norm = ffi.new("zmoe_norm *")
        fill_norm(self._norm, norm, self._keep)
        self._h = np.empty((0, embedding.in_features), np.float32)
        pool.reserve(lib.zmoe_logits_scratch(head.array))

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> Floats | None:
        """Run the step's spans, whose `tokens` are given in order.

        Logits (len(rows), vocabulary) f32 after those `rows`; None where there are none. Raises
        ZmoeError, PeerError, DivergenceError.
        """
        pool, count = self._pool, len(tokens)
        if count > len(self._h):
            self._h = np.empty((count, self._embedding.in_features), np.float32)
        memory: Floats = self._h[:count]
        h = ffi.from_buffer("float[]", memory, require_writable=True)
        ids, dtype = ffi.new("int32_t[]", tokens), self._embedding_dtype
        status = lib.zmoe_embed(pool.handle, self._embedding.array, ids, count, dtype, h)
        if status != Status.OK:
            raise ZmoeError(f"no embedding for one of the tokens {list(tokens)}")
        for run in self._runs:
            run(h, memory)
        return self._logits(h, rows) if rows else None

    def _logits(self, h: CData, rows: Sequence[int]) -> Floats:
        pool, count = self._pool, len(rows)
        out = np.empty((count, self._head.out_features), np.float32)
        status = lib.zmoe_logits(
            pool.handle,
            self._norm,
            self._head.array,
            self._dtype,
            h,
            ffi.new("uint32_t[]", rows),
            count,
            ffi.from_buffer("float[]", out, require_writable=True),
            pool.precision,
        )
        if status != Status.OK:
            raise ZmoeError(f"the matmul of the logits failed: {Status(status).name}")
        return out

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block of 64 positions, in all layers."""
        return sum(cache.bytes_per_block for cache in self.caches.values())

    @property
    def can_quantize(self) -> bool:
        """Whether the keys and values of all layers may be kept in 8 bits."""
        return all(cache.can_quantize for cache in self.caches.values())

    def allocate(self, blocks: int) -> None:
        """See PagedCache.allocate."""
        for cache in self.caches.values():
            cache.allocate(blocks)

    def copy(self, to: int, source: int) -> None:
        """Block `to` becomes a copy of block `source`."""
        for cache in self.caches.values():
            cache.copy(to, source)

    def quantize(self, bits: int | None) -> None:
        """See PagedCache.quantize."""
        for cache in self.caches.values():
            cache.quantize(bits)

    def limit(self, max_kv_size: int | None) -> None:
        """See Attention.limit."""
        for attention in self._attentions:
            attention.limit(max_kv_size)
