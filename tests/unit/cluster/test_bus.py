"""The control links, without processes: who is let in, and what a broken link loses (nothing)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
import zmq

from tests.relay import Relay
from tests.unit.cluster.control_fuzz import Fuzz
from zmoe.cluster.channel import Channel
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.cluster.messages import (
    AskMemory,
    Cache,
    Failed,
    Join,
    Loading,
    Memory,
    Message,
    Setup,
    Stop,
    encode,
)
from zmoe.cluster.spec import WorkerSpec
from zmoe.cluster.worker import Worker
from zmoe.cluster.worker_bus import WorkerBus
from zmoe.config import PROTOCOL_VERSION, EngineConfig, Timing
from zmoe.errors import InputError, PeerError, ZmoeError
from zmoe.exchange.keys import Pinned
from zmoe.exchange.sockets import Context

PATIENCE_S = 60
GRACE_S = 30.0
SETUP = Setup(2, "m", EngineConfig(), Timing(), None)
FLOOD = 5000


class Buses:
    """Makes buses, all in one context."""

    def __init__(self) -> None:
        self.context = Context()
        self.made: list[LeaderBus | WorkerBus] = []

    def leader(self, port: int = 0, nodes: int = 2, **options: Any) -> LeaderBus:
        options = {"grace": GRACE_S, **options}
        session = secrets.randbits(63)
        bus = LeaderBus(self.context, "127.0.0.1", port, session=session, nodes=nodes, **options)
        self.made.append(bus)
        return bus

    def worker(self, port: int, rank: int = 1, token: str = "", host: str = "here") -> WorkerBus:
        join = Join(PROTOCOL_VERSION, rank, "1.0", host, token)
        bus = WorkerBus(self.context, f"127.0.0.1:{port}", join, GRACE_S)
        self.made.append(bus)
        return bus

    def stranger(self, port: int, identity: bytes) -> zmq.Socket[bytes]:
        dealer: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.ROUTING_ID, identity)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        return dealer

    def pair(self, port: int, leader: LeaderBus) -> WorkerBus:
        """A worker that has joined `leader` at `port` and has its Setup."""
        worker = self.worker(port)
        assert isinstance(heard(leader, worker)[1], Join)
        leader.broadcast(SETUP)
        assert taken(worker, leader) == SETUP
        return worker


@pytest.fixture
def buses() -> Iterator[Buses]:
    made = Buses()
    yield made
    for bus in made.made:
        bus.close()
    made.context.term()


def until(look: Callable[[], Any]) -> Any:
    """What `look` finds, for as long as that takes."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def heard(leader: LeaderBus, *workers: WorkerBus) -> tuple[int, Message]:
    """What the leader hears next, while `workers` run."""

    def look() -> list[tuple[int, Message]]:
        for worker in workers:
            assert worker.take() is None
        return leader.hear()

    (found,) = until(look)
    return found


def taken(worker: WorkerBus, *leaders: LeaderBus) -> Message:
    """What the worker gets next, while `leaders` listen and hear nothing of it."""

    def look() -> Message | None:
        for leader in leaders:
            assert leader.hear() == []
        return worker.take()

    message: Message = until(look)
    return message


# ---- who is let in -----------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"garbage",
        encode(Join(PROTOCOL_VERSION, 9, "0", "stranger", "")),
        encode(Join(PROTOCOL_VERSION, 1, "0", "stranger", "guess")),
        encode(Failed("stranger", True, None, None, 0)),
        Channel(3).note(encode(Loading(1, 2))),
    ],
    ids=["garbage", "no rank", "no token", "no join", "no session"],
)
def test_a_flood_does_not_hold_up_the_leader(buses: Buses, frame: bytes) -> None:
    """It takes a part at a time, and remembers nothing of it."""
    bus = buses.leader()
    with buses.stranger(bus.port, b"zmoe-1-0123456789abcdef") as stranger:
        for _ in range(FLOOD):
            stranger.send(frame)

        def look() -> bool:
            before = bus.dropped
            assert bus.hear() == []
            assert bus.dropped - before <= 100
            return bus.dropped == FLOOD

        until(look)
        assert not bus._peers


def test_a_rank_that_is_taken_is_refused_and_its_worker_unharmed(buses: Buses) -> None:
    leader = buses.leader()
    first = buses.pair(leader.port, leader)
    second = buses.worker(leader.port, host="elsewhere")
    assert taken(second, leader) == Stop("rank 1 is taken by a worker on here")
    leader.broadcast(AskMemory())
    assert taken(first, leader) == AskMemory()
    first.send(Memory(5))
    assert heard(leader, first) == (1, Memory(5))


