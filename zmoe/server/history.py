"""What the cluster has done of late: tokens per second, and where the time of its layers went."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from zmoe.engine.counts import Counts

_RECENT_S = 3.0


@dataclass(frozen=True)
class Interval:
    """What happened in `seconds`. `layer_seconds` are means of a layer of a step, by part:
    `experts` (matmuls), `wait` (for peers' frames), `exchange` (the rest of it: copying, adding
    up) and `other` (attention, router, sampling). Without a step it is empty.
    """

    seconds: float
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    layer_seconds: dict[str, float]


class History:
    """Remembers the counts of one engine: those of the last seconds, and the first ones."""

    def __init__(self) -> None:
        self._first: tuple[float, Counts] | None = None
        self._recent: deque[tuple[float, Counts]] = deque()

    def add(self, counts: Counts) -> None:
        """Those of now."""
        now = time.monotonic()
        self._first = self._first or (now, counts)
        self._recent.append((now, counts))
        while len(self._recent) > 2 and self._recent[1][0] <= now - _RECENT_S:
            self._recent.popleft()

    def recent(self, layers: int) -> Interval | None:
        """The last seconds of a model of so many layers; None before there are any."""
        return _between(self._recent[0], self._recent[-1], layers) if self._recent else None

    def total(self, layers: int) -> Interval | None:
        """All since the beginning; None before there is any."""
        return _between(self._first, self._recent[-1], layers) if self._first else None


def _between(old: tuple[float, Counts], new: tuple[float, Counts], layers: int) -> Interval:
    before, after = old[1], new[1]
    steps = after.steps - before.steps
    return Interval(
        seconds=new[0] - old[0],
        steps=steps,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        cached_tokens=after.cached_tokens - before.cached_tokens,
        generated_tokens=after.generated_tokens - before.generated_tokens,
        layer_seconds=_layer_seconds(before, after, steps * layers) if steps else {},
    )


def _layer_seconds(before: Counts, after: Counts, times: int) -> dict[str, float]:
    experts, exchange = (
        after.spans.get(name, 0.0) - before.spans.get(name, 0.0) for name in ("experts", "exchange")
    )
    waited = 1e-6 * (after.exchange.get("waited_us", 0) - before.exchange.get("waited_us", 0))
    wait = min(waited, exchange)  # some is for what is no layer: measuring the links
    other = after.step_seconds - before.step_seconds - experts - exchange
    parts = {"experts": experts, "exchange": exchange - wait, "wait": wait, "other": other}
    return {part: max(0.0, seconds) / times for part, seconds in parts.items()}
