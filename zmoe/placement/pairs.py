"""The (row, expert) pairs of a routing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zmoe import native

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def no_experts() -> Ints:
    """No padding."""
    return np.empty(0, np.int32)


@dataclass(frozen=True)
class LocalPairs:
    """The local pairs of a routing, ordered by row.

    `rows`, `slots` (pairs,): the pair's row and its place among the row's k
    experts. `experts` (pairs,): the expert, as this node numbers its own.
    `padding`: more of its experts, to be run on no row of the routing.
    """

    rows: Ints
    slots: Ints
    experts: Ints
    padding: Ints = field(default_factory=no_experts)

    def within(self, start: int, stop: int) -> LocalPairs:
        """Those of the rows [start, stop), which count from 0 then; the first have the padding."""
        begin, end = np.searchsorted(self.rows, (start, stop))
        if (start, begin, end) == (0, 0, len(self.rows)):
            return self
        own = slice(begin, end)
        padding = self.padding if start == 0 else no_experts()
        rows = self.rows[own] - np.int32(start)
        return LocalPairs(rows, self.slots[own], self.experts[own], padding)


def routing_digest(ids: Ints) -> int:
    """64 bits that equal ranks agree on: of the expert ids (rows, k), int32."""
    return native.digest(np.ascontiguousarray(ids))
