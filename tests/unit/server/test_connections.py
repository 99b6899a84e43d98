"""Connections that dawdle are ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from tests.conftest import unused_port
from zmoe.server import connections
from zmoe.server.connections import BoundedProtocol
from zmoe.server.front import ServeConfig
from zmoe.server.run import _listen

PATIENCE_S = 30.0
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers /; sends without end otherwise, until the client has gone."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/":
        await send({"type": "http.response.body", "body": b"well"})
        return
    await receive()  # the request
    gone = asyncio.ensure_future(receive())
    while not gone.done():
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        await asyncio.sleep(0)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Where a server of a few connections with short patience answers."""
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    monkeypatch.setattr(connections, "STALLED_S", 0.5)
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        endless,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def is_ended(client: socket.socket) -> bool:
    """Whether the server ends the connection within our patience; reads nothing before."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", REQUEST[:-2]], ids=["nothing", "half a request"])
def test_without_a_request_it_is_ended(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address, PATIENCE_S) as client:
        client.sendall(sent)
        assert is_ended(client)


def test_after_a_request_half_another_one_ends_it(address: tuple[str, int]) -> None:
    with socket.create_connection(address, PATIENCE_S) as client:
        client.sendall(REQUEST)
        while b"well" not in client.recv(4096):
            pass
        client.sendall(REQUEST[:-2])
        while client.recv(4096):
            pass


def test_who_reads_nothing_is_ended(address: tuple[str, int]) -> None:
    with socket.create_connection(address, PATIENCE_S) as client:
        client.sendall(REQUEST.replace(b"GET /", b"GET /endless"))
        client.settimeout(PATIENCE_S)
        time.sleep(2)  # far longer than the server waits
        until = time.monotonic() + PATIENCE_S
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1 << 20):
                assert time.monotonic() < until


def test_too_many_are_ended(address: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_connection(address, PATIENCE_S))
        for _ in range(2):
            stack.enter_context(socket.create_connection(address, PATIENCE_S))
        time.sleep(0.1)
        assert is_ended(stack.enter_context(socket.create_connection(address, PATIENCE_S)))
        first.sendall(REQUEST)
        assert first.recv(4096).startswith(b"HTTP/1.1 200")


def test_what_follows_a_head_does_not_wait_for_the_client() -> None:
    with (
        _listen(ServeConfig(http_port=unused_port())) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
