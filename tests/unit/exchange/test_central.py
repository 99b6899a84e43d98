"""The centralised schedule over real sockets: sums against numpy and the other schedule."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.utils import load_model

from tests.families import build
from tests.ranks import round_robin
from tests.unit.exchange.test_algorithms import expected
from tests.unit.exchange.test_exchange import together
from zmoe.errors import DivergenceError, InputError, PeerError, ZmoeError
from zmoe.exchange.base import Call
from zmoe.exchange.central import CentralExchange, Held, Sharing, serve_step
from zmoe.exchange.dispatched import DispatchBatch
from zmoe.exchange.local import Exchange, connect_group, local_group
from zmoe.families.table import ADAPTERS
from zmoe.loading import Skeleton, describe, load_experts, load_shard
from zmoe.native import Dtype
from zmoe.obs import Spans
from zmoe.placement.types import Placement

Array = npt.NDArray[np.float32]
EXPERTS, WIDTH, TOP_K, LAYERS = 8, 40, 3, 3


def placement(nodes: int) -> Placement:
    """Layer m gives expert e to rank (e + m) % nodes; expert 0 is on all of them (slices)."""
    layers = tuple(
        tuple(
            tuple(e for e in range(EXPERTS) if e == 0 or (e + m) % nodes == rank)
            for rank in range(nodes)
        )
        for m in range(LAYERS)
    )
    return Placement(nodes, EXPERTS, layers, tuple((r, r + 1) for r in range(nodes)))


ALL_ON_1 = Placement(2, EXPERTS, (((), tuple(range(EXPERTS))),) * LAYERS)


def expert(layer: int, rank: int, e: int, x: Array) -> Array:
    """Of every rank a different one, as slices are."""
    factor = np.float32(1 + 0.25 * e + 0.125 * rank + layer)
    return (x * factor).astype(np.float32)


class NumpyExperts:
    """A layer's experts on a worker."""

    def __init__(self, layer: int, rank: int, owned: Sequence[int]) -> None:
        self.local = np.full(EXPERTS, -1, np.int32)
        self.local[list(owned)] = np.arange(len(owned))
        self.width, self.dtype = WIDTH, mx.float32
        self._layer, self._rank, self._owned = layer, rank, owned

    def run_idle(self, received: DispatchBatch) -> None:
        self.busiest = received.busiest

    def partial(self, received: DispatchBatch) -> Array:
        assert received.dtype is Dtype.F32
        x = received.x.reshape(received.rows, received.width)
        out = np.zeros_like(x)
        pairs, weights = received.pairs()
        for row, slot, e in zip(pairs.rows, pairs.slots, pairs.experts):
            y = expert(self._layer, self._rank, self._owned[e], x[row])
            out[row] += weights[row, slot] * y
        return out


def central_group(
    nodes: int,
    placed: Placement | None = None,
    deadline_s: float = 30.0,
    grace_s: float = 60.0,
    **options: Any,
) -> list[CentralExchange]:
    made: list[CentralExchange] = []
    session = random.getrandbits(64)  # other test processes use the same ports, one after the other
    for rank in range(nodes):
        made.append(
            CentralExchange(
                rank,
                nodes,
                max_rows=64,
                max_pairs=64 * TOP_K,
                session=session,
                max_payload_bytes=1 << 15,
                small_payload_bytes=256,
                deadline_s=deadline_s,
                grace_s=grace_s,
                **options,
            )
        )
    endpoints = [exchange.endpoint for exchange in made]
    for exchange in made:
        exchange.place(placed or placement(nodes))
    connect_group(made, [endpoints] * nodes, 20)
    return made


@pytest.fixture
def groups() -> Iterator[Callable[..., list[CentralExchange]]]:
    made: list[CentralExchange] = []

    def make(*given: Any, **options: Any) -> list[CentralExchange]:
        group = central_group(*given, **options)
        made.extend(group)
        return group

    yield make
    for exchange in made:
        exchange.close()


Routed = tuple[Array, npt.NDArray[np.int32], Array]


