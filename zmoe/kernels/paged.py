"""The paged caches of a model's attention layers, and the spans of the step that they run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import Buffer, empty, writable
from zmoe.kernels.rope import RopeTables
from zmoe.native import ffi, lib

if TYPE_CHECKING:
    from zmoe.native import CData

Blocks = npt.NDArray[np.uint32]
State = npt.NDArray[np.uint8]  # what all recurrent layers keep of a sequence


class PagedCache:
    """Keys and values of one layer, in blocks of 64 positions."""

    def __init__(
        self, kv_heads: int, head_dim: int, dtype: mx.Dtype, is_latent: bool = False
    ) -> None:
        """`is_latent`: there is one vector per position, kept in full, for all keys and values."""
        self._kv_heads, self._head_dim, self._dtype = kv_heads, head_dim, dtype
        self._names = ("latents",) if is_latent else ("keys", "values")
        self.raw = ffi.new("zmoe_kv_cache *")
        self.quantize(None)

    def quantize(self, bits: int | None) -> None:
        """Keep keys and values in 8 bits, or in the model's dtype; what lies there is lost."""
        self.raw.bits, self.raw.blocks = bits or 0, 0
        self._memory = [self._empty(0) for _ in self._names]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of the keys and values of 64 positions."""
        return len(self._names) * self._empty(1).nbytes

    @property
    def can_quantize(self) -> bool:
        """Whether keys and values may be kept in 8 bits."""
        return len(self._names) == 2

    def _empty(self, blocks: int) -> Buffer:
        dtype = mx.uint8 if self.raw.bits else self._dtype
        head = lib.zmoe_kv_head_bytes(self._head_dim, DTYPES[self._dtype], self.raw.bits)
        return empty((blocks, self._kv_heads, head // dtype.size), dtype)

    def allocate(self, blocks: int) -> None:
        """Make room for that many blocks; the system gives the memory as they are written.

        What lies in those of the present ones that remain stays.
        """
        new = [self._empty(blocks) for _ in self._memory]
        for to, source in zip(new, self._memory):
            kept = min(len(to), len(source))
            to[:kept] = source[:kept]
        self._memory = new
        self.raw.keys, self.raw.values = writable(new[0]), writable(new[-1])
        self.raw.blocks = blocks

    def copy(self, to: int, source: int) -> None:
        """Block `to` becomes a copy of block `source`."""
        for memory in self._memory:
            memory[to] = memory[source]

    @property
    def memory(self) -> dict[str, Buffer]:
        """The keys and the values of all blocks, (blocks, kv_heads, 64 * head_dim) each; or the
        latents, with one head.

        In 8 bits they are bytes, and the last axis goes on with 64 scales in float32.
        """
        return dict(zip(self._names, self._memory))


class PagedStep:
    """The spans of the step that runs, shared by all layers: `raw` zmoe_span[`count`]."""

    def __init__(self, rope_tables: Collection[RopeTables]) -> None:
        """`rope_tables`: those of all layers, which reach as far as the spans then."""
        self.raw, self.count = ffi.new("zmoe_span[]", 0), 0
        self._rope_tables = rope_tables
        self._keep: list[CData] = []

    def begin(self, spans: Sequence[tuple[int, int, Blocks, State | None, State | None]]) -> None:
        """Take (position, rows, the sequence's blocks) of each span, in the order of the rows; and,
        where layers are recurrent, the state before them, if any, and memory for that after them.
        """
        if self.count != len(spans):
            self.raw, self.count = ffi.new("zmoe_span[]", len(spans)), len(spans)
        self._keep, end = [], 0
        for raw, (position, rows, blocks, before, after) in zip(self.raw, spans):
            table = ffi.from_buffer("uint32_t[]", blocks)
            states = [
                ffi.NULL if each is None else ffi.from_buffer("unsigned char[]", each)
                for each in (before, after)
            ]
            raw.state_before, raw.state_after = states
            raw.position, raw.rows, raw.blocks, raw.n_blocks = position, rows, table, len(blocks)
            end = max(end, position + rows)
            self._keep += [table, *states]
        for tables in self._rope_tables:
            tables.extend(end)
