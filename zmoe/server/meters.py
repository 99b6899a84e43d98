"""What the front counts and times by itself: requests, first tokens, gaps between tokens."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Meters:
    """Those of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "zmoe_http_requests",
            "HTTP requests by path of the endpoint and status of the answer",
            ["endpoint", "status"],
            registry=registry,
        )
        self.generations = Counter(
            "zmoe_generations", "Texts by why they ended", ["reason"], registry=registry
        )
        self.prefix_hits = Counter(
            "zmoe_prefix_cache_hits",
            "Prompts that begin with tokens from the cache",
            registry=registry,
        )
        self.first_token = Histogram(
            "zmoe_time_to_first_token_seconds",
            "From when a prompt is given to the cluster until its first token",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.gap = Histogram(
            "zmoe_inter_token_latency_seconds",
            "Between two tokens of a text; tokens of one step share its time evenly",
            buckets=_GAP_S,
            registry=registry,
        )
        self.duration = Histogram(
            "zmoe_request_duration_seconds",
            "From when a prompt is given to the cluster until its text has ended",
            buckets=_REQUEST_S,
            registry=registry,
        )

    def begin(self) -> GenerationMeter:
        """What times a text that begins now."""
        return GenerationMeter(self)


class GenerationMeter:
    """Times one text."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._begun, self._last = time.monotonic(), 0.0

    def tokens(self, count: int, cached: int) -> None:
        """A step has given `count` tokens to a prompt of which `cached` needed no computing."""
        if count == 0:
            return
        now = time.monotonic()
        if not self._last:
            self._meters.first_token.observe(now - self._begun)
            self._meters.prefix_hits.inc(cached > 0)
            self._last, count = now, count - 1
        for _ in range(count):
            self._meters.gap.observe((now - self._last) / count)
        self._last = now

    def end(self, reason: str) -> None:
        """The text has ended."""
        self._meters.generations.labels(reason).inc()
        self._meters.duration.observe(time.monotonic() - self._begun)
