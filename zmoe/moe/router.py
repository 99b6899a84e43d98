"""Which (row, expert) pairs of a routing are this node's to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zmoe import native

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LocalPairs:
    """The local pairs of a routing, ordered by row.

    `rows`, `slots` (pairs,): the pair's row and its place among the row's k
    experts. `experts` (pairs,): the expert, as this node numbers its own.
    """

    rows: Ints
    slots: Ints
    experts: Ints

    def within(self, start: int, stop: int) -> LocalPairs:
        """Those of the rows [start, stop), which count from 0 then."""
        begin, end = np.searchsorted(self.rows, (start, stop))
        if (start, begin, end) == (0, 0, len(self.rows)):
            return self
        own = slice(begin, end)
        return LocalPairs(self.rows[own] - np.int32(start), self.slots[own], self.experts[own])


class Ownership:
    """One layer's map from expert ids to this node's own numbering."""

    def __init__(self, experts: int, owned: Sequence[int]) -> None:
        # The last entry, -1, stands for every id outside [0, experts).
        self.local: Ints = np.full(experts + 1, -1, np.int32)
        self.local[list(owned)] = np.arange(len(owned))

    def pairs(self, ids: Ints) -> LocalPairs:
        """The local pairs of `ids` (rows, k)."""
        known = np.where((ids >= 0) & (ids < len(self.local) - 1), ids, -1)
        local = self.local[known]
        rows, slots = np.nonzero(local >= 0)
        return LocalPairs(rows.astype(np.int32), slots.astype(np.int32), local[rows, slots])


def routing_digest(ids: Ints) -> int:
    """64 bits that equal ranks agree on: of the expert ids (rows, k), int32."""
    return native.digest(np.ascontiguousarray(ids))
