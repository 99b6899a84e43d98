"""How long a step takes by its number of rows, as measured."""

from __future__ import annotations

FADE = 0.3  # what the newest measurement weighs against those before it
MEMORY = 256  # measurements after which one of a neighbouring number of rows no longer counts


class Rates:
    """Seconds per step over its rows: straight lines between the means of powers of two.

    Below the fewest rows measured a step takes as long as with those; beyond the most it
    takes in proportion, which is too long: so a larger step is tried bit by bit.
    """

    def __init__(self) -> None:
        self._count = 0
        # By the bit length of the rows: mean rows, mean seconds, number of the last measurement.
        self._means: dict[int, tuple[float, float, int]] = {}
        self._points: list[tuple[float, float]] = []

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` took `seconds`."""
        self._count += 1
        seconds = max(seconds, 1e-6)
        key = rows.bit_length()
        mean_rows, mean_seconds, _ = self._means.get(key, (rows, seconds, 0))
        self._means[key] = (
            mean_rows + FADE * (rows - mean_rows),
            mean_seconds + FADE * (seconds - mean_seconds),
            self._count,
        )
        self._points = []
        slowest = 0.0
        for _, (mean_rows, mean_seconds, last) in sorted(self._means.items()):
            if self._count - last < MEMORY:
                slowest = max(slowest, mean_seconds)
                self._points.append((mean_rows, slowest))

    def seconds(self, rows: float) -> float | None:
        """What a step of `rows` will take; None before any measurement."""
        if not self._points:
            return None
        below, before = self._points[0][0], self._points[0][1]
        for above, after in self._points:
            if rows <= above:
                share = (rows - below) / (above - below) if rows > below else 1.0
                return before + share * (after - before)
            below, before = above, after
        return before * rows / below

    def rows(self, seconds: float) -> int:
        """The most rows whose step will stay within `seconds`; 0 before any measurement."""
        if not self._points or seconds < self._points[0][1]:
            return 0
        below, before = self._points[0]
        for above, after in self._points:
            if after > seconds:
                return int(below + (seconds - before) / (after - before) * (above - below))
            below, before = above, after
        return int(below * seconds / before)
