"""A node that hosts the shards of others adds the same bits as they did."""

from __future__ import annotations

import random
import time
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from tests.unit.exchange.test_central import (
    EXPERTS,
    LAYERS,
    TOP_K,
    WIDTH,
    Array,
    NumpyExperts,
    Routed,
    placement,
    routed,
)
from tests.unit.exchange.test_exchange import together
from zmoe.errors import PeerError
from zmoe.exchange.base import Call
from zmoe.exchange.hosting import Guest, HostingExchange
from zmoe.exchange.sockets import Endpoint
from zmoe.placement.assignment import Ownership

SHARDS = 4


def shard(rank: int, layer: int) -> tuple[NumpyExperts, Ownership]:
    owned = placement(SHARDS).owned[layer][rank]
    return NumpyExperts(layer, rank, owned), Ownership(placement(SHARDS), layer, rank)


def held(guest: Guest, rank: int) -> None:
    pairs = [shard(rank, layer) for layer in range(LAYERS)]
    guest.hold([experts for experts, _ in pairs], [ownership for _, ownership in pairs])


def run(exchange: HostingExchange, step: int, given: Routed) -> list[Array]:
    """One step as the node of `exchange` runs it: the sum of each layer."""
    x, ids, weights = given
    exchange.step = step
    sums = []
    for layer in range(LAYERS):
        own = Guest(exchange)  # only to compute with
        held(own, exchange.rank)
        call = Call(layer, len(x), WIDTH, mx.float32, 7)
        exchange.dispatch(call, x, mx.float32, ids, weights)
        mine = own.partial(call, x, mx.float32, ids, weights)
        out = np.empty_like(x)
        exchange.all_reduce_host(call, mine, out)
        sums.append(out)
    return sums


def make(node: int, session: int, **options: object) -> HostingExchange:
    return HostingExchange(
        node,
        SHARDS,
        session=session,
        max_payload_bytes=1 << 16,
        small_payload_bytes=256,
        deadline_s=20.0,
        **options,
    )


def enter(nodes: list[HostingExchange], hosts: tuple[int, ...], session: int) -> None:
    """Have `nodes` form the view in which shard s is hosted by the node hosts[s]."""
    found: dict[int, Endpoint] = {}
    for node in nodes:
        guests = [s for s, host in enumerate(hosts) if host == node.rank and s != node.rank]
        found.update(node.host(session, guests))
        for guest in node.guests:
            held(guest, guest.exchange.rank)
    endpoints = [found[s] for s in range(SHARDS)]
    for result in together([partial(node.connect, endpoints, 20) for node in nodes]):
        assert result is None


@pytest.mark.parametrize("algorithm, parts", [("direct", 0), ("direct", 3), ("scatter", 2)])
@pytest.mark.parametrize("wire", ["f32", "q8"])
def test_the_same_bits_wherever_shards_are(algorithm: str, parts: int, wire: str) -> None:
    options = {"algorithm": algorithm, "parts": parts, "wire_dtype": wire}
    session = random.getrandbits(60)
    nodes = [make(rank, session, **options) for rank in range(SHARDS)]
    batches = [routed(rows, rows) for rows in (1, 5, 64)]
    assert len(batches[0][1][0]) == TOP_K < EXPERTS
    wanted: list[list[Array]] = []
    views = [(0, 1, 2, 3), (0, 1, 1, 3), (0, 0, 3, 3), (0, 0, 0, 0)]
    try:
        for epoch, hosts in enumerate(views):
            alive = [node for node in nodes if node.rank in hosts]
            for node in nodes:
                if node not in alive:
                    node.close()
            enter(alive, hosts, session + epoch)
            for step, given in enumerate(batches, 1 + 10 * epoch):
                jobs = [partial(run, node, step, given) for node in alive]
                for node, sums in zip(alive, together(jobs)):
                    assert isinstance(sums, list), f"node {node.rank}, view {hosts}: {sums}"
                    if epoch == 0:
                        wanted += [sums] if node.rank == 0 else []
                    for mine, theirs in zip(sums, wanted[step - 1 - 10 * epoch], strict=True):
                        assert mine.tobytes() == theirs.tobytes(), f"view {hosts}"
    finally:
        for node in nodes:
            node.close()


def test_a_peer_that_is_lost_ends_the_guests_too() -> None:
    session = random.getrandbits(60)
    nodes = [make(rank, session, grace_s=0.1) for rank in range(SHARDS)]
    enter(nodes[:3], (0, 1, 2, 1), session + 1)
    try:
        nodes[2].close()
        begun = time.monotonic()
        given = routed(3, 0)
        for result in together([partial(run, node, 1, given) for node in nodes[:2]]):
            assert isinstance(result, PeerError) and result.rank in (1, 2, 3)
        assert time.monotonic() - begun < 15  # the deadline of an exchange is 20
    finally:
        for node in nodes:
            node.close()
