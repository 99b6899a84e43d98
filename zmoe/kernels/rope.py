"""The RoPE tables that the decoder layers of one model share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from zmoe.native import ffi

_POSITIONS_AHEAD = 256  # so that a token rarely waits for MLX to turn vectors


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