def routed(rows: int, seed: int) -> Routed:
    """x, ids, weights; some ids are no experts."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, WIDTH)).astype(np.float32)
    ids = np.array([draw.permutation(EXPERTS + 2)[:TOP_K] - 1 for _ in range(rows)], np.int32)
    return x, ids.reshape(rows, TOP_K), draw.random((rows, TOP_K)).astype(np.float32)


def partial_of(nodes: int, layer: int, rank: int, given: Routed) -> Array | None:
    """What `rank` adds to all rows when it knows the whole routing; None for nothing."""
    x, ids, weights = given
    owned = placement(nodes).owned[layer][rank]
    if not np.isin(ids, owned).any():
        return None
    out = np.zeros_like(x)
    for row, slot in np.argwhere(np.isin(ids, owned)):
        out[row] += weights[row, slot] * expert(layer, rank, int(ids[row, slot]), x[row])
    return out


def worker(exchange: CentralExchange, step: int) -> None:
    owned = [layer[exchange.rank] for layer in placement(exchange.nodes).owned]
    layers: list[Held] = [NumpyExperts(m, exchange.rank, ids) for m, ids in enumerate(owned)]
    exchange.step = step
    serve_step(exchange, layers, Spans())


def leader(exchange: CentralExchange, given: Sequence[Routed], step: int) -> list[Array]:
    """The layers of one step, each with its own routing."""
    exchange.step, sums = step, []
    for layer, (x, ids, weights) in enumerate(given):
        out = np.full_like(x, np.nan)
        call = Call(layer, *x.shape, mx.float32, 7)
        exchange.dispatch(call, x, mx.float32, ids, weights)
        own = partial_of(exchange.nodes, layer, 0, (x, ids, weights))
        exchange.all_reduce_host(call, own, out)
        sums.append(out)
    return sums


def decentralised(nodes: int, wire: str, given: Sequence[Routed], step: int) -> list[Array]:
    group: list[Exchange] = local_group(nodes, wire_dtype=wire, algorithm="direct")

    def run(exchange: Exchange) -> list[Array]:
        exchange.step, sums = step, []
        for layer, routing in enumerate(given):
            out = np.empty_like(routing[0])
            own = partial_of(nodes, layer, exchange.rank, routing)
            exchange.all_reduce_host(Call(layer, *out.shape, mx.float32, 7), own, out)
            sums.append(out)
        return sums

    results: Any = together([lambda e=e: run(e) for e in group])
    for exchange in group:
        exchange.close()
    first: list[Array] = results[0]
    return first


@pytest.mark.parametrize("wire", ["f32", "bf16", "f16", "q8"])
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_sums_are_those_of_the_other_schedule_bit_for_bit(
    nodes: int, wire: str, groups: Callable[..., list[CentralExchange]]
) -> None:
    group = groups(nodes, wire_dtype=wire)
    for step, rows in enumerate([1, 7, 0, 64]):
        given = [routed(rows, 10 * step + layer) for layer in range(LAYERS)]
        jobs: list[Any] = [partial(leader, group[0], given, step)]
        jobs += [partial(worker, exchange, step) for exchange in group[1:]]
        found, *others = together(jobs)
        assert others == [None] * (nodes - 1)
        assert isinstance(found, list)
        other = decentralised(nodes, wire, given, step)
        for layer, (mine, theirs) in enumerate(zip(found, other, strict=True)):
            np.testing.assert_array_equal(mine.view(np.uint32), theirs.view(np.uint32))
            parts = [partial_of(nodes, layer, rank, given[layer]) for rank in range(nodes)]
            zeros = np.zeros_like(mine)
            want = expected([zeros if part is None else part for part in parts], wire)
            np.testing.assert_array_equal(mine, want)
    for exchange, peers in zip(group, (nodes - 1, *[1] * (nodes - 1)), strict=True):
        stats = exchange.stats  # a slow machine may ask for some again
        assert stats["frames_sent"] - stats["resend_served"] == 4 * LAYERS * peers


@pytest.mark.parametrize("wire", ["f32", "bf16", "f16", "q8"])
def test_a_row_is_summed_alike_among_any_others(
    wire: str, groups: Callable[..., list[CentralExchange]]
) -> None:
    """In passes of 1 to 64 rows, one step number each."""
    group, rows, draw = groups(3, wire_dtype=wire), routed(40, 1), np.random.default_rng(2)
    passes = [[number] for number in range(40)]
    passes += [draw.integers(0, 40, size).tolist() for size in (*range(1, 34), 64)]

    def lead() -> list[Array]:
        given = [tuple(each[numbers] for each in rows) for numbers in passes]
        return [leader(group[0], [one] * LAYERS, step)[1] for step, one in enumerate(given)]

    def follow(exchange: CentralExchange) -> None:
        for step in range(len(passes)):
            worker(exchange, step)

    sums, *others = together([lead, *(partial(follow, exchange) for exchange in group[1:])])
    assert others == [None, None] and isinstance(sums, list)
    for numbers, found in zip(passes[40:], sums[40:], strict=True):
        want = np.concatenate([sums[number] for number in numbers])
        np.testing.assert_array_equal(found.view(np.uint32), want.view(np.uint32))


def test_mlx_arrays_go_out_as_they_are(groups: Callable[..., list[CentralExchange]]) -> None:
    """Strided ones too, in bfloat16, and the sum lands in an MLX array."""
    one, two = groups(2, ALL_ON_1)
    x = mx.arange(6.0).reshape(3, 2).T.astype(mx.bfloat16)  # (2, 3)
    ids, weights = np.array([[4], [5]], np.int32), np.array([[1], [2]], np.float32)
    numbers = np.arange(EXPERTS, dtype=np.int32)

    def lead() -> mx.array:
        call = Call(0, 2, 3, mx.bfloat16, 7)
        one.dispatch(call, x, x.dtype, ids, weights)
        return one.all_reduce(call, mx.ones((2, 3)))

    def follow() -> None:
        received = two.receive(0, 3, numbers)
        assert received.dtype is Dtype.BF16
        rows = mx.array(received.x.reshape(2, 3)).view(mx.bfloat16)
        pairs, scale = received.pairs()
        assert pairs.experts.tolist() == [4, 5] and scale.tolist() == [[1], [2]]
        two.reply(0, received, rows * mx.array(scale).astype(mx.bfloat16), mx.bfloat16)

    total, told = together([lead, follow])
    assert told is None
    assert isinstance(total, mx.array) and total.dtype == mx.bfloat16
    assert total.tolist() == [[1, 3, 5], [3, 7, 11]]


def test_received_pairs_have_slots_within_their_rows() -> None:
    received = DispatchBatch(16, 5)
    received.raw.rows, received.raw.pairs = 3, 4
    received._rows[:4], received._experts[:4] = [0, 0, 2, 2], [3, 1, 0, 2]
    received._weights[:4] = [0.1, 0.2, 0.3, 0.4]
    pairs, weights = received.pairs()
    assert pairs.slots.tolist() == [0, 1, 0, 1] and pairs.experts.tolist() == [3, 1, 0, 2]
    np.testing.assert_allclose(weights, [[0.1, 0.2], [0, 0], [0.3, 0.4]], rtol=1e-6)


def test_owners_follow_the_placement() -> None:
    ids = np.array([[0, 1, 7], [-1, 8, 2]], np.int32)
    assert Sharing(placement(3), 0).masks(ids).tolist() == [[7, 2, 2], [0, 0, 4]]
    assert Sharing(placement(3), 1).masks(ids).tolist() == [[7, 4, 4], [0, 0, 1]]


def test_one_owner_of_a_replica() -> None:
    """Of two that hold an expert whole, the one with less to do."""
    spread = Placement(2, 3, (((0, 1), (0, 2)),))
    masks = Sharing(spread, 0).masks
    assert masks(np.array([[0, 1]], np.int32)).tolist() == [[2, 1]]
    assert masks(np.array([[0, 2]], np.int32)).tolist() == [[1, 2]]


def test_workers_hear_how_many_experts_the_busiest_rank_runs(
    groups: Callable[..., list[CentralExchange]],
) -> None:
    """Also the one without rows; their policy needs it."""
    owned = ((0, 1), (2, 3), (4, 5, 6, 7))
    group = groups(3, Placement(3, EXPERTS, (owned,)))
    ids = np.array([[4, 5, 0], [7, 4, 1]], np.int32)  # 2, none and 3 of them
    x, weights = np.ones((2, WIDTH), np.float32), np.ones((2, 3), np.float32)
    held = [NumpyExperts(0, rank, ids) for rank, ids in enumerate(owned)]

    def lead() -> None:
        call = Call(0, 2, WIDTH, mx.float32, 7)
        group[0].dispatch(call, x, mx.float32, ids, weights)
        group[0].all_reduce_host(call, x, np.empty_like(x))

    follow = [partial(serve_step, group[rank], [held[rank]], Spans()) for rank in (1, 2)]
    assert together([lead, *follow]) == [None] * 3
    assert [held[1].busiest, held[2].busiest] == [3, 3]


def test_a_block_without_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: Callable[..., list[CentralExchange]]
) -> None:
    """Every chosen expert's output is a row of its own then; as mlx-lm computes it."""
    monkeypatch.delitem(ADAPTERS, "qwen2_moe.Qwen2MoeSparseMoeBlock")
    folder = build("qwen2_moe", tmp_path)
    info = describe(Skeleton(folder))
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    want = np.array(load_model(folder)[0](tokens))
    spread = round_robin(3, info.experts, len(info.moe_layers))
    group = groups(3, spread)

    def lead() -> npt.NDArray[np.float32]:
        model = load_shard(info, spread, group[0], spans=Spans()).model
        return np.array(model(tokens))

    def follow(exchange: CentralExchange) -> None:
        serve_step(exchange, load_experts(info, spread, exchange).layers, Spans())
        mx.clear_streams()  # or MLX may abort the process when it exits

    logits, *others = together([lead, partial(follow, group[1]), partial(follow, group[2])])
    assert others == [None, None]
    assert isinstance(logits, np.ndarray)
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())


