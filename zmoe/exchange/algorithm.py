"""Which algorithm an exchange takes, and in how many micro-batches: the same on every rank.

"direct" is the one-shot all-reduce, "scatter" reduce-scatter + all-gather. The
choice follows from what rank 0 has measured and sent to the others, so that all
ranks choose alike without talking.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from zmoe.errors import InputError
from zmoe.native import Algorithm

ALGORITHMS = ("auto", "direct", "scatter")
SMALL_BYTES, LARGE_BYTES = 16 << 10, 1 << 20  # payloads that are measured
_ROUNDS = 5
_FEWEST_BYTES = 128  # of a chunk: one block of float32
# The experts read their weights once per micro-batch, which costs nothing that could
# be measured at this many rows; a shorter exchange leaves little to hide.
_PART_ROWS, _MOST_PARTS = 64, 4
_PART_US = 2000.0


@dataclass(frozen=True)
class Line:
    """Microseconds of an exchange of n bytes: `start` + n * `per_byte`."""

    start: float
    per_byte: float

    def at(self, size: float) -> float:
        """Microseconds of an exchange of `size` bytes."""
        return self.start + size * self.per_byte


def line_through(first: tuple[int, float], second: tuple[int, float]) -> Line:
    """The line through two (bytes, microseconds), the smaller payload first."""
    slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
    return Line(max(0.0, first[1] - slope * first[0]), slope)


def crossover(direct: Line, scatter: Line) -> float:
    """The payload bytes from which `scatter` is the faster one; infinity for never.

    Not below SMALL_BYTES, where the lines say little, and never for a gain at
    LARGE_BYTES that may be chance.
    """
    if scatter.at(LARGE_BYTES) > 0.9 * direct.at(LARGE_BYTES):
        return math.inf
    if scatter.at(SMALL_BYTES) <= direct.at(SMALL_BYTES):
        return SMALL_BYTES
    return (scatter.start - direct.start) / (direct.per_byte - scatter.per_byte)


class Choice:
    """Chooses for exchanges among `nodes` ranks.

    `algorithm` "auto" is direct until `learn`. `parts` fixes the number of
    micro-batches of every exchange that may be split; 0: by what was learnt. Raises
    InputError for an `algorithm` that is unknown.
    """

    def __init__(self, nodes: int, algorithm: str = "auto", parts: int = 0) -> None:
        if algorithm not in ALGORITHMS:
            raise InputError(f"algorithm is {algorithm}: expected {' or '.join(ALGORITHMS)}")
        self.nodes, self._named = nodes, algorithm
        # Among two, scatter moves as many bytes in more messages.
        self._auto, self._parts = algorithm == "auto" and nodes > 2, parts
        self.scatter_from: float = _FEWEST_BYTES * nodes if algorithm == "scatter" else math.inf
        self.may_scatter = self._auto or algorithm == "scatter"
        self._lines: tuple[Line, Line] | None = None

    def among(self, nodes: int) -> Choice:
        """The same of so many ranks, with nothing learnt."""
        return Choice(nodes, self._named, self._parts)

    @property
    def figures(self) -> tuple[float, ...]:
        """What was learnt, as numbers: start and slope of both lines; empty for nothing."""
        return tuple(n for line in self._lines or () for n in (line.start, line.per_byte))

    def algorithm(self, size: int) -> Algorithm:
        """The algorithm for a payload of `size` bytes."""
        return Algorithm.SCATTER if size >= self.scatter_from else Algorithm.DIRECT

    def learn(self, direct: Line, scatter: Line) -> None:
        """Go by these figures, which are rank 0's."""
        self._lines = (direct, scatter)
        if self._auto:
            self.scatter_from = crossover(direct, scatter)

    def bounds(self, rows: int, size: int) -> list[tuple[int, int]]:
        """(start, stop) of each micro-batch of `rows` rows whose payload has `size` bytes."""
        parts = max(1, min(rows, self._parts) if self._parts else self._worthwhile(rows, size))
        return [(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]

    def _worthwhile(self, rows: int, size: int) -> int:
        if self._lines is None or self._lines[self.algorithm(size)].at(size) < _PART_US:
            return 1
        return min(_MOST_PARTS, rows // _PART_ROWS)


def measure(
    exchange_us: Callable[[int, Algorithm], float], max_bytes: int, may_scatter: bool
) -> tuple[Line, Line] | None:
    """The lines of `direct` and `scatter`; that of `direct` twice unless `may_scatter`.

    `exchange_us(bytes, algorithm)` runs one exchange, on all ranks alike. None where
    payloads are so small that there is nothing to choose.
    """
    sizes = (SMALL_BYTES, min(LARGE_BYTES, max_bytes // 4 * 4))
    if sizes[1] < 2 * sizes[0]:
        return None

    def points(algorithm: Algorithm) -> list[tuple[int, float]]:
        for size in sizes:
            exchange_us(size, algorithm)  # the first one pays for what is new
        return [
            (size, statistics.median(exchange_us(size, algorithm) for _ in range(_ROUNDS)))
            for size in sizes
        ]

    direct = line_through(*points(Algorithm.DIRECT))
    return direct, line_through(*points(Algorithm.SCATTER)) if may_scatter else direct
