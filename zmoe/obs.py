"""Where the time of a step goes: spans, in seconds, summed per name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


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
