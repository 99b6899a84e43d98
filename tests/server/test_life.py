"""How a server begins, ends, and lives on when parts of it die."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.serving import END_S, Server
from zmoe.cli.serve import main

BODY = {"messages": [{"role": "user", "content": "KING"}], "temperature": 0, "max_tokens": 8}
LONG = {**BODY, "max_tokens": 900, "stream": True}
NAMES = {"type": "object", "properties": {"name": {"type": "string", "minLength": 300}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "names", "schema": NAMES}}
STREAMS: list[dict[str, Any]] = [
    {**LONG, "temperature": 0.8, "seed": 5, "frequency_penalty": 0.1, "ignore_eos": True},
    {**LONG, "temperature": 0.8, "seed": 6, "response_format": SCHEMA},
    {**LONG, "temperature": 0, "logprobs": True, "ignore_eos": True},
]


@contextmanager
def two_nodes(*flags: str) -> Iterator[Server]:
    server = Server("--nodes", "2", *flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end(signal.SIGKILL)


@pytest.fixture
def own() -> Iterator[Server]:
    """A server of two nodes that the test ends."""
    with two_nodes() as server:
        yield server


@pytest.fixture(scope="module")
def lasting() -> Iterator[Server]:
    """A server of two nodes that comes back from what a test does to it."""
    with two_nodes("--keep-alive", "1000") as server:
        yield server


def ask(server: Server) -> str:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


class Reader(threading.Thread):
    """Reads a long answer in a thread of its own."""

    def __init__(self, server: Server, body: Mapping[str, Any] = LONG) -> None:
        super().__init__(daemon=True)
        self.events: list[str] = []
        self.begun = threading.Event()
        self._server, self._body = server, body
        self.start()
        assert self.begun.wait(60)

    def run(self) -> None:
        url = f"{self._server.url}/v1/chat/completions"
        cut = suppress(httpx.RemoteProtocolError)  # `events` shows where
        with cut, httpx.stream("POST", url, json=self._body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                    self.begun.set()

    def choices(self) -> list[Any]:
        """The choices of all events of an answer that has ended well."""
        self.join(120)
        assert self.events[-1] == "[DONE]", self.events[-1]
        return [json.loads(event)["choices"] for event in self.events[:-1]]

    def text(self) -> str:
        return "".join(each[0]["delta"].get("content") or "" for each in self.choices())


def wait_for_end(server: Server) -> None:
    """Until none of its processes is there."""
    until = time.monotonic() + END_S
    while server.processes():
        assert time.monotonic() < until, server.processes()
        time.sleep(0.05)


def engine_of(server: Server) -> int | None:
    """The process of the engine, None while there is none."""
    engines = [pid for pid, line in server.processes().items() if "spawn_main" in line]
    return engines[0] if engines else None


def test_it_ends_well_and_lets_running_requests_end(own: Server) -> None:
    reader = Reader(own)
    assert own.end() == (0, "")
    reader.join(60)
    assert reader.events[-1] == "[DONE]"
    assert json.loads(reader.events[-2])["choices"][0]["finish_reason"] == "length"
    wait_for_end(own)


def test_a_second_signal_drops_running_requests(own: Server) -> None:
    reader = Reader(own)
    own.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    code, _ = own.end(signal.SIGINT)
    reader.join(60)
    assert code == 0
    wait_for_end(own)


def test_nothing_outlives_a_front_that_is_killed(own: Server) -> None:
    Reader(own)
    assert own.end(signal.SIGKILL)[0] == -signal.SIGKILL
    wait_for_end(own)


def wanted(server: Server) -> list[str]:
    """The texts of STREAMS while nothing dies."""
    return [Reader(server, body).text() for body in STREAMS]


def node_of(server: Server) -> int:
    """The process of its only worker."""
    (node,) = [pid for pid, line in server.processes().items() if "zmoe.cli.node" in line]
    return node


def test_streams_go_on_when_the_engine_is_killed(lasting: Server) -> None:
    before, texts = ask(lasting), wanted(lasting)
    readers = [Reader(lasting, body) for body in STREAMS]
    engine, node = engine_of(lasting), node_of(lasting)
    assert engine is not None
    os.kill(engine, signal.SIGKILL)
    while lasting.health() == "ready":
        time.sleep(0.01)
    refused = httpx.post(f"{lasting.url}/v1/chat/completions", json=BODY)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    lasting.wait_for("ready")
    assert [reader.text() for reader in readers] == texts
    assert engine_of(lasting) != engine
    assert ask(lasting) == before
    assert node_of(lasting) == node
    said = lasting.process.stderr
    assert said is not None
    line = "zmoe-serve: node 1: the weights of the run before were still loaded\n"
    assert line in iter(said.readline, "")


@pytest.mark.parametrize("busy", [True, False])
def test_a_node_that_is_killed_is_missed_by_nobody(lasting: Server, busy: bool) -> None:
    before, texts = ask(lasting), wanted(lasting) if busy else []
    engine = engine_of(lasting)
    readers = [Reader(lasting, body) for body in STREAMS] if busy else []
    os.kill(node_of(lasting), signal.SIGKILL)
    lasting.wait_for("degraded")
    assert httpx.get(f"{lasting.url}/health").json()["reason"] == (
        "node 1 is lost, and node 0 computes its share"
    )
    status = httpx.get(f"{lasting.url}/v1/cluster").json()
    assert [(each["link"], each["computed_by"]) for each in status["nodes"]] == [
        (None, 0),
        ("lost", 0),
    ]
    assert ask(lasting) == before
    assert [reader.text() for reader in readers] == texts
    lasting.wait_for("ready")  # another process has taken its place
    status = httpx.get(f"{lasting.url}/v1/cluster").json()
    assert [each["computed_by"] for each in status["nodes"]] == [0, 1]
    assert engine_of(lasting) == engine
    assert ask(lasting) == before


def test_nothing_outlives_a_server_that_is_killed(lasting: Server) -> None:
    engine = engine_of(lasting)
    assert engine is not None
    os.kill(engine, signal.SIGKILL)
    assert lasting.end(signal.SIGKILL)[0] == -signal.SIGKILL
    wait_for_end(lasting)


def failing(*flags: str, port: int | None = None) -> tuple[int, str]:
    server = Server(*flags, port=port)
    try:
        code = server.process.wait(END_S)
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""
        return code, server.end()[1]
    finally:
        server.process.kill()


def test_a_port_in_use_is_named(free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        code, said = failing(port=free_port)
    line = f"zmoe-serve: cannot listen on 127.0.0.1:{free_port}: Address already in use\n"
    assert (code, said) == (2, line)


def test_files_that_cannot_be_used_are_named(
    free_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("no certificate\n")
    file.chmod(0o644)
    for flags, words in (
        (("--ssl-certfile", str(tmp_path / "no")), f"{tmp_path}/no cannot be read"),
        (("--ssl-certfile", str(file)), f"{file} cannot be used for TLS"),
        (("--ssl-keyfile", str(file)), "--ssl-keyfile is for a certificate"),
        (("--api-key-file", str(file)), f"{file} can be read by everyone"),
        (("--chat-template", str(tmp_path / "no")), f"{tmp_path}/no cannot be read"),
        (("--model", str(tmp_path / "no")), f"model {tmp_path}/no: no such folder"),
    ):
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            code = main(["--port", str(free_port), *flags])
        finally:
            signal.signal(signal.SIGTERM, on_terminate)
        printed, said = capsys.readouterr()
        assert (code, printed) == (2, "")
        assert words in said
        assert said.count("\n") == 1


def test_a_node_that_cannot_start_ends_the_command() -> None:
    code, said = failing("--nodes", "2", "--join-timeout", "0.01")
    assert code == 2
    assert "node 1" in said.splitlines()[-1]
