"""Keys on the control links: who gets in, and what the others are told."""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from zmoe.cluster import bus as bus_module
from zmoe.cluster import crew, hosts, member, spec
from zmoe.cluster.hosts import Host, HostList
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.messages import Join, Message, Stop, encode
from zmoe.cluster.spec import KEY_VARIABLE, ClusterSpec, WorkerSpec
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.config import PROTOCOL_VERSION, EngineConfig
from zmoe.errors import InputError
from zmoe.exchange import sockets
from zmoe.exchange.keys import Authenticator, KeyPair, Pinned, user_key, write_new_key
from zmoe.exchange.local import Exchange, connect_group
from zmoe.exchange.sockets import Context

PATIENCE_S = 60
LEADER, WORKER, OTHER = KeyPair.fresh(), KeyPair.fresh(), KeyPair.fresh()


@pytest.fixture
def context() -> Iterator[Context]:
    made = Context()
    yield made
    made.term()


def first_heard(
    context: Context,
    leader: Pinned | None,
    worker: Pinned | None,
    addresses: tuple[str, ...] | None = None,
) -> Message:
    """What the leader hears first, from 127.0.0.2. Raises what the worker does."""
    options = {"session": 1, "nodes": 2, "grace": 9.0}
    bus = LeaderBus(context, "127.0.0.1", 0, **options, keys=leader, addresses=addresses)
    join = Join(PROTOCOL_VERSION, 1, "1", "here", "")
    mine = WorkerBus(context, f"127.0.0.1:{bus.port}", join, 9.0, worker, "127.0.0.2")
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
        (None, "takes only nodes with a key, or that it starts itself"),
    ],
)
def test_others_are_told_why_not(context: Context, worker: Pinned | None, words: str) -> None:
    with pytest.raises(InputError, match=f"leader 127.0.0.1:[0-9]+ {words}") as told:
        first_heard(context, Pinned(LEADER, (WORKER.public,)), worker)
    if worker is not None:
        assert str(told.value).endswith(OTHER.public)
    refused = context.authenticator.refused
    assert refused == ([f"127.0.0.2, whose public key is {OTHER.public}"] if "ref" in words else [])


def test_who_is_refused_before_it_knows_the_mechanism_is_told(context: Context) -> None:
    """The leader has all of its greeting before it says the rest of its own: it is busy."""

    def lead(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                end, _ = listener.accept()
                with end:
                    end.sendall(GREETING[:11])
                    until = time.monotonic() + 0.3
                    while len(end.recv(64, socket.MSG_PEEK)) < 64:
                        if time.monotonic() > until:
                            end.sendall(GREETING[11:] % b"PLAIN".ljust(20, b"\0"))
                            break
                        time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lead, args=(listener,), daemon=True).start()
        join = Join(PROTOCOL_VERSION, 1, "1", "here", "")
        mine = WorkerBus(context, f"127.0.0.1:{listener.getsockname()[1]}", join, 9.0)
        try:
            with pytest.raises(InputError, match="takes only nodes with a key, or that it starts"):
                mine.receive(PATIENCE_S)
        finally:
            mine.close()


def test_a_leader_without_a_key_is_named(context: Context) -> None:
    with pytest.raises(InputError, match="has no key, while this node has one"):
        first_heard(context, None, Pinned.shared(LEADER))


def test_who_comes_from_another_address_is_refused(context: Context) -> None:
    assert isinstance(first_heard(context, None, None, ("127.0.0.2", "127.0.0.3")), Join)
    with pytest.raises(InputError, match="this node, whose address is none of the run's"):
        first_heard(context, None, None, ("127.0.0.1", "127.0.0.3"))
    assert context.authenticator.refused == ["127.0.0.2, an address of no node"]


