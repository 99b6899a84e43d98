"""Strangers at every port of a running cluster: refused, the text unharmed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from tests.cluster.conftest import PATIENCE_S
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.messages import Cache, Failed, Join, encode
from zmoe.config import PROTOCOL_VERSION
from zmoe.exchange.keys import connect_with_token

TOKENS = 40


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster("zmoe-tiny", nodes=3) as running:
        yield running


def ports_of(cluster: Cluster) -> tuple[int, int, int]:
    """The leader's control, data and resend ports."""
    leader = cluster._leader
    assert leader is not None
    exchange = leader.node.exchange
    assert exchange is not None
    return leader.bus.port, exchange.endpoint.data_port, exchange.endpoint.control_port


class Strangers(threading.Thread):
    """Sends what does not belong to all ports until told to stop."""

    def __init__(self, control: int, data: int, resend: int) -> None:
        super().__init__()
        self._ports = (control, data, resend)
        self._halt = threading.Event()

    def run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        sockets = [
            self._dealer(context, port, identity, token)
            for port in self._ports
            for identity, token in ((b"zmoe-9", ""), (b"zmoe-1", "guess"), (None, "guess"))
        ]
        while not self._halt.is_set():
            for port in self._ports:
                self._garbage(port)
            for dealer in sockets:
                for frame in (
                    os.urandom(80),
                    b"",
                    encode(Join(PROTOCOL_VERSION, 9, "0", "stranger", "")),
                    encode(Join(PROTOCOL_VERSION, 1, "0", "stranger", "guess")),
                    encode(Failed("stranger", True, None, None, 0)),
                    encode(Cache(1)),
                ):
                    self._send(dealer, frame)
                self._send(dealer, b"a", b"b", b"c")
            self._halt.wait(0.01)
        context.destroy(linger=0)

    @staticmethod
    def _dealer(
        context: zmq.Context[Any], port: int, identity: bytes | None, token: str
    ) -> zmq.Socket[Any]:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.SNDHWM, 0)
        if identity is not None:
            dealer.setsockopt(zmq.ROUTING_ID, identity)
        if token:
            connect_with_token(dealer, token)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        return dealer

    @staticmethod
    def _send(dealer: zmq.Socket[Any], *parts: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # refused, or not yet connected
            dealer.send_multipart(parts, zmq.DONTWAIT)

    @staticmethod
    def _garbage(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as raw:
            raw.sendall(os.urandom(200))

    def stop(self) -> None:
        self._halt.set()
        self.join(PATIENCE_S)


def test_strangers_change_nothing(cluster: Cluster) -> None:
    calm = [token.id for token in cluster.generate("ROMEO:", max_tokens=TOKENS)]
    strangers = Strangers(*ports_of(cluster))
    strangers.start()
    try:
        disturbed = [token.id for token in cluster.generate("ROMEO:", max_tokens=TOKENS)]
        cluster.peak_memory()  # reads the control socket
    finally:
        strangers.stop()
    assert disturbed == calm
    leader = cluster._leader
    assert leader is not None
    assert leader._context.authenticator.refused == ["127.0.0.1, who has no token"]
    assert leader.bus.dropped == 0  # who is refused sends no message