def test_a_worker_that_ended_before_the_run_began_is_replaced(buses: Buses) -> None:
    leader = buses.leader()
    first = buses.worker(leader.port)
    assert isinstance(heard(leader, first)[1], Join)
    first.close()
    second: list[WorkerBus] = []

    def look() -> bool:
        """Until the leader has noticed that the first one is gone, it refuses others."""
        if not second or second[-1].take() is not None:
            second.append(buses.worker(leader.port, host="again"))
        return any(getattr(message, "host", "") == "again" for _, message in leader.hear())

    until(look)
    leader.broadcast(SETUP)
    assert taken(second[-1], leader) == SETUP


@pytest.mark.parametrize(
    "token, words",
    [
        ("guess", "is not the one that has started this node"),
        ("", "takes only nodes with a key, or that it starts itself"),
    ],
)
def test_a_worker_without_the_token_is_refused(buses: Buses, token: str, words: str) -> None:
    leader = buses.leader(tokens={1: "secret"})
    stranger = buses.worker(leader.port, token=token)
    with pytest.raises(InputError, match=f"leader 127.0.0.1:{leader.port} {words}"):
        taken(stranger, leader)
    worker = buses.worker(leader.port, token="secret")
    assert isinstance(heard(leader, worker)[1], Join)
    assert leader.dropped == 0
    refused = ["127.0.0.1, who has no token"] if token else []  # by others libzmq knows them
    assert buses.context.authenticator.refused == refused


def test_the_token_of_one_worker_is_not_that_of_another(buses: Buses) -> None:
    leader = buses.leader(nodes=3, tokens={1: "one", 2: "two"})
    worker = buses.worker(leader.port, token="two")
    refusal = taken(worker, leader)
    assert refusal == Stop("rank 1 of this run is a worker that its leader starts")


def test_a_worker_that_another_leader_meets_says_so(buses: Buses) -> None:
    leader = buses.leader()
    worker = buses.worker(leader.port, token="secret")
    with pytest.raises(InputError, match="is not the one that has started this node"):
        taken(worker, leader)


def test_a_worker_of_protocol_3_is_named_and_told(buses: Buses) -> None:
    leader = buses.leader()
    with buses.stranger(leader.port, b"zmoe-1") as old:
        old.send(msgpack.packb(["Join", 3, 1, "0.3", "oldhost"]))
        assert heard(leader) == (1, Join(3, 1, "0.3", "oldhost", ""))
        assert old.poll(PATIENCE_S * 1000)
        assert msgpack.unpackb(old.recv()) == [
            "Stop",
            f"the leader speaks protocol {PROTOCOL_VERSION}",
        ]


def test_a_worker_that_sends_what_none_can_is_named(buses: Buses) -> None:
    leader = buses.leader()
    worker = buses.pair(leader.port, leader)
    worker.send(Memory(-1))
    words = r"node 1 \(here\) sent bad control data: Memory.peak_memory is -1"
    with pytest.raises(ZmoeError, match=words):
        heard(leader, worker)


def test_a_worker_whose_leader_never_comes_says_so(buses: Buses, free_port: int) -> None:
    spec = WorkerSpec(f"127.0.0.1:{free_port}", 1, join_timeout=0.1)
    with pytest.raises(ZmoeError, match=f"leader 127.0.0.1:{free_port} did not begin a run"):
        Worker(spec, buses.context, lambda setup: None, print).run()


def test_a_worker_stays_with_a_leader_that_waits_for_others(buses: Buses) -> None:
    leader = buses.leader(keys=Pinned.of_user())
    worker = Worker(WorkerSpec(f"127.0.0.1:{leader.port}", 1), buses.context, print, print)
    buses.made.append(worker._bus)
    with ThreadPoolExecutor(1) as apart:
        begun = apart.submit(worker.join, 0.5, PATIENCE_S)
        assert isinstance(heard(leader)[1], Join)
        time.sleep(0.7)
        leader.broadcast(SETUP)
        assert begun.result() == SETUP


# ---- links that break -----------------------------------------------------------------


def test_what_is_sent_to_a_dying_link_arrives(buses: Buses) -> None:
    """In both directions, every time, and once."""
    leader = buses.leader()
    with Relay(leader.port) as relay:
        worker = buses.pair(relay.port, leader)
        steps: list[Message] = []
        reports: list[Message] = []

        def look() -> bool:
            steps.extend(filter(None, [worker.take()]))
            reports.extend(message for _, message in leader.hear())
            return len(steps) == len(reports) == len(numbers)

        numbers: list[int] = []
        for number in range(1, 10, 2):
            numbers += [number, number + 1]
            relay.hold()
            leader.broadcast(Cache(number))
            worker.send(Memory(number))
            relay.cut()
            leader.broadcast(Cache(number + 1))
            worker.send(Memory(number + 1))
            relay.restore()
            until(look)
        assert steps == [Cache(number) for number in numbers]
        assert reports == [Memory(number) for number in numbers]


