"""Where the time of a step goes: spans, in seconds, summed per name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


class Recorder(Protocol):
    """Is told, in every MoE layer and step, what was selected and what this node runs.

    `layer` is the ordinal of the MoE layer; `ids` (rows, k) the experts that
    the router selected, on whatever node they are, in memory that the next
    step reuses. Ascending expert ids: `assigned`, whose outputs this node
    computes; `executed`, those and the ones that its policy runs besides.
    """

    def __call__(self, layer: int, ids: Ints, assigned: Ints, executed: Ints) -> None: ...


class Spans:
    """Sums of wall time per span name.

    The names used on a token's way are `experts` (products of the local
    expert shards) and `exchange` (publish and collect), which don't nest; what
    is in neither is `other` to whoever knows the total. On the kernels also
    `products`: all of them, the experts' included.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The sums so far; starts again from zero."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
