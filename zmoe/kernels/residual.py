"""What the decoder layers of one model share: the residual buffer, the RoPE tables, the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import Buffer, empty, pointer, writable
from zmoe.native import Dtype, best_isa, ffi, lib

if TYPE_CHECKING:
    from zmoe.native import CData

_FIRST_KEYS = 256
_KEPT = 4  # first keys that a window keeps
_POSITIONS_AHEAD = 256  # so that a token rarely waits for MLX to turn vectors


class ResidualBuffer:
    """The residual stream h (tokens, hidden_size) in f32, in memory that MLX owns.

    A layer hands the array on which the next one is called; it is the same
    memory all the time, changed in place. MLX reads it at the end, in the
    final norm, before the next step begins.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows = 0
        self._views: dict[int, tuple[mx.array, CData, Buffer]] = {}

    def take(self, x: mx.array) -> tuple[mx.array, CData, Buffer]:
        """Take x (1, tokens, hidden_size): the buffer as an array, in C, and as numpy."""
        rows = x.size // self.width
        view = self._view(rows)
        if x is not view[0]:
            if x.dtype not in DTYPES:
                x = x.astype(mx.float32)
            source = pointer(x)
            lib.zmoe_convert(
                view[1], Dtype.F32, source, DTYPES[x.dtype], rows * self.width, best_isa()
            )
        return view

    def _view(self, rows: int) -> tuple[mx.array, CData, Buffer]:
        if rows > self._rows:
            self._rows = rows
            self._whole = mx.zeros((rows, self.width), mx.float32)
            mx.eval(self._whole)
            self._views.clear()
        view = self._views.get(rows)
        if view is None:
            array = self._whole[:rows].reshape(1, rows, self.width)
            mx.eval(array)
            memory: Any = np.asarray(array)
            h = ffi.from_buffer("float[]", memory, require_writable=True)
            view = (array, h, memory.reshape(rows, self.width))
            self._views[rows] = view
        return view


class RopeTables:
    """Cosines and sines of a rotary embedding, as its own module computes them.

    The module turns vectors whose pairs are all (1, 0): what comes out is
    (cosine, sine), with whatever scaling it has.
    """

    def __init__(self, rope: Any, head_dim: int) -> None:
        self.rope = rope
        self.dims = int(rope.dims if "dims" in vars(rope) else rope.dim)
        self.traditional = bool(getattr(rope, "traditional", False))
        probe = np.zeros((1, 1, 1, head_dim), np.float32)
        self._first = slice(0, self.dims, 2) if self.traditional else slice(0, self.dims // 2)
        self._second = (
            slice(1, self.dims, 2) if self.traditional else slice(self.dims // 2, self.dims)
        )
        probe[..., self._first] = 1
        self._probe = mx.array(probe)
        self._positions = range(0)
        self._tables: list[CData] = []

    def tables(self, offset: int, tokens: int) -> list[CData]:
        """Cosines and sines (tokens, dims / 2) f32 of the positions from `offset` on."""
        known = self._positions
        if not (known.start <= offset and offset + tokens <= known.stop):
            count = max(tokens, _POSITIONS_AHEAD)
            probe = mx.broadcast_to(self._probe, (1, 1, count, self._probe.shape[-1]))
            turned = np.asarray(self.rope(probe, offset=offset))[0, 0]
            self._positions = known = range(offset, offset + count)
            self._tables = [
                ffi.from_buffer("float[]", np.ascontiguousarray(turned[:, part]))
                for part in (self._first, self._second)
            ]
        skipped = (offset - known.start) * (self.dims // 2)
        return [table + skipped for table in self._tables]


class NativeCache:
    """Keys and values of one layer, as mlx-lm's models see a cache: they only ask its length.

    With `max_size` it is a window, as mlx-lm's RotatingKVCache(max_size, keep=4) is: of the
    keys before a token, the first 4 and the latest stay, `max_size` in all with its own.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, dtype: mx.Dtype, max_size: int | None = None
    ) -> None:
        self._shape, self._dtype, self._max_size = (kv_heads, head_dim), dtype, max_size
        self.raw = ffi.new("zmoe_kv_cache *")
        self._memory: list[Buffer] = []
        self._dropped = 0
        self._oldest = _KEPT  # where the oldest key of the window lies

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self._dropped + int(self.raw.length)

    @property
    def state(self) -> list[mx.array]:
        """Nothing that MLX would have to compute."""
        return []

    def make_mask(self, *_: Any, **__: Any) -> None:
        """None: the layer itself knows what a token may see."""
        return None

    def grow(self, tokens: int) -> bool:
        """Make room for `tokens` more; whether that took new memory."""
        if self._max_size is not None and self.raw.length + tokens > self._max_size:
            self._drop(tokens, self._max_size)
        length, capacity = int(self.raw.length), int(self.raw.capacity)
        if length + tokens <= capacity:
            return False
        capacity = max(_FIRST_KEYS, 2 * capacity)
        capacity = max(min(capacity, self._max_size or capacity), length + tokens)
        heads, head_dim = self._shape
        grown = [empty((heads, capacity, head_dim), self._dtype) for _ in range(2)]
        for new, old in zip(grown, self._memory):
            new[:, :length] = old[:, :length]
        self._memory = grown
        self.raw.keys, self.raw.values = (writable(memory) for memory in grown)
        self.raw.capacity = capacity
        return True

    def _drop(self, tokens: int, max_size: int) -> None:
        """Leave at most `max_size` - 1 keys, which `tokens` new ones then follow."""
        length, last = int(self.raw.length), max_size - 1
        if length <= last and (tokens == 1 or self._oldest == _KEPT):
            return
        if tokens == 1 and length == max_size:
            # One token sees all that is left, in any order: the latest takes the oldest's place.
            for memory in self._memory:
                memory[:, self._oldest] = memory[:, last]
            self._oldest = _KEPT + (self._oldest - _KEPT + 1) % (last - _KEPT)
            dropped = 1
        else:
            dropped = length - last
            by_age = np.r_[:_KEPT, self._oldest : last, _KEPT : self._oldest, last:length]
            left = np.delete(by_age, slice(_KEPT, _KEPT + dropped))
            for memory in self._memory:
                memory[:, : len(left)] = memory[:, left]
            self._oldest = _KEPT
        self._dropped += dropped
        self.raw.length = length - dropped
