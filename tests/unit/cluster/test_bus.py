"""The control links, without processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from zmoe.cluster.bus import LeaderBus
from zmoe.cluster.messages import Join, encode

JOIN = Join(1, 1, "0", "here")


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_a_flood_of_garbage_does_not_hold_up_the_leader(context: zmq.Context[Any]) -> None:
    bus = LeaderBus(context, "127.0.0.1", 0)
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.SNDHWM, 0)
    dealer.setsockopt(zmq.ROUTING_ID, b"zmoe-1")
    dealer.connect(f"tcp://127.0.0.1:{bus.port}")
    for _ in range(5000):
        dealer.send(b"garbage")
    dealer.send(encode(JOIN))
    assert bus.receive(60) is None
    assert bus.dropped == 1000
    while (got := bus.receive(60)) is None:
        assert bus.dropped <= 5000
    assert got == (1, JOIN)
    assert bus.dropped == 5000
    bus.close()