def test_users_are_told_apart_on_one_machine(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has one pair, which the first of its processes makes."""
    ends = []
    for user in ("one", "other"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / user))
        with ThreadPoolExecutor(8) as threads:
            pairs = set(threads.map(lambda _: user_key(), range(8)))
        assert pairs == {user_key()}
        (file,) = (tmp_path / user / "zmoe").iterdir()
        assert (file.name, file.stat().st_mode & 0o777) == ("user.key", 0o600)
        ends.append(Pinned.of_user())
    assert isinstance(first_heard(context, ends[0], ends[0]), Join)
    with pytest.raises(InputError, match="has a key that this node lacks, or is another user's"):
        first_heard(context, *ends)
    with pytest.raises(InputError, match="takes only nodes with a key, or that it starts itself"):
        first_heard(context, None, ends[0])
    file.chmod(0o644)
    with pytest.raises(InputError, match="user.key is open to everyone"):
        user_key()
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("")
    with pytest.raises(InputError, match="user.key cannot be written: File exists"):
        user_key()


@pytest.mark.parametrize("insecure", [False, True])
def test_strangers_are_refused_where_nodes_are_started_by_hand(
    context: Context, monkeypatch: pytest.MonkeyPatch, insecure: bool
) -> None:
    """On one machine, and, as if it were several ones, with `insecure`."""
    here = HostList((Host("one", "127.0.0.1"), Host("two", "127.0.0.2")))
    if insecure:
        for module in (crew, spec, member):
            monkeypatch.setattr(module, "is_loopback", lambda _: False)
    leader = crew.Crew(ClusterSpec(2, here, manual=True, insecure=insecure), 1, lambda _: None)
    at = f"127.0.0.1:{leader.bus.port}"
    words = "whose address is none" if insecure else "takes only nodes with a key"
    join = Join(PROTOCOL_VERSION, 1, "1", "there", "")
    stranger = WorkerBus(context, at, join, 9.0, source="127.0.0.3")
    worker = member.Member(WorkerSpec(at, 1, "127.0.0.2", insecure=insecure), context)
    until = time.monotonic() + PATIENCE_S
    try:
        with pytest.raises(InputError, match=words):
            stranger.receive(PATIENCE_S)
        while not leader.bus.hear():
            assert worker.expect(Stop, 0.02) is None and time.monotonic() < until
        assert leader.bus.dropped == 0
        told = "; refused 127.0.0.3, an address of no node" if insecure else ""
        assert leader._refused() == told
    finally:
        stranger.close()
        worker._bus.close()
        leader.close("enough")


def test_where_the_check_of_keys_fails_links_that_stand_go_on(
    context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right, questions = Authenticator._answer, itertools.count()

    def answer(self: Authenticator, question: list[bytes]) -> list[bytes]:
        assert next(questions) == 0, "the second one"
        return right(self, question)

    monkeypatch.setattr(Authenticator, "_answer", answer)
    same = Pinned.shared(LEADER)
    bus = LeaderBus(context, "127.0.0.1", 0, session=1, nodes=3, grace=9.0, keys=same)
    joins = [Join(PROTOCOL_VERSION, rank, "1", "here", "") for rank in (1, 2)]
    ends = [WorkerBus(context, f"127.0.0.1:{bus.port}", joins[0], 9.0, same)]
    until = time.monotonic() + PATIENCE_S
    try:
        while not bus.hear():
            assert ends[0].receive(0.02) is None and time.monotonic() < until
        ends.append(WorkerBus(context, f"127.0.0.1:{bus.port}", joins[1], 9.0, same))
        while not caplog.messages:
            assert bus.hear() == [] and time.monotonic() < until
            ends[1].receive(0.02)
        (line,) = caplog.messages
        assert line.startswith("zmoe: nobody can connect any more: the check of keys failed: Asser")
        bus.broadcast(Stop("enough"))
        while ends[0].receive(0.02) != Stop("enough"):
            assert bus.hear() == [] and time.monotonic() < until
    finally:
        for end in (*ends, bus):
            end.close()


def test_what_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(hosts, "_is_own", lambda _: True)
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
        (
            lambda: ClusterSpec(2, manual=True, bind="10.0.0.1", insecure=True),
            "insecure needs --hosts with --manual",
        ),
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


# ---- strangers ---------------------------------------------------------------------------

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"%s" + bytes(32)
READY = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
SESSION = 2
RIGHT = b"%016x" % SESSION
JOIN = encode(Join(PROTOCOL_VERSION, 1, "1", "there", "secret"))
JOINS = (b"\x01\x00\x00" + bytes([len(JOIN)]) + JOIN) * 500
PARTS = (b"\x01\xff" + bytes(255)) * 4096  # of a message that does not end
SUBSCRIPTIONS = b"\x00\x11\x01aaaaaaaaaaaaaaaa" * 50_000
SILENT, FLOODING = 250, 10  # connections of each of the attacks
FLOOD_BYTES = 64 << 20  # of each of those that flood, unless it is refused before


def attacks(mechanism: bytes, token: bytes) -> Iterator[tuple[bytes, bytes]]:
    """What a stranger says, and what it then says again and again."""
    hello = b"\x05HELLO\x04zmoe" + bytes([len(token)]) + token
    greeting, other = GREETING % mechanism.ljust(20, b"\0"), GREETING % b"NULL".ljust(20, b"\0")
    yield b"", b""
    yield greeting[:11], b""
    yield greeting, b""
    yield other + b"\x04" + bytes([len(READY)]) + READY, b""
    yield greeting + b"\x06\0\0\0\0\x40\0\0\0", bytes(1 << 16)  # a command of 1 GiB
    for more in (PARTS, JOINS):
        yield other + b"\x04" + bytes([len(READY)]) + READY, more
    for begin in (b"", b"\x04" + bytes([len(hello)]) + hello):
        yield greeting + begin, PARTS
        yield greeting + begin, SUBSCRIPTIONS


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
def open_files() -> Iterator[None]:
    """Lets this process have as many as the test needs, which has both ends of each link."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * sum(FLOODING if more else SILENT for _, more in attacks(b"", b"")) + 300
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{hard} files may be open, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("open_files")
@pytest.mark.parametrize("by", ["keys", "tokens", "addresses"])
def test_strangers_are_bounded(context: Context, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """All are disconnected when the handshake takes too long; a worker joins, and ranks sum
    meanwhile. Where nodes are told by their addresses strangers know all tokens.
    """
    monkeypatch.setattr(bus_module, "HANDSHAKE_MS", 1500)
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 1500)
    same = Pinned.shared(LEADER) if by == "keys" else None
    tokens = {} if by == "addresses" else {1: "secret"}
    node = "127.0.0.2"
    told = {"addresses": {node} if by == "addresses" else None}
    bus = LeaderBus(
        context, node, 0, session=1, nodes=2, grace=9.0, tokens=tokens, keys=same, **told
    )
    make = {"session": SESSION, "max_payload_bytes": 4096, "small_payload_bytes": 64, **told}
    make |= {"context": context, "keys": LEADER if same else None, "bind_host": node}
    group = [Exchange(rank, 2, **make) for rank in range(2)]
    opened: list[LeaderBus | WorkerBus | Exchange] = [bus, *group]
    connect_group(group, [[each.endpoint for each in group]] * 2, PATIENCE_S)
    ports = itertools.cycle([bus.port, group[0].endpoint.data_port, group[0].endpoint.control_port])
    strangers = []
    most = before = memory()
    try:
        token = RIGHT if by == "addresses" else b"guess"
        for begin, more in attacks(b"CURVE" if same else b"PLAIN", token):
            for _ in range(FLOODING if more else SILENT):
                stranger = socket.create_connection(
                    (node, next(ports)), PATIENCE_S, ("127.0.0.1", 0)
                )
                strangers.append(stranger)
                with contextlib.suppress(OSError):  # refused
                    stranger.sendall(begin)
                    for _ in range(FLOOD_BYTES // len(more) if more else 0):
                        stranger.sendall(more)
            most = max(most, memory())
        join = Join(PROTOCOL_VERSION, 1, "1", "here", tokens.get(1, ""))
        worker = WorkerBus(context, f"{node}:{bus.port}", join, 9.0, same, node)
        opened.append(worker)
        deadline = time.monotonic() + PATIENCE_S
        while not (heard := bus.hear()) and time.monotonic() < deadline:
            worker.receive(0.02)
        assert heard == [(1, join)]
        ones = np.ones(4, np.float32)
        with ThreadPoolExecutor() as threads:
            sums = list(threads.map(lambda each: each.all_reduce_numpy(ones), group))
        np.testing.assert_array_equal(sums, np.full((2, 4), 2.0))
        most = max(most, memory())
        assert most - before < 16 << 20, (most - before) / len(strangers)
        for stranger in strangers:
            stranger.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):  # until it is disconnected
                    pass
    finally:
        for each in (*strangers, *opened):
            each.close()
