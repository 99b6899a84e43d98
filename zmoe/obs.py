"""Records of a step: spans of wall time in seconds per name, and the experts that ran."""

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
    """A callback for each MoE layer of each step: what was selected, and what this node runs.

    `layer` is the ordinal of the MoE layer. `ids` (tokens, k), int32, are the experts that
    the router selected, on any node; the next step reuses their memory. `assigned` and
    `executed` are ascending expert ids, int32: those whose outputs this node computes, and
    those together with the ones that its policy runs besides.
    """

    def __call__(self, layer: int, ids: Ints, assigned: Ints, executed: Ints) -> None: ...


class Spans:
    """Sums of wall time per span name.

    A step records `experts` (matmuls of the local experts) and `exchange` (publish and
    collect), which do not overlap; the rest of the step is called `other`. With the CPU
    kernels it also records `matmuls`: the time of all matmuls, those of the experts included.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """A span that was measured elsewhere."""
        self.seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Return the sums so far, in seconds, and reset them to zero."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
