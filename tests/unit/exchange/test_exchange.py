"""The Reducer over real sockets: MLX in this thread, the other ranks in threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import zmq

from zmoe.errors import DivergenceError, InputError, LaunchError, PeerError, ZmoeError
from zmoe.exchange.base import Call
from zmoe.exchange.local import Endpoint, Exchange, SingleNode, join, local_group
from zmoe.exchange.native import OutBuffer
from zmoe.native import Dtype, Status
from zmoe.obs import Spans

WIRE = {mx.float32: Dtype.F32, mx.float16: Dtype.F16, mx.bfloat16: Dtype.BF16}


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[list[Exchange]]:
    exchanges = local_group(getattr(request, "param", 2), max_payload_bytes=1 << 16)
    yield exchanges
    for exchange in exchanges:
        exchange.close()


def together(jobs: Sequence[Callable[[], object]]) -> list[object]:
    """Run each in a thread of its own, but the first one here; all results."""
    results: list[object] = [None] * len(jobs)

    def run(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except ZmoeError as problem:
            results[i] = problem
            print(f"rank {i} ended:", problem)  # in order: the first one is the cause

    threads = [threading.Thread(target=run, args=(i,)) for i in range(1, len(jobs))]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def peer(exchange: Exchange, rows: int, width: int, dtype: Dtype, value: float) -> None:
    """A rank that adds `value` everywhere at (step, layer 0), without MLX."""
    source = np.full(rows * width, value, np.float32)
    out = np.empty(rows * width, np.float32)
    native = exchange.native
    call = Call(0, rows, width, mx.float32, 7)
    status = native.publish(exchange.step, call, dtype, (source, Dtype.F32), 30.0)
    assert status == Status.OK
    while (status := native.collect(OutBuffer(out), Dtype.F32, 30.0)) == Status.INTERRUPTED:
        pass
    assert status == Status.OK


@pytest.mark.parametrize("group", [2, 3], indirect=True)
@pytest.mark.parametrize("dtype", list(WIRE), ids=str)
def test_all_reduce(group: list[Exchange], dtype: mx.Dtype) -> None:
    first, *others = group
    for step, rows in enumerate([1, 1, 5, 0, 1]):
        for exchange in group:
            exchange.step = step
        partial = None if step == 1 else mx.full((rows, 6), 0.5, dtype) * 2  # not evaluated
        beside: list[int] = []
        total, *_ = together(
            [
                lambda p=partial, n=rows, b=beside: first.all_reduce(
                    Call(0, n, 6, dtype, 7), p, lambda: b.append(1)
                ),
                *(lambda e=e, n=rows: peer(e, n, 6, WIRE[dtype], 2.0) for e in others),
            ]
        )
        assert isinstance(total, mx.array)
        assert total.shape == (rows, 6) and total.dtype == dtype
        expected = (0 if partial is None else 1) + 2 * len(others)
        assert mx.all(total == expected).item()
        assert beside == [1]
    assert first.stats["exchanges"] == 5
    assert first.pool_stats["exhausted"] == 0


def test_the_wait_for_a_late_peer_is_counted(group: list[Exchange]) -> None:
    first, second = group
    before, late_s = first.stats["waited_us"], 0.2

    def come_late() -> None:
        time.sleep(late_s)
        peer(second, 1, 6, Dtype.F32, 2.0)

    together([lambda: first.all_reduce(Call(0, 1, 6, mx.float32, 7), None), come_late])
    assert first.stats["waited_us"] - before > 1e6 * late_s / 2


def test_a_strided_or_wider_partial_is_sent_right(group: list[Exchange]) -> None:
    partial = mx.arange(12, dtype=mx.float32).reshape(4, 3).T
    total, _ = together(
        [
            lambda: group[0].all_reduce(Call(0, 3, 4, mx.bfloat16, 7), partial),
            lambda: peer(group[1], 3, 4, Dtype.BF16, 0.0),
        ]
    )
    assert isinstance(total, mx.array)
    assert mx.array_equal(total, partial.astype(mx.bfloat16))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_numpy_on_its_own(group: list[Exchange], kind: type[np.floating]) -> None:
    arrays = [np.arange(6, dtype=kind).reshape(2, 3) * (rank + 1) for rank in range(2)]
    for _ in range(3):
        sums = together([lambda r=r: group[r].all_reduce_numpy(arrays[r]) for r in range(2)])
        for total in sums:
            np.testing.assert_array_equal(total, arrays[0] + arrays[1])
    flat = together([lambda r=r: group[r].all_reduce_numpy(arrays[r].T[0]) for r in range(2)])
    np.testing.assert_array_equal(flat[0], [0, 9])


def test_unusable_arrays_are_refused(group: list[Exchange]) -> None:
    for bad in (np.zeros(3, np.int32), np.zeros((1, 1, 1), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(InputError, match="cannot reduce"):
            group[0].all_reduce_numpy(bad)
    with pytest.raises(InputError, match="exceeds the exchange's 65536 bytes"):
        group[0].all_reduce_numpy(np.zeros(20000, np.float32))
    with pytest.raises(ValueError, match="elements"):
        group[0].all_reduce(Call(0, 1, 4, mx.float32, 0), mx.zeros((1, 3)))


def test_spans_measure_the_exchange() -> None:
    spans = Spans()
    with (
        Exchange(
            0,
            2,
            session=1,
            max_payload_bytes=64,
            small_payload_bytes=64,
            spans=spans,
            deadline_s=0.05,
        ) as one,
        Exchange(1, 2, session=1, max_payload_bytes=64, small_payload_bytes=64) as two,
    ):
        endpoints = [one.endpoint, two.endpoint]
        together([lambda: one.connect(endpoints, 20), lambda: two.connect(endpoints, 20)])
        with pytest.raises(PeerError):
            one.all_reduce(Call(0, 1, 1, mx.float32, 0), None)
    assert spans.seconds["exchange"] >= 0.05


# ---- peers at fault ------------------------------------------------------------


def test_a_silent_peer() -> None:
    group = local_group(3)
    group[0].deadline_s = 0.1
    group[0].step = 12
    with pytest.raises(PeerError, match="rank 1 sent nothing within 0.1 s .nor did 2.") as caught:
        group[0].all_reduce(Call(4, 1, 4, mx.float32, 0), None)
    assert (caught.value.rank, caught.value.layer, caught.value.step) == (1, 4, 12)
    for exchange in group:
        exchange.close()


def test_a_lost_peer(group: list[Exchange]) -> None:
    group[1].close()
    with pytest.raises(PeerError, match="rank 1 was lost at layer 3, step 0") as caught:
        group[0].all_reduce(Call(3, 1, 4, mx.float32, 0), None)
    assert caught.value.rank == 1
    with pytest.raises(PeerError, match="rank 1 was lost between layers"):
        group[0].service()


def test_an_idle_wait_wakes_for_a_lost_peer(group: list[Exchange]) -> None:
    poller = zmq.Poller()
    group[0].service()
    for socket in group[0].poll_sockets():
        poller.register(socket, zmq.POLLIN)
    group[1].close()
    assert poller.poll(20_000)
    with pytest.raises(PeerError):
        for _ in range(1000):
            poller.poll(100)
            group[0].service()


@pytest.mark.parametrize(
    ("layer", "width", "digest", "message"),
    [
        (0, 4, 8, "rank 1 has another plan, routing, shape, dtype or algorithm: layer 0, step 0"),
        (0, 3, 7, "rank 1 has another plan, routing, shape, dtype or algorithm"),
        (2, 4, 7, "rank 1 is elsewhere: layer 2, step 0; rank 0 is at layer 0"),
    ],
)
def test_divergence(
    group: list[Exchange], layer: int, width: int, digest: int, message: str
) -> None:
    ours, theirs = together(
        [
            lambda: group[0].all_reduce(Call(0, 1, 4, mx.float32, 7), None),
            lambda: group[1].all_reduce(Call(layer, 1, width, mx.float32, digest), None),
        ]
    )
    assert isinstance(ours, DivergenceError) and message in str(ours)
    assert isinstance(theirs, DivergenceError)


def test_ranks_with_different_plans(group: list[Exchange]) -> None:
    """Found in the first layer, though the routing is the same."""
    group[0].plan, group[1].plan = 2**64 - 1, 2**64 - 2
    call = Call(0, 1, 4, mx.float32, 7)
    results = together([lambda e=e: e.all_reduce(call, None) for e in group])
    for rank, result in enumerate(results):
        assert isinstance(result, DivergenceError)
        assert f"rank {1 - rank} has another plan, routing" in str(result)


def test_a_lost_frame_is_recovered() -> None:
    """The peer publishes before we have subscribed to anything: only a resend can help."""
    make = {"session": 5, "max_payload_bytes": 64, "small_payload_bytes": 64}
    with Exchange(0, 2, **make) as one, Exchange(1, 2, **make) as two:
        endpoints = [one.endpoint, two.endpoint]
        two.start_connect(endpoints)
        call = Call(0, 1, 1, mx.float32, 0)
        assert two.native.publish(0, call, Dtype.F32, (None, Dtype.F32), 1.0) == Status.OK
        one.start_connect(endpoints)
        ended = threading.Event()  # the one that has its sum serves the other until then

        def reduce_and_go_idle() -> float:
            total = one.all_reduce(call, mx.array([[2.0]])).item()
            while not ended.wait(0.001):
                one.service()
            return float(total)

        def collect_and_go_idle() -> float:
            out = np.empty(1, np.float32)
            try:
                two._collect(OutBuffer(out), Dtype.F32, 0)
                until = time.monotonic() + 20
                while two.stats["resend_served"] == 0 and time.monotonic() < until:
                    two.service()
            finally:
                ended.set()
            return float(out[0])

        sums = together(
            [
                reduce_and_go_idle,
                collect_and_go_idle,
            ]
        )
        assert sums == [2.0, 2.0]
        assert one.stats["resend_asked"] >= 1
        assert two.stats["resend_served"] >= 1


# ---- life ------------------------------------------------------------------------


def test_a_port_in_use(group: list[Exchange]) -> None:
    taken = group[0].endpoint.data_port
    with pytest.raises(InputError, match=f"port in use: 127.0.0.1:{taken}"):
        Exchange(0, 2, session=1, max_payload_bytes=1, small_payload_bytes=1, data_port=taken)
    with pytest.raises(InputError, match="cannot listen on 203.0.113.1"):
        Exchange(
            0, 2, session=1, max_payload_bytes=1, small_payload_bytes=1, bind_host="203.0.113.1"
        )


def test_who_did_not_join_is_named() -> None:
    make = {"session": 5, "max_payload_bytes": 64, "small_payload_bytes": 64}
    with Exchange(0, 3, **make) as one, Exchange(1, 3, **make) as two:
        absent = Endpoint("127.0.0.1", 9, 10)
        endpoints = [one.endpoint, two.endpoint, absent]
        two.start_connect(endpoints)
        with pytest.raises(LaunchError, match=r"within 0.3 s: .*rank 2 at 127.0.0.1:9"):
            one.connect(endpoints, 0.3)
        with pytest.raises(InputError, match="2 endpoints for 3 nodes"):
            one.connect(endpoints[:2], 1)


def test_another_session_is_not_joined() -> None:
    make = {"max_payload_bytes": 64, "small_payload_bytes": 64}
    with Exchange(0, 2, session=1, **make) as one, Exchange(1, 2, session=2, **make) as two:
        endpoints = [one.endpoint, two.endpoint]
        two.start_connect(endpoints)
        with pytest.raises(LaunchError, match="rank 1"):
            one.connect(endpoints, 0.3)
        assert one._context.authenticator.refused == ["127.0.0.1, who has no token"]


def test_a_rank_has_joined_once_it_can_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a ROUTER has heard a peer, it drops what it has for it."""
    monkeypatch.setattr(zmq, "PROBE_ROUTER", zmq.IMMEDIATE)  # it says nothing
    with pytest.raises(LaunchError, match="rank 1"):
        local_group(2, deadline_s=1.0)


