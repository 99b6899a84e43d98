"""The relay that other tests put into links."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.relay import Relay

PATIENCE_S = 60.0


class Link:
    """A relay before a listening socket, and connections through it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE_S)
        self.relay = Relay(self.listener.getsockname()[1])

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """(client, server) of a new connection."""
        client = socket.create_connection(("127.0.0.1", self.relay.port), PATIENCE_S)
        server = self.listener.accept()[0]
        server.settimeout(PATIENCE_S)
        return client, server


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.relay.close()
    made.listener.close()


def read(end: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = end.recv(count - len(got))
        assert more, f"closed after {got!r}"
        got += more
    return got


def broken(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def test_forwards_both_ways_and_passes_on_the_end(link: Link) -> None:
    client, server = link.connect()
    sent = bytes(range(256)) * 4000
    client.sendall(sent[:1000])
    server.sendall(sent)
    assert read(server, 1000) == sent[:1000] and read(client, len(sent)) == sent
    assert link.relay.forwarded() == 1000 and link.relay.forwarded(to_server=False) == len(sent)
    client.close()
    assert broken(server)


def test_cut(link: Link) -> None:
    client, server = link.connect()
    link.relay.cut()
    assert broken(client) and broken(server)
    client, server = link.connect()
    link.relay.cut(refuse=True)
    assert broken(client) and broken(socket.create_connection(("127.0.0.1", link.relay.port)))
    link.relay.restore()
    client, server = link.connect()
    link.relay.cut_after(3)
    client.sendall(b"abcdef")
    assert broken(client)
    assert link.relay.accepted == 3


def test_a_held_link_is_not_closed_and_loses_nothing(link: Link) -> None:
    client, server = link.connect()
    link.relay.hold(to_client=False)
    client.sendall(b"later")
    server.sendall(b"now")
    assert read(client, 3) == b"now"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(1)
    server.settimeout(PATIENCE_S)
    link.relay.restore()
    assert read(server, 5) == b"later"


def test_slow_links_lose_nothing(link: Link) -> None:
    client, server = link.connect()
    link.relay.throttle(1e6, to_client=False)
    link.relay.delay(0.01)
    client.sendall(b"x" * 50_000)
    server.sendall(b"y")
    assert read(server, 50_000) == b"x" * 50_000 and read(client, 1) == b"y"


def test_flips_one_bit(link: Link) -> None:
    client, server = link.connect()
    client.sendall(b"abc")
    assert read(server, 3) == b"abc"
    link.relay.flip(4)
    client.sendall(b"abcabc")
    assert read(server, 6) == b"abcacc"
