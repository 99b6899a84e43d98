"""Every endpoint, with a scripted model, beside published and our own descriptions of the APIs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.applications import Starlette

from tests.conftest import unused_port
from tests.server.serving import CHATML
from tests.unit.server.texts import Script, tokenizer
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import Sampling
from zmoe.server.app import make_app
from zmoe.server.front import Front, ServeConfig
from zmoe.server.link import EngineLink
from zmoe.server.messages import Logprobs, Output, Ready

READY = Ready(
    model_type="qwen3_moe",
    dtype="bfloat16",
    quantization="none",
    layers=2,
    moe_layers=2,
    experts=8,
    top_k=2,
    vocabulary=512,
    placement="even",
    placement_reason="",
    compute="C",
    context=4096,
    capacity=8192,
    load_seconds=1.0,
    nodes=(),
)
CALLS = '[{"name": "get_weather", "arguments": {"location": "Ulm"}}]'


class ScriptedLink(EngineLink):
    """An engine that says the same again and again, and makes a call where a grammar limits it."""

    def __init__(self) -> None:
        spec = ClusterSpec(1)
        super().__init__("m", spec, on_loading=lambda _: None, on_notice=lambda _: None)
        self.state, self.ready = "ready", READY
        tokens = tokenizer()
        self._text, self._calls = Script(tokens, "To be, or not."), Script(tokens, CALLS)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, **settings: Any
    ) -> AsyncGenerator[Output]:
        """See EngineLink."""
        script = self._calls if settings["grammar"] else self._text
        async for output in script.generate(prompt, sampling, **settings):
            wanted = sampling.logprobs is not None
            logprobs = (Logprobs(-1.0, ()),) * len(output.tokens) if wanted else ()
            yield Output(0, output.tokens, logprobs, output.finish, "", "", 0)


@pytest.fixture(scope="module")
def app() -> Starlette:
    tokens = tokenizer()
    tokens.chat_template, tokens.has_chat_template = CHATML, True
    return make_app(Front(ServeConfig(), "m", ScriptedLink(), tokens, created=0))


@pytest.fixture(scope="module")
def url(app: Starlette) -> Iterator[str]:
    port = unused_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < until and thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(60)


# Of llm-comply's tests: the model takes no images, and a request need not name it.
NOT_HERE = {"image-input", "error-handling"}


@pytest.mark.parametrize("form", ["open-responses", "openai-chat", "anthropic"])
def test_llm_comply(url: str, form: str) -> None:
    flags = ["--base-url", url, "--api-key", "none", "--model", "m", "--format", form, "--json"]
    program = "import sys, llm_comply.cli; sys.exit(llm_comply.cli.main())"
    command = [sys.executable, "-c", program, "run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    failed = {
        each["id"].removeprefix("chat-").removeprefix("anth-"): each["errors"]
        for each in results
        if each["status"] == "failed"
    }
    assert failed.keys() <= NOT_HERE, failed
    assert sum(each["status"] in ("passed", "warning") for each in results) >= 6


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def answers_of(operation: Any) -> set[tuple[int, str]]:
    """The status and the path of answers to generated requests, which have been checked."""
    seen: set[tuple[int, str]] = set()

    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "m"
        answer = case.call_and_validate(checks=CHECKS)
        seen.add((answer.status_code, operation.path))

    check()
    return seen


def test_requests_that_fit_the_description(app: Starlette) -> None:
    """None of them is an error of the server's, and all answers are described."""
    operations = schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()
    seen = set().union(*(answers_of(each.ok()) for each in operations))
    assert {200, 400, 404} <= {status for status, _ in seen} and len(seen) > 20