def test_close_is_final_and_idempotent(group: list[Exchange]) -> None:
    together([lambda r=r: group[r].all_reduce_numpy(np.ones(2, np.float32)) for r in range(2)])
    group[0].close()
    group[0].close()
    assert group[0].stats["exchanges"] == 1
    assert group[0].pool_stats["acquired"] == 1
    with pytest.raises(ZmoeError, match="not connected"):
        group[0].service()


def test_a_step_that_was_taken_is_refused(group: list[Exchange]) -> None:
    together([lambda r=r: group[r].all_reduce_numpy(np.ones(2, "f4")) for r in range(2)])
    group[0].step = 0
    with pytest.raises(ZmoeError, match="does not come after"):
        group[0].all_reduce_numpy(np.ones(2, np.float32))


@pytest.mark.parametrize(("rank", "nodes"), [(0, 1), (2, 2), (-1, 2), (0, 65)])
def test_impossible_ranks(rank: int, nodes: int) -> None:
    with pytest.raises(InputError, match="expected 2 to 64"):
        Exchange(rank, nodes, session=1, max_payload_bytes=1, small_payload_bytes=1)


@pytest.mark.parametrize("address", ["nohost", "host:", "host:port", ":1", "h:0", "h:65535"])
def test_join_refuses_bad_addresses(address: str) -> None:
    with pytest.raises(InputError, match="expected host:port"):
        join(0, ["127.0.0.1:9000", address])


