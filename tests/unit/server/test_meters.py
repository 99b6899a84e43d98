"""What is counted and timed, by a clock that the tests turn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Scope

from zmoe.engine.counts import Counts
from zmoe.server import history, meters
from zmoe.server.history import History
from zmoe.server.meters import Meters
from zmoe.server.metrics import CountRequests


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(history, "time", clock)
    yield clock


def value(of: Meters, name: str, **labels: str) -> float | None:
    return of.registry.get_sample_value(f"zmoe_{name}", labels)


def test_a_text_is_timed(clock: Clock) -> None:
    found = Meters()
    meter = found.begin()
    clock.now += 0.5
    meter.tokens(0, 0)  # a step of the prompt
    clock.now += 0.25
    meter.tokens(1, 64)
    clock.now += 0.3
    meter.tokens(3, 64)  # with two drafts that were right
    clock.now += 0.1
    meter.end("stop")
    assert value(found, "time_to_first_token_seconds_sum") == pytest.approx(0.75)
    assert value(found, "inter_token_latency_seconds_count") == 3
    assert value(found, "inter_token_latency_seconds_sum") == pytest.approx(0.3)
    assert value(found, "inter_token_latency_seconds_bucket", le="0.1") == 3
    assert value(found, "inter_token_latency_seconds_bucket", le="0.05") == 0
    assert value(found, "request_duration_seconds_sum") == pytest.approx(1.15)
    assert value(found, "generations_total", reason="stop") == 1
    assert value(found, "prefix_cache_hits_total") == 1


def test_a_first_step_of_several_tokens_has_gaps_of_nothing(clock: Clock) -> None:
    found = Meters()
    meter = found.begin()
    clock.now += 1.0
    meter.tokens(2, 0)
    assert value(found, "time_to_first_token_seconds_sum") == 1.0
    assert value(found, "inter_token_latency_seconds_count") == 1
    assert value(found, "inter_token_latency_seconds_sum") == 0.0
    assert value(found, "prefix_cache_hits_total") == 0


def test_a_text_that_never_began(clock: Clock) -> None:
    found = Meters()
    found.begin().end("queue_full")
    assert value(found, "time_to_first_token_seconds_count") == 0
    assert value(found, "generations_total", reason="queue_full") == 1


def counts(steps: int, **others: object) -> Counts:
    known = dict.fromkeys(Counts.__annotations__, 0) | {"step_seconds": 0.0, "steps": steps}
    return Counts(**{**known, "spans": {}, "exchange": {}, **others})  # type: ignore[arg-type]


def after(steps: int, waited_us: int = 600_000) -> Counts:
    """Of steps that took a second in all, as the first ones did."""
    return counts(
        steps,
        generated_tokens=5 * steps,
        prompt_tokens=30 * steps,
        cached_tokens=20 * steps,
        step_seconds=1.0,
        spans={"experts": 0.2, "exchange": 0.7, "matmuls": 0.25},
        exchange={"waited_us": waited_us},
    )


def test_where_the_time_of_a_layer_went(clock: Clock) -> None:
    known = History()
    assert known.recent(2) is None and known.total(2) is None
    known.add(counts(0, exchange={"waited_us": 100_000}))  # of the warm-up, say
    clock.now += 2.0
    known.add(after(10))
    found = known.recent(layers=2)
    assert found is not None
    assert (found.seconds, found.steps, found.generated_tokens) == (2.0, 10, 50)
    assert (found.prompt_tokens, found.cached_tokens) == (300, 200)
    expected = {"experts": 0.01, "exchange": 0.01, "wait": 0.025, "other": 0.005}
    assert found.layer_seconds == pytest.approx(expected)
    assert sum(found.layer_seconds.values()) * 10 * 2 == pytest.approx(1.0)


def test_an_exchange_is_no_shorter_than_its_wait(clock: Clock) -> None:
    known = History()
    known.add(counts(0))
    known.add(after(10, waited_us=5_000_000))
    found = known.total(layers=1)
    assert found is not None
    assert found.layer_seconds["exchange"] == 0.0
    assert found.layer_seconds["wait"] == pytest.approx(0.07)


def test_what_is_long_ago_is_not_recent(clock: Clock) -> None:
    known = History()
    for second in range(60):
        clock.now += 1.0
        known.add(after(10) if second else counts(0))
    recent, whole = known.recent(1), known.total(1)
    assert recent is not None and whole is not None
    assert 2.0 <= recent.seconds <= 5.0
    assert (recent.steps, recent.generated_tokens, recent.layer_seconds) == (0, 0, {})
    assert (whole.seconds, whole.steps) == (59.0, 10)


def test_requests_are_counted_by_endpoint_and_status() -> None:
    async def answer(request: Request) -> Response:
        if request.path_params["name"] == "bad":
            raise RuntimeError
        return PlainTextResponse("well", 201)

    found, routes = Meters(), [Route("/one/{name:path}", answer)]
    app = CountRequests(Starlette(routes=routes), found, routes)

    def ask(path: str, method: str = "GET") -> None:
        scope: Scope = {"type": "http", "path": path, "method": method, "headers": []}
        scope |= {"query_string": b"", "root_path": ""}

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None: ...

        with suppress(RuntimeError):
            asyncio.run(app(scope, receive, send))

    for path in ("/one/a", "/one/b", "/one/bad", "/two", "/no/such"):
        ask(path)
    ask("/one/a", method="BREW")
    ask("/one/a", method="ANYTHING")
    samples = {
        (sample.labels["endpoint"], sample.labels["status"]): sample.value
        for metric in found.registry.collect()
        if metric.name == "zmoe_http_requests"
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert samples == {
        ("/one/{name:path}", "201"): 2,
        ("/one/{name:path}", "405"): 2,
        ("/one/{name:path}", "500"): 1,
        ("none", "404"): 2,
    }
