"""What the leader of the centralised schedule dispatches to a worker for one layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zmoe.native import Dtype, ffi
from zmoe.placement.pairs import Floats, LocalPairs

_RECEIVED = ("uint8_t[]", "int32_t[]", "int32_t[]", "float[]")
_NUMPY: dict[Dtype, Any] = {Dtype.F32: np.float32, Dtype.F16: np.float16, Dtype.BF16: np.uint16}


class DispatchBatch:
    """The rows and pairs (row, expert, weight) that a worker was sent for one layer.

    It is memory for `x_bytes` bytes of rows and `max_pairs` pairs, which the next
    layer overwrites; `raw` is the zmoe_dispatch_batch that C fills.
    """

    def __init__(self, x_bytes: int, max_pairs: int) -> None:
        self._x = np.empty(x_bytes, np.uint8)
        self._rows, self._experts = (np.empty(max_pairs, np.int32) for _ in range(2))
        self._weights = np.empty(max_pairs, np.float32)
        self.raw = ffi.new("zmoe_dispatch_batch *")
        memory = (self._x, self._rows, self._experts, self._weights)
        self._keep = [
            ffi.from_buffer(kind, m, require_writable=True) for kind, m in zip(_RECEIVED, memory)
        ]
        self.raw.x, self.raw.pair_rows, self.raw.pair_experts, self.raw.pair_weights = self._keep
        self.raw.x_bytes, self.raw.max_pairs = x_bytes, max_pairs
        self._sums: Floats = np.empty(0, np.float32)

    def filled(
        self,
        x: Any,
        dtype: Dtype,
        shape: tuple[int, int],
        pairs: LocalPairs,
        weights: Floats,
    ) -> DispatchBatch:
        """What a leader would send of rows that this node has routed itself.

        `x` is the memory of (rows, width) of `dtype`, `weights` are those of the routing,
        (rows, k). It is this object, or a larger one; both are overwritten by the next.
        """
        count, memory = len(pairs.rows), np.frombuffer(x, np.uint8)
        if memory.nbytes > self._x.nbytes or count > len(self._rows):
            larger = max(self._x.nbytes, memory.nbytes), max(len(self._rows), count)
            return DispatchBatch(*larger).filled(x, dtype, shape, pairs, weights)
        self._x[: memory.nbytes] = memory
        self._rows[:count], self._experts[:count] = pairs.rows, pairs.experts
        self._weights[:count] = weights[pairs.rows, pairs.slots]
        self.raw.rows, self.raw.width = shape
        self.raw.dtype, self.raw.pairs = int(dtype), count
        return self

    @property
    def rows(self) -> int:
        """How many tokens came."""
        return int(self.raw.rows)

    @property
    def width(self) -> int:
        """Elements per row: the hidden size that the experts see."""
        return int(self.raw.width)

    @property
    def busiest(self) -> int:
        """How many experts the rank with most of them computes, at most 255."""
        return int(self.raw.busiest)

    @property
    def dtype(self) -> Dtype:
        """The dtype of `x`."""
        return Dtype(self.raw.dtype)

    @property
    def digest(self) -> int:
        """The digest of the leader's routing."""
        return int(self.raw.digest)

    @property
    def x(self) -> npt.NDArray[Any]:
        """A view (rows * width,) of the rows, in numpy's equivalent of `dtype` (bf16: uint16)."""
        kind = _NUMPY[self.dtype]
        return self._x[: self.rows * self.width * self.dtype.itemsize].view(kind)

    def sums(self) -> Floats:
        """Memory for the partial sums, float32 (rows * width,), which all layers share."""
        size = self.rows * self.width
        if self._sums.size < size:
            self._sums = np.empty(size, np.float32)
        return self._sums[:size]

    def pairs(self) -> tuple[LocalPairs, Floats]:
        """The pairs, and their weights as float32 (rows, slots), zero where a slot is unused."""
        count = int(self.raw.pairs)
        rows = self._rows[:count]
        per_row = np.bincount(rows, minlength=self.rows)
        slots = np.arange(count) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        weights = np.zeros((self.rows, int(per_row.max(initial=0))), np.float32)
        weights[rows, slots] = self._weights[:count]
        return LocalPairs(rows, slots.astype(np.int32), self._experts[:count]), weights