def test_a_single_node_needs_nobody() -> None:
    alone = SingleNode()
    out = alone.all_reduce(Call(0, 2, 3, mx.bfloat16, 0), mx.ones((2, 3)))
    assert out.dtype == mx.bfloat16 and out.shape == (2, 3)
    assert mx.array_equal(alone.all_reduce(Call(0, 2, 3, mx.float16, 0), None), mx.zeros((2, 3)))


def test_a_forked_child_is_refused(group: list[Exchange]) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            group[0].all_reduce_numpy(np.ones(4, np.float32))
        except ZmoeError as problem:
            code = 0 if "this process was forked" in str(problem) else 2
        group[0].close()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    group[0].service()  # the parent's goes on


# ---- no buffer is free ----------------------------------------------------------------


def without_a_buffer(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets publishing come back without a buffer three times; returns those times."""
    publish, vain = exchange.native.publish, list[int]()

    def stalled(*given: Any) -> int:
        if len(vain) == 3:
            return publish(*given)
        vain.append(Status.INTERRUPTED)
        return Status.INTERRUPTED

    monkeypatch.setattr(exchange.native, "publish", stalled)
    return vain


def test_a_sum_waits_for_a_buffer(group: list[Exchange], monkeypatch: pytest.MonkeyPatch) -> None:
    vain, ticks = without_a_buffer(group[0], monkeypatch), list[int]()
    group[0].tick = lambda: ticks.append(1)
    sums = together([partial(each.all_reduce_numpy, np.ones(4, np.float32)) for each in group])
    assert len(vain) == 3 and len(ticks) >= 3  # it came back to Python meanwhile
    for found in sums:
        np.testing.assert_array_equal(found, np.full(4, 2, np.float32))


def test_a_peer_lost_while_no_buffer_is_free(
    group: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_buffer(group[0], monkeypatch)
    group[1].close()
    with pytest.raises(PeerError, match="rank 1 was lost at layer 3, step 0"):
        group[0].all_reduce(Call(3, 1, 4, mx.float32, 0), None)


ABANDON = """
import gc
from zmoe.cluster.leader_bus import LeaderBus
from zmoe.exchange.local import Exchange
from zmoe.exchange.sockets import Context

def abandon():
    context = Context()
    bus = LeaderBus(context, "127.0.0.1", 0, session=1, nodes=2, grace=1.0)
    exchange = Exchange(0, 2, session=1, max_payload_bytes=64, small_payload_bytes=64)
    for one in (bus, exchange):
        one.others = (context, bus, exchange)

abandon()
gc.collect()
"""


def test_what_nobody_closed_is_collected_at_once() -> None:
    """As after an error, whose traceback holds everything: pyzmq's own context waits for ever."""
    done = subprocess.run([sys.executable, "-c", ABANDON], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