# ---- what goes wrong ---------------------------------------------------------------


def dispatch(exchange: CentralExchange, layer: int = 0, rows: int = 1) -> None:
    x, ids, weights = routed(rows, 1)
    ids[:] = [1, 2, 3]
    exchange.dispatch(Call(layer, *x.shape, mx.float32, 7), x, mx.float32, ids, weights)


def test_a_lost_or_silent_worker(groups: Callable[..., list[CentralExchange]]) -> None:
    group = groups(3, deadline_s=0.1, grace_s=0.2)
    group[0].step = 12
    dispatch(group[0], 4 % LAYERS)
    with pytest.raises(PeerError, match="rank 1 sent nothing within 0.1 s .nor did 2."):
        group[0].all_reduce(Call(1, 1, WIDTH, mx.float32, 7), None)
    group[2].close()
    time.sleep(0.3)
    with pytest.raises(PeerError, match="rank 2 was lost") as caught:
        for _ in range(1000):
            group[0].service()
            time.sleep(0.01)
    assert caught.value.rank == 2


def test_a_lost_or_silent_leader(groups: Callable[..., list[CentralExchange]]) -> None:
    group = groups(3, deadline_s=0.1, grace_s=0.2)
    local = np.zeros(EXPERTS, np.int32)
    group[1].step = 5
    with pytest.raises(PeerError, match="rank 0 sent nothing within 0.2 s") as silent:
        group[1].receive(2, WIDTH, local)
    assert (silent.value.layer, silent.value.step) == (2, 5)
    group[0].close()
    time.sleep(0.3)
    with pytest.raises(PeerError, match="rank 0 was lost at layer 2, step 5"):
        for _ in range(1000):
            try:
                group[1].receive(2, WIDTH, local)
            except PeerError as problem:
                if "was lost" in str(problem):
                    raise


