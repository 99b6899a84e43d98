"""GET /metrics, for Prometheus: what the front measures, and what the engine tells of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zmoe import __version__
from zmoe.engine.counts import Counts
from zmoe.server.front import Front
from zmoe.server.link import EngineLink
from zmoe.server.messages import Ready, Stats
from zmoe.server.meters import Meters
from zmoe.server.openapi import operation

_DISCONNECTED = "disconnected"  # in place of a status: the client left before there was one


def routes(front: Front) -> list[Route]:
    """The endpoint."""
    registry = front.link.meters.registry
    registry.register(_Engine(front.link, front.model))
    ProcessCollector(namespace="zmoe_front", registry=registry)

    @operation("Metrics for Prometheus", produces="text/plain")
    async def metrics(request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=media_type)

    return [Route("/metrics", metrics)]


class CountRequests:
    """Middleware that counts the requests of each endpoint."""

    def __init__(self, app: ASGIApp, meters: Meters, routes: Sequence[BaseRoute]) -> None:
        self._app, self._requests = app, meters.http_requests
        self._paths: dict[object, str] = {
            route.endpoint: route.path for route in routes if isinstance(route, Route)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _DISCONNECTED

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            path = self._paths.get(scope.get("endpoint"), "none")
            self._requests.labels(path, status).inc()


class _Engine(Collector):
    """What the engine has told last. Its counters begin anew when it is started again."""

    def __init__(self, link: EngineLink, model: str) -> None:
        self._link, self._model = link, model

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        link = self._link
        yield _counter("engine_restarts", "Starts of the engine after its first", link.restarts)
        yield _gauge("ready", "1 while requests can run", float(link.state == "ready"))
        info = GaugeMetricFamily(
            "zmoe_info", "What is served: always 1", labels=["version", "model", "nodes"]
        )
        info.add_metric([__version__, self._model, str(link.spec.nodes)], 1)
        yield info
        if link.stats is not None and link.ready is not None:
            yield from _of_counts(link.stats.counts)
            yield from _of_exchange(link.stats.counts.exchange)
            yield from _of_nodes(link.ready, link.stats)
            yield from self._of_layers(link.ready.layers, link.stats.counts)

    def _of_layers(self, layers: int, counts: Counts) -> Iterator[Metric]:
        yield _gauge("layers", "Layers of the model", layers)
        yield _counter("steps", "Steps of the cluster", counts.steps)
        yield _counter("step_seconds", "Seconds that steps have taken", counts.step_seconds)
        whole = self._link.history.total(layers)
        parts = {} if whole is None else whole.layer_seconds
        described = "Mean seconds that a layer of a step has spent, by part"
        yield _gauge("layer_seconds", described, parts, "part")


Numbers = float | Mapping[str, float]


def _gauge(name: str, described: str, numbers: Numbers, label: str = "") -> Metric:
    return _filled(GaugeMetricFamily(f"zmoe_{name}", described, labels=_labels(label)), numbers)


def _counter(name: str, described: str, numbers: Numbers, label: str = "") -> Metric:
    return _filled(CounterMetricFamily(f"zmoe_{name}", described, labels=_labels(label)), numbers)


def _labels(label: str) -> list[str]:
    return [label] if label else []


def _filled(metric: GaugeMetricFamily | CounterMetricFamily, numbers: Numbers) -> Metric:
    """With one number, or with one for each value of its label."""
    if isinstance(numbers, Mapping):
        for value, number in numbers.items():
            metric.add_metric([value], number)
    else:
        metric.add_metric([], numbers)
    return metric


def _of_counts(counts: Counts) -> Iterator[Metric]:
    computed = counts.prompt_tokens - counts.cached_tokens
    by_source = {"computed": computed, "cache": counts.cached_tokens}
    yield _counter("prompt_tokens", "Tokens of prompts, by where from", by_source, "source")
    yield _counter("generated_tokens", "Tokens that were generated", counts.generated_tokens)
    yield _counter("drafted_tokens", "Tokens that were drafted", counts.drafted_tokens)
    yield _counter("accepted_tokens", "Drafted tokens that were right", counts.accepted_tokens)
    yield _counter("preemptions", "Sequences that made room for others", counts.preemptions)
    yield _gauge("requests_running", "Sequences that run", counts.running)
    yield _gauge("requests_waiting", "Sequences that wait", counts.waiting)
    yield _gauge("cache_blocks", "Blocks of keys and values", counts.blocks)
    used = counts.blocks - counts.blocks_available
    yield _gauge("cache_blocks_used", "Blocks that running sequences hold", used)


def _of_exchange(counters: Mapping[str, int]) -> Iterator[Metric]:
    """Those of the leader's exchange; none of a single node."""
    if not counters:
        return
    yield _counter("exchanges", "Exchanges among the nodes", counters["exchanges"])
    waited = counters["waited_us"] / 1e6
    yield _counter("exchange_wait_seconds", "Seconds that the leader waited for peers", waited)
    frames = {"sent": counters["frames_sent"], "received": counters["frames_received"]}
    yield _counter("exchange_frames", "Frames of the leader", frames, "direction")
    sizes = {"sent": counters["bytes_sent"], "received": counters["bytes_received"]}
    yield _counter("exchange_bytes", "Bytes of the leader's frames", sizes, "direction")
    resends = {kind: counters[f"resend_{kind}"] for kind in ("asked", "served", "unknown")}
    yield _counter("exchange_resends", "Frames asked for again, by outcome", resends, "kind")
    bad = {key[4:]: count for key, count in counters.items() if key.startswith("bad_")}
    yield _counter("exchange_bad_frames", "Frames that were dropped, by fault", bad, "fault")
    yield _counter("exchange_link_drops", "Links that broke", counters["link_drops"])
    yield _counter("exchange_link_returns", "Links that came back", counters["link_returns"])


def _of_nodes(ready: Ready, stats: Stats) -> Iterator[Metric]:
    ranks = [str(rank) for rank in range(len(ready.nodes))]
    experts = dict(zip(ranks, (node.experts for node in ready.nodes)))
    yield _gauge("node_experts", "Experts of a node, of all layers", experts, "rank")
    memory = dict(zip(ranks, stats.peak_memory))
    yield _gauge("node_peak_memory_bytes", "Peak resident memory of a node", memory, "rank")
    links = {rank: float(int(rank) in stats.links) for rank in ranks[1:]}
    yield _gauge("node_link_up", "1 while the leader's link to a node stands", links, "rank")
    lost = {rank: float(int(rank) in stats.lost) for rank in ranks[1:]}
    yield _gauge("node_lost", "1 while another node computes a node's share", lost, "rank")
    slow = {rank: float(int(rank) in stats.slow) for rank in ranks}
    yield _gauge("node_slow", "1 while the others wait for a node that is slow", slow, "rank")
    compute_s = {str(rank): spent for rank, spent in stats.step_seconds.items()}
    described = "Seconds that a node computes in a step, without its waits for others"
    yield _gauge("node_compute_seconds", described, compute_s, "rank")
