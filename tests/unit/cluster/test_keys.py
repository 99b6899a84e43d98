"""Keys on the control links: who gets in, and what the others are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        (Pinned(WORKER, (OTHER.public,)), "does not have the public key that this node expects"),
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
