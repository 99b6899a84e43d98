"""Keys on the control links: who gets in, and what the others are told."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmoe.cluster import bus as bus_module
from zmoe.cluster.bus import LeaderBus, WorkerBus
from zmoe.cluster.hosts import Host, HostList
from zmoe.cluster.messages import Join, Message
from zmoe.cluster.spec import KEY_VARIABLE, ClusterSpec, WorkerSpec
from zmoe.config import PROTOCOL_VERSION, EngineConfig
from zmoe.errors import InputError
from zmoe.exchange.keys import KeyPair, Pinned, write_new_key
from zmoe.exchange.sockets import Context

PATIENCE_S = 60
LEADER, WORKER, OTHER = KeyPair.fresh(), KeyPair.fresh(), KeyPair.fresh()


@pytest.fixture
def context() -> Iterator[Context]:
    made = Context()
    yield made
    made.term()


def first_heard(context: Context, leader: Pinned | None, worker: Pinned | None) -> Message:
    """What the leader hears first. Raises what the worker does."""
    bus = LeaderBus(context, "127.0.0.1", 0, session=1, nodes=2, grace=9.0, keys=leader)
    join = Join(PROTOCOL_VERSION, 1, "1", "here", "")
    mine = WorkerBus(context, f"127.0.0.1:{bus.port}", join, 9.0, worker)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < deadline:
            if heard := bus.hear():
                return heard[0][1]
            mine.receive(0.02)
        raise TimeoutError
    finally:
        mine.close()
        bus.close()


def test_a_worker_with_the_right_keys_joins(context: Context) -> None:
    leader, worker = Pinned(LEADER, (WORKER.public,)), Pinned(WORKER, (LEADER.public,))
    assert isinstance(first_heard(context, leader, worker), Join)
    same = Pinned.shared(LEADER)
    assert isinstance(first_heard(context, same, same), Join)
    assert context.authenticator.refused == []


@pytest.mark.parametrize(
    "worker, words",
    [
        (Pinned(OTHER, (LEADER.public,)), "has refused this node, whose public key is"),
        (
            Pinned(WORKER, (OTHER.public,)),
            "does not answer by the public key that this node expects",
        ),
        (None, "takes only nodes with a key"),
    ],
)
def test_others_are_told_why_not(context: Context, worker: Pinned | None, words: str) -> None:
    with pytest.raises(InputError, match=f"leader 127.0.0.1:[0-9]+ {words}") as told:
        first_heard(context, Pinned(LEADER, (WORKER.public,)), worker)
    if worker is not None:
        assert str(told.value).endswith(OTHER.public)
    refused = context.authenticator.refused
    assert refused == ([f"127.0.0.1, whose public key is {OTHER.public}"] if "ref" in words else [])


def test_a_leader_without_a_key_is_named(context: Context) -> None:
    with pytest.raises(InputError, match="has no key, while this node has one"):
        first_heard(context, None, Pinned.shared(LEADER))


def test_what_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    pair = write_new_key(file)
    here = Host("here", "127.0.0.1")
    assert not ClusterSpec(2, HostList((here, here))).encrypted
    assert ClusterSpec(2, manual=True, key=file).encrypted
    assert WorkerSpec("127.0.0.1:1", 1).pinned() is None
    for refused, words in (
        (
            lambda: WorkerSpec("10.0.0.1:1", 1, "10.0.0.2").pinned(),
            "a node on 10.0.0.2 needs a key",
        ),
        (lambda: ClusterSpec(2, key=file), "key is for nodes that are started by hand"),
        (lambda: ClusterSpec(2, insecure=True), "insecure has no use on one machine"),
        (lambda: ClusterSpec(2, ports="97-9"), "ports is '97-9': expected a range of ports such"),
        (lambda: ClusterSpec(2, ports="0-9"), "expected a range"),
        (lambda: ClusterSpec(2, ports="1-65536"), "expected a range"),
        (lambda: ClusterSpec(2, ports="97-99", port=100), "port is 100: not one of --ports 97-99"),
        (lambda: ClusterSpec(2, manual=True, key=file, insecure=True), "has no use with a key"),
        (lambda: ClusterSpec(2, manual=True, key=tmp_path / "none"), "none cannot be read"),
        (
            lambda: ClusterSpec(2, manual=True, key=file, engine=EngineConfig(backend="ring")),
            "backend is ring, which does not encrypt: --insecure allows it",
        ),
    ):
        with pytest.raises(InputError, match=words):
            refused()
    monkeypatch.setenv(KEY_VARIABLE, str(file))
    assert WorkerSpec("10.0.0.1:1", 1, "10.0.0.2").pinned() == Pinned.shared(pair)
    assert WorkerSpec("10.0.0.1:1", 1, "10.0.0.2", insecure=True).pinned() is None
    assert WorkerSpec("127.0.0.1:1", 1).pinned() is None


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"%s" + bytes(32)
CURVE, NULL = (GREETING % name.ljust(20, b"\0") for name in (b"CURVE", b"NULL"))
ATTACKS = {
    "says nothing": b"",
    "stops in the middle of the greeting": CURVE[:11],
    "stops after the greeting": CURVE,
    "wants no encryption": NULL + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER",
    "sends an endless multipart": CURVE + b"\x01\x10aaaaaaaaaaaaaaaa" * 1000,
    "sends a command of 1 GiB": CURVE + b"\x06\0\0\0\0\x40\0\0\0" + bytes(1 << 16),
}
CONNECTIONS = 300  # of each


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_strangers_without_a_key_are_bounded(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are disconnected when the handshake takes too long, and a worker joins meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(ATTACKS) * CONNECTIONS * 2 + 300  # both ends are in this process
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{hard} files may be open, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    monkeypatch.setattr(bus_module, "HANDSHAKE_MS", 1500)
    same = Pinned.shared(LEADER)
    bus = LeaderBus(context, "127.0.0.1", 0, session=1, nodes=2, grace=9.0, keys=same)
    strangers = []
    before = memory()
    try:
        for data in ATTACKS.values():
            for _ in range(CONNECTIONS):
                strangers.append(socket.create_connection(("127.0.0.1", bus.port), PATIENCE_S))
                with contextlib.suppress(OSError):  # refused before all was sent
                    strangers[-1].sendall(data)
        join = Join(PROTOCOL_VERSION, 1, "1", "here", "")
        worker = WorkerBus(context, f"127.0.0.1:{bus.port}", join, 9.0, same)
        deadline = time.monotonic() + PATIENCE_S
        while not (heard := bus.hear()) and time.monotonic() < deadline:
            worker.receive(0.02)
        grown = memory() - before
        assert heard == [(1, join)]
        worker.close()
        assert grown < 32 << 20, grown / len(strangers)
        for stranger in strangers:
            stranger.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):  # until it is disconnected
                    pass
    finally:
        for stranger in strangers:
            stranger.close()
        bus.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