def test_a_join_that_is_lost_is_sent_again(buses: Buses) -> None:
    leader = buses.leader()
    with Relay(leader.port) as relay:
        worker = buses.worker(relay.port)
        assert isinstance(heard(leader, worker)[1], Join)
        relay.hold()
        leader.broadcast(SETUP)
        relay.cut()
        relay.restore()
        assert taken(worker, leader) == SETUP


def test_another_leader_on_the_port_is_named(buses: Buses) -> None:
    leader, other = buses.leader(), buses.leader()
    with Relay(leader.port) as relay:
        worker = buses.pair(relay.port, leader)
        relay._target = ("127.0.0.1", other.port)
        relay.cut()
        words = rf"rank 0 \(leader 127.0.0.1:{relay.port}\) is gone: .* another run"
        with pytest.raises(PeerError, match=words):
            taken(worker, other)


def test_a_link_that_stays_broken_is_lost_on_both_ends(buses: Buses) -> None:
    leader = buses.leader(grace=0.1)
    with Relay(leader.port) as relay:
        worker = buses.pair(relay.port, leader)
        worker.grace = 0.1
        leader.step = worker.step = 3
        relay.cut(refuse=True)

        def look() -> None:
            time.sleep(0.02)  # the cut is noticed long before the channel is full
            leader.broadcast(AskMemory())
            leader.hear()

        with pytest.raises(PeerError, match=r"rank 1 \(here\) cannot be reached.*step 3"):
            until(look)
        with pytest.raises(PeerError, match=r"rank 0 \(leader .*\) is gone .*step 3"):
            taken(worker)


# ---- the end ----------------------------------------------------------------------------


def test_a_link_that_breaks_while_nobody_speaks_is_noticed(buses: Buses) -> None:
    leader = buses.leader(grace=0.1)
    worker = buses.pair(leader.port, leader)
    worker.close()

    def look() -> None:
        leader.probe()
        leader.hear()

    with pytest.raises(PeerError, match="rank 1"):
        until(look)


def test_a_worker_in_doubt_has_no_grace(buses: Buses) -> None:
    leader = buses.leader(grace=1e9)
    worker = buses.pair(leader.port, leader)
    leader.doubt(1)
    assert leader.hear() == []
    worker.close()

    def look() -> None:
        leader.doubt(1)
        leader.hear()

    with pytest.raises(PeerError, match="rank 1"):
        until(look)


def test_the_loss_of_a_worker_swallows_no_words_of_another(buses: Buses) -> None:
    leader = buses.leader(nodes=3, grace=0.1)
    workers = first, second = [buses.worker(leader.port, rank) for rank in (1, 2)]
    joined: list[tuple[int, Message]] = []

    def all_joined() -> bool:
        assert [worker.take() for worker in workers] == [None, None]
        joined.extend(leader.hear())
        return len(joined) == 2

    until(all_joined)
    leader.broadcast(SETUP)
    assert taken(first, leader) == taken(second, leader) == SETUP
    first.close()

    def is_down() -> bool:
        leader.broadcast(SETUP, (1,))
        return leader._peers[1].down_since is not None

    until(is_down)
    second.send(Memory(7))
    time.sleep(2 * 0.1)  # the grace of the first one
    assert leader.socket.poll(PATIENCE_S * 1000)
    assert leader.hear() == [(2, Memory(7))]
    with pytest.raises(PeerError, match="rank 1"):
        until(leader.hear)


def test_an_end_waits_until_its_last_words_are_heard(buses: Buses) -> None:
    leader = buses.leader()
    with Relay(leader.port) as relay:
        worker = buses.pair(relay.port, leader)
        relay.hold()
        leader.broadcast(Stop(""))
        assert leader.finish(0.01) == [1]
        relay.restore()
        assert taken(worker, leader) == Stop("")
        assert leader.finish(PATIENCE_S) == []


def test_whatever_is_sent_is_taken_or_refused() -> None:
    context = Context()
    fuzz = Fuzz(context, 1)
    fuzz.run(3000)
    fuzz.close()
    context.term()
    for end in ("leader", "worker"):
        for how in ("took", "dropped", "ended"):
            assert fuzz.told[f"{end} {how}"] > 0
