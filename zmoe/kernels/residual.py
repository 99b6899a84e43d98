"""What the decoder layers of one model share: the residual buffer and the RoPE tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from zmoe.exchange.buffers import DTYPES
from zmoe.kernels.arrays import Buffer, pointer
from zmoe.native import Dtype, best_isa, ffi, lib

if TYPE_CHECKING:
    from zmoe.native import CData

_POSITIONS_AHEAD = 256  # so that a token rarely waits for MLX to turn vectors


class ResidualBuffer:
    """The residual stream h (tokens, hidden_size) in f32, in memory that MLX owns.

    A layer hands the array on which the next one is called; it is the same
    memory all the time, changed in place. MLX reads it at the end, in the
    final norm, before the next step begins.
    """

    def __init__(self, width: int) -> None:
        self.width, self.sequences = width, 1  # the sequences that take() was given last
        self._rows = 0
        self._views: dict[int, tuple[mx.array, CData, Buffer]] = {}

    def take(self, x: mx.array) -> tuple[mx.array, CData, Buffer]:
        """Take x (sequences, tokens, hidden_size): the buffer as an array (1, rows, hidden_size),
        in C, and as numpy.
        """
        rows = x.size // self.width
        view = self._view(rows)
        if x is not view[0]:
            self.sequences = x.shape[0]
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
        first = slice(0, self.dims, 2) if self.traditional else slice(0, self.dims // 2)
        second = slice(1, self.dims, 2) if self.traditional else slice(self.dims // 2, self.dims)
        probe[..., first] = 1
        self._probe, self._parts = mx.array(probe), (first, second)
        self._tables = [np.empty((0, self.dims // 2), np.float32) for _ in self._parts]
        self.raw = ffi.new("zmoe_rope *")

    def extend(self, positions: int) -> None:
        """Let `raw` have the cosines and sines of at least so many positions."""
        known = self.raw.positions
        if positions > known:
            count = max(positions - known, known, _POSITIONS_AHEAD)
            probe = mx.broadcast_to(self._probe, (1, 1, count, self._probe.shape[-1]))
            turned = np.asarray(self.rope(probe, offset=known))[0, 0]
            self._tables = [
                np.concatenate([table, turned[:, part]])
                for table, part in zip(self._tables, self._parts)
            ]
            self.raw.cosines, self.raw.sines = (
                ffi.from_buffer("float[]", table) for table in self._tables
            )
            self.raw.positions = known + count
