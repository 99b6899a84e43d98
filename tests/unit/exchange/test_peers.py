"""Links that break, stall or crawl: the sums stay the same, or the rank is named."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.relay import Relay
from tests.unit.exchange.test_central import LAYERS, TOP_K, leader, placement, routed, worker
from tests.unit.exchange.test_exchange import together
from zmoe.errors import PeerError
from zmoe.exchange import sockets
from zmoe.exchange.central import CentralExchange
from zmoe.exchange.local import Endpoint, Exchange, connect_group

PATIENCE_S = 60.0
FAULTS: dict[str, Callable[[Relay], None]] = {
    "cut": Relay.cut,
    "cut within what is sent": lambda relay: relay.cut_after(100),
    "cut within what is received": lambda relay: relay.cut_after(100, to_server=False),
    "half-open": Relay.hold,
    "throttled": lambda relay: relay.throttle(20_000),
    "delayed": lambda relay: relay.delay(0.06),  # longer than the patience with a frame
}


class Pair:
    """Two ranks with a relay in each of their four links."""

    def __init__(self, make: Callable[..., Any], grace_s: float, **options: Any) -> None:
        common = {
            "session": random.getrandbits(64),
            "small_payload_bytes": 256,
            "grace_s": grace_s,
            **options,
        }
        self.ranks = [make(rank, 2, **common) for rank in (0, 1)]
        self.relays: list[Relay] = []
        self.control: list[Relay] = []  # of the DEALER of each rank
        views = []
        for rank, peer in ((0, 1), (1, 0)):
            listening = self.ranks[peer].endpoint
            data, control = Relay(listening.data_port), Relay(listening.control_port)
            self.relays += [data, control]
            self.control.append(control)
            view = [self.ranks[rank].endpoint] * 2
            view[peer] = Endpoint("127.0.0.1", data.port, control.port)
            views.append(view)
        connect_group(self.ranks, views, PATIENCE_S)

    def run(self, jobs: list[Callable[[], Any]]) -> list[Any]:
        """The jobs' results, by rank; who is done serves the other until it is done too."""
        done: list[int] = []

        def serve(exchange: Exchange, job: Callable[[], Any]) -> Any:
            try:
                result = job()
            finally:
                done.append(exchange.rank)
            while len(done) < 2:
                exchange.service()
                time.sleep(0.005)
            return result

        return together([partial(serve, e, job) for e, job in zip(self.ranks, jobs)])

    def sums(self, elements: int = 500) -> list[Any]:
        data = [np.full(elements, 1.5 + e.rank, np.float32) for e in self.ranks]
        return self.run([partial(e.all_reduce_numpy, x) for e, x in zip(self.ranks, data)])

    def close(self) -> None:
        for end in (*self.ranks, *self.relays):
            end.close()


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*given: Any, **options: Any) -> Pair:
        made.append(Pair(*given, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(reached: Callable[[], object]) -> None:
    """Wait for an event."""
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def same(results: list[Any], elements: int = 500) -> None:
    for total in results:
        np.testing.assert_array_equal(total, np.full(elements, 4, np.float32))


@pytest.mark.parametrize("algorithm", ["direct", "scatter"])
def test_no_fault_of_a_link_changes_a_sum(algorithm: str, pair: Callable[..., Pair]) -> None:
    linked = pair(Exchange, PATIENCE_S, max_payload_bytes=1 << 14, algorithm=algorithm)
    for fault, relay in itertools.product(FAULTS, linked.relays):
        FAULTS[fault](relay)
        mend = threading.Timer(0.2, relay.restore)  # less than the heartbeats allow
        if fault == "half-open":
            mend.start()
        same(linked.sums())
        mend.cancel()
        relay.restore()


def test_a_link_that_was_half_open_comes_back(
    monkeypatch: pytest.MonkeyPatch, pair: Callable[..., Pair]
) -> None:
    """The heartbeats end the connection, and within the grace there is another one."""
    monkeypatch.setattr(sockets, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(sockets, "HEARTBEAT_TIMEOUT_MS", 200)
    linked = pair(Exchange, PATIENCE_S, max_payload_bytes=1 << 14)
    for relay in linked.relays:
        relay.hold()
        until(lambda relay=relay: relay.accepted == 2)  # type: ignore[misc]
        relay.restore()
        same(linked.sums())


def test_a_link_that_stays_half_open_is_a_lost_peer(
    monkeypatch: pytest.MonkeyPatch, pair: Callable[..., Pair]
) -> None:
    """Where only the frames' link is, they come by the other one."""
    monkeypatch.setattr(sockets, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(sockets, "HEARTBEAT_TIMEOUT_MS", 200)
    linked = pair(Exchange, 0.2, max_payload_bytes=1 << 14)
    for relay in linked.relays:
        if relay not in linked.control:
            relay.hold()
    same(linked.sums())
    linked.control[0].hold()
    with pytest.raises(PeerError, match="rank 1 was lost"):
        until(lambda: linked.ranks[0].service())


def test_a_frame_that_takes_longer_than_the_heartbeats_goes_through(
    monkeypatch: pytest.MonkeyPatch, pair: Callable[..., Pair]
) -> None:
    monkeypatch.setattr(sockets, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(sockets, "HEARTBEAT_TIMEOUT_MS", 200)
    monkeypatch.setattr(sockets, "SLOWEST_BYTES_PER_MS", 500)
    elements = 1 << 17
    linked = pair(Exchange, 0.2, max_payload_bytes=4 * elements, algorithm="direct")
    for relay in linked.relays:
        relay.throttle(700_000)
    same(linked.sums(elements), elements)
    assert [e.stats["link_drops"] for e in linked.ranks] == [0, 0]


@pytest.mark.parametrize("bytes_let_through", [1, 70, 150])
@pytest.mark.parametrize("to_server", [False, True], ids=["rows", "answer"])
def test_the_first_frames_of_a_centralised_run_are_asked_for_again(
    to_server: bool, bytes_let_through: int, pair: Callable[..., Pair]
) -> None:
    linked = pair(
        CentralExchange,
        PATIENCE_S,
        max_payload_bytes=1 << 14,
        max_rows=64,
        max_pairs=64 * TOP_K,
    )
    for exchange in linked.ranks:
        exchange.place(placement(2))
    given = [routed(1, layer) for layer in range(LAYERS)]
    linked.control[1].cut_after(bytes_let_through, to_server=to_server)
    jobs = [partial(leader, linked.ranks[0], given, 0), partial(worker, linked.ranks[1], 0)]
    sums, told = linked.run(jobs)
    assert told is None and isinstance(sums, list)
    again = linked.run(
        [partial(leader, linked.ranks[0], given, 1), partial(worker, linked.ranks[1], 1)]
    )
    for mine, theirs in zip(sums, again[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert linked.control[1].accepted == 2


def test_who_leaves_first_takes_no_payload_along(pair: Callable[..., Pair]) -> None:
    """It has its sum, while its own payload is still under way on a slow link."""
    elements = 1 << 22  # more than the kernel's buffers hold
    linked = pair(Exchange, 20.0, max_payload_bytes=4 * elements, algorithm="direct")
    linked.relays[2].hold(to_server=False)  # what rank 1 gets of rank 0

    def reduce_and_leave() -> Any:
        try:
            return linked.ranks[0].all_reduce_numpy(np.full(elements, 1.5, np.float32))
        finally:
            linked.ranks[0].close()

    def reduce_slowly() -> Any:
        data = np.full(elements, 2.5, np.float32)
        release = threading.Timer(0.5, linked.relays[2].restore)
        release.start()
        try:
            return linked.ranks[1].all_reduce_numpy(data)
        finally:
            release.join()

    same(together([reduce_and_leave, reduce_slowly]), elements)


def test_a_flood_that_ends_in_a_reset_ends_no_process() -> None:
    """Where a heartbeat is due on a connection that its mark had stopped, libzmq aborts."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.exchange.flooded"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (ended.stdout, ended.returncode) == ("alive\n", 0), ended.stderr
