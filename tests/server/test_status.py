"""What a server tells of itself: /metrics, /v1/cluster, /openapi.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import openapi_spec_validator
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.server.serving import Server

PATIENCE_S = 30.0
BODY = {"messages": [{"role": "user", "content": "KING"}], "temperature": 0, "max_tokens": 12}


def metrics(server: Server) -> dict[tuple[str, str], float]:
    """(name, labels) -> value; the parser is strict about names, types and order."""
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = httpx.get(f"{server.url}/metrics", headers=headers).text
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("zmoe_") and family.documentation, family
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name, labels] = sample.value
    return found


def cluster(server: Server) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/v1/cluster").json())


def chat(server: Server, **fields: object) -> httpx.Response:
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json={**BODY, **fields}, timeout=60)


def eventually(happens: Callable[[], bool]) -> None:
    """Wait until it does: the engine tells its state every second."""
    until = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.1)


def grown(server: Server, before: dict[tuple[str, str], float], name: str, labels: str = "") -> int:
    key = (f"zmoe_{name}", labels)
    return int(metrics(server).get(key, 0) - before.get(key, 0))


def test_tokens_and_times_are_counted(server: Server) -> None:
    eventually(lambda: cluster(server).get("queue", {}).get("running") == 0)
    time.sleep(1.5)  # what others have generated last is told by then
    before = metrics(server)
    usage = chat(server, ignore_eos=True).json()["usage"]
    assert usage["completion_tokens"] == 12
    eventually(lambda: grown(server, before, "generated_tokens_total") == 12)
    prompts = [
        grown(server, before, "prompt_tokens_total", f"source={source}")
        for source in ("computed", "cache")
    ]
    assert sum(prompts) == usage["prompt_tokens"]
    assert prompts[1] == usage["prompt_tokens_details"]["cached_tokens"]
    assert grown(server, before, "time_to_first_token_seconds_count") == 1
    assert grown(server, before, "inter_token_latency_seconds_count") == 11
    assert grown(server, before, "request_duration_seconds_count") == 1
    assert grown(server, before, "generations_total", "reason=length") == 1
    labels = "endpoint=/v1/chat/completions,status=200"
    assert grown(server, before, "http_requests_total", labels) == 1
    assert 1 <= grown(server, before, "steps_total") <= 13
    assert grown(server, before, "exchanges_total") >= 4 * grown(server, before, "steps_total")


def test_who_leaves_is_counted(server: Server) -> None:
    before = metrics(server)
    body = {**BODY, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    eventually(lambda: grown(server, before, "generations_total", "reason=cancelled") == 1)
    eventually(lambda: metrics(server)["zmoe_requests_running", ""] == 0)


def test_who_leaves_before_the_answer_is_counted(server: Server) -> None:
    before = metrics(server)
    with pytest.raises(httpx.ReadTimeout):
        url, body = f"{server.url}/v1/chat/completions", {**BODY, "max_tokens": 900}
        httpx.post(url, json={**body, "ignore_eos": True}, timeout=httpx.Timeout(60, read=0.05))
    labels = "endpoint=/v1/chat/completions,status=499"
    eventually(lambda: grown(server, before, "http_requests_total", labels) == 1)


def test_refusals_are_counted(server: Server) -> None:
    before = metrics(server)
    assert chat(server, temperature=-1).status_code == 400
    assert httpx.get(f"{server.url}/no/such").status_code == 404
    refused = httpx.get(f"{server.url}/v1/chat/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    labels = "endpoint=/v1/chat/completions,status=400"
    assert grown(server, before, "http_requests_total", labels) == 1
    assert grown(server, before, "http_requests_total", "endpoint=none,status=404") == 1


def test_the_state_of_the_cluster_as_metrics(server: Server) -> None:
    eventually(lambda: ("zmoe_cache_blocks", "") in metrics(server))
    found = metrics(server)
    assert found["zmoe_ready", ""] == 1
    assert found["zmoe_engine_restarts_total", ""] == 0
    assert found["zmoe_layers", ""] == 4
    assert found["zmoe_node_experts", "rank=0"] + found["zmoe_node_experts", "rank=1"] == 4 * 16
    assert found["zmoe_node_link_up", "rank=1"] == 1
    for rank in (0, 1):
        assert 1 << 20 < found["zmoe_node_peak_memory_bytes", f"rank={rank}"] < 1 << 33
    assert found["zmoe_exchange_resends_total", "kind=asked"] >= 0
    assert found["zmoe_exchange_wait_seconds_total", ""] > 0


def test_the_cluster(server: Server) -> None:
    chat(server)
    eventually(lambda: cluster(server).get("counts", {}).get("steps", 0) > 0)
    found = cluster(server)
    assert found["status"] == "ready" and found["reason"] is None and found["restarts"] == 0
    model = found["model"]
    assert (model["id"], model["type"], model["dtype"]) == ("zmoe-tiny", "dbrx", "float32")
    assert (model["layers"], model["experts"], model["top_k"]) == (4, 16, 4)
    assert found["placement"]["name"] and found["placement"]["reason"]
    assert found["schedule"] == "decentralized" and found["wire_dtype"] == "float32"
    nodes = found["nodes"]
    assert [node["rank"] for node in nodes] == [0, 1]
    assert [node["role"] for node in nodes] == ["leader", "worker"]
    assert [node["link"] for node in nodes] == [None, "up"]
    assert sum(node["experts"] for node in nodes) == 4 * 16
    assert sum(node["expert_share"] for node in nodes) == 1
    ports = [port for node in nodes for port in node["listens"]]
    assert [len(node["listens"]) for node in nodes] == [3, 2]
    assert not found["encrypted"]
    assert len(set(ports)) == 5 and all(1024 <= port < 65536 for port in ports)
    assert found["queue"]["parallel"] == 32
    assert 0 <= found["cache"]["used"] <= found["cache"]["blocks"]
    whole, counts = found["total"], found["counts"]
    assert set(whole["layer_us"]) == {"experts", "exchange", "wait", "other"}
    assert all(part >= 0 for part in whole["layer_us"].values())
    spent_s = 1e-6 * sum(whole["layer_us"].values()) * whole["steps"] * model["layers"]
    assert spent_s == pytest.approx(counts["step_seconds"], rel=0.05)


def test_a_slow_node_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "KING", "temperature": 0.8, "seed": 5, "max_tokens": 30, "ignore_eos": True}

    def text(of: Server) -> str:
        answer = httpx.post(f"{of.url}/v1/completions", json=body, timeout=60)
        return str(answer.json()["choices"][0]["text"])

    def is_named() -> bool:
        assert text(slow) == whole
        return bool(cluster(slow)["nodes"][1]["slow"])

    whole = text(server)
    monkeypatch.setenv("ZMOE_FAIL", "1.before-step=sleep:0.1")
    slow = Server("--nodes", "2", "--speculate", "off")
    try:
        slow.wait_until_ready()
        eventually(is_named)
        leader, worker = cluster(slow)["nodes"]
        assert worker["slow"].startswith("it computes ") and leader["slow"] is None
        assert worker["compute_ms"] > leader["compute_ms"] > 0
        assert (worker["link"], worker["computed_by"], slow.health()) == ("up", 1, "ready")
        found = metrics(slow)
        assert [found["zmoe_node_slow", f"rank={rank}"] for rank in (0, 1)] == [0, 1]
        assert found["zmoe_node_compute_seconds", "rank=1"] > 0.1
    finally:
        code, said = slow.end()
    assert code == 0 and said.count("\n") == 1 and "node 1 is slow: it computes " in said


def test_every_endpoint_is_described(server: Server) -> None:
    found = httpx.get(f"{server.url}/openapi.json").json()
    expected = {
        "/",
        "/health",
        "/metrics",
        "/openapi.json",
        "/tokenize",
        "/detokenize",
        "/v1/chat/completions",
        "/v1/cluster",
        "/v1/completions",
        "/v1/models",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models/{name}",
        "/v1/responses",
        "/v1/responses/{id}",
    }
    assert expected <= set(found["paths"])
    for path, operations in found["paths"].items():
        for method in operations:
            answer = httpx.request(method, f"{server.url}{path.replace('{name}', 'zmoe-tiny')}")
            known = (200, 400, 404) if "{id}" in path else (200, 400)
            assert answer.status_code in known, (method, path)
    wanted = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    name = wanted["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert found["components"]["schemas"][name]["required"] == ["messages"]


def test_the_description_is_valid(server: Server) -> None:
    openapi_spec_validator.validate(httpx.get(f"{server.url}/openapi.json").json())