def test_an_expert_of_another_rank(groups: Callable[..., list[CentralExchange]]) -> None:
    group = groups(2, ALL_ON_1)
    dispatch(group[0])
    nothing = np.full(EXPERTS, -1, np.int32)
    with pytest.raises(DivergenceError, match="rank 0 has another plan, routing"):
        group[1].receive(0, WIDTH, nothing)


def test_a_worker_with_another_plan(groups: Callable[..., list[CentralExchange]]) -> None:
    group = groups(2)
    given = [routed(3, layer) for layer in range(LAYERS)]
    for exchange in group:
        exchange.plan = 77
    jobs = [lambda: leader(group[0], given, 0), lambda: worker(group[1], 0)]
    sums, told = together(jobs)
    assert isinstance(sums, list) and told is None
    group[1].plan = 78
    jobs = [lambda: leader(group[0], given, 1), lambda: layer_0(group[1])]
    problem, _ = together(jobs)
    assert isinstance(problem, DivergenceError)
    assert "rank 1 has another plan, routing" in str(problem) and "layer 0, step 1" in str(problem)


def layer_0(exchange: CentralExchange) -> None:
    held = NumpyExperts(0, exchange.rank, placement(exchange.nodes).owned[0][exchange.rank])
    exchange.step = 1
    serve_step(exchange, [held], Spans())


def test_rows_of_another_width(groups: Callable[..., list[CentralExchange]]) -> None:
    group = groups(2, ALL_ON_1)
    dispatch(group[0])
    with pytest.raises(DivergenceError, match="rank 0 has another plan, routing, shape"):
        group[1].receive(0, WIDTH + 1, np.zeros(EXPERTS, np.int32))


def test_a_caller_out_of_turn(groups: Callable[..., list[CentralExchange]]) -> None:
    group = groups(2)
    with pytest.raises(InputError, match="65 rows of 40 .*float32 do not fit"):
        dispatch(group[0], rows=65)
    with pytest.raises(ZmoeError, match="does not come after"):
        group[0].all_reduce(Call(0, 1, WIDTH, mx.float32, 7), None)  # nothing was dispatched
    dispatch(group[0])
    with pytest.raises(InputError, match="layer 0, step 0 does not come after the last one"):
        dispatch(group[0])


def test_spans_measure_both_sides(groups: Callable[..., list[CentralExchange]]) -> None:
    spans = [Spans(), Spans()]
    group = groups(2)
    group[0].spans = spans[0]
    given = [routed(3, layer) for layer in range(LAYERS)]
    owned = [layer[1] for layer in placement(2).owned]

    def slow(layer: int, ids: Sequence[int]) -> Held:
        held = NumpyExperts(layer, 1, ids)
        quick = held.partial
        held.partial = lambda received: (time.sleep(0.02), quick(received))[1]  # type: ignore
        return held

    layers = [slow(m, ids) for m, ids in enumerate(owned)]
    together([lambda: leader(group[0], given, 0), lambda: serve_step(group[1], layers, spans[1])])
    assert spans[1].seconds["experts"] >= 0.06
    assert spans[0].seconds["exchange"] >= 0.05
