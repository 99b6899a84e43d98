"""Both algorithms, all wire dtypes, whole and in parts: against numpy, and rank against rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.exchange.test_exchange import together
from zmoe.errors import DivergenceError, InputError
from zmoe.exchange.algorithm import LARGE_BYTES, SMALL_BYTES, Choice
from zmoe.exchange.base import Call
from zmoe.exchange.local import Exchange, SingleNode, local_group
from zmoe.native import Algorithm, Dtype

Array = npt.NDArray[np.float32]
# Not multiples of the blocks of 32, fewer elements than ranks, and more than one block.
SHAPES = [(1, 1), (1, 96), (3, 61), (7, 130), (0, 8), (64, 256)]
ALGORITHMS = ["direct", "scatter"]
WIRES = ["f32", "bf16", "f16", "q8"]


def bf16(x: Array) -> Array:
    """Rounded to nearest even, in whole numbers of the last place."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def q8(x: Array) -> Array:
    """What blocks of 32 make of the finite rows of x."""
    out = np.empty_like(x)
    for row, to in zip(x, out):
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            exact = (np.abs(block).max() / np.float32(127)).astype(np.float32)
            up = (exact.view(np.uint32).astype(np.uint64) + 0xFFFF) & 0xFFFF0000
            scale = up.astype(np.uint32).view(np.float32)
            if scale < 2.0**-126:
                to[start : start + 32] = 0
                continue
            to[start : start + 32] = (np.rint(block * (np.float32(1) / scale)) + 0) * scale
    return out


ENCODE: dict[str, Callable[[Array], Array]] = {
    "f32": lambda x: x,
    "bf16": bf16,
    "f16": lambda x: x.astype(np.float16).astype(np.float32),
    "q8": q8,
}


def expected(partials: Sequence[Array], wire: str) -> Array:
    """The sum in rank order of what travels, rounded as it would travel itself."""
    encode = ENCODE[wire]
    total = encode(partials[0])
    for partial in partials[1:]:
        total = (total + encode(partial)).astype(np.float32)
    return encode(total)


def partials_of(nodes: int, shape: tuple[int, int], seed: int) -> list[Array]:
    random = np.random.default_rng(seed)
    return [
        (random.standard_normal(shape) * 10.0 ** random.uniform(-3, 3)).astype(np.float32)
        for _ in range(nodes)
    ]


def close(group: Sequence[Exchange]) -> None:
    for exchange in group:
        exchange.close()


def sums(
    group: Sequence[Exchange], partials: Sequence[Any], shape: tuple[int, int], step: int
) -> list[Array]:
    """What each rank ends with; a partial may be an array, None, or a function."""
    outs = [np.full(shape, np.nan, np.float32) for _ in group]

    def run(rank: int) -> None:
        group[rank].step = step
        group[rank].all_reduce_host(Call(0, *shape, mx.float32, 7), partials[rank], outs[rank])

    for result in together([lambda r=r: run(r) for r in range(len(group))]):
        assert result is None
    return outs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_sums(nodes: int, wire: str, algorithm: str) -> None:
    group = local_group(
        nodes, max_payload_bytes=1 << 16, wire_dtype=wire, algorithm=algorithm, deadline_s=60
    )
    for step, shape in enumerate(SHAPES):
        partials = partials_of(nodes, shape, step)
        given: list[Array | None] = [*partials]
        if step % 2:
            partials[step % nodes][:], given[step % nodes] = 0, None
        outs = sums(group, given, shape, step)
        reference = expected(partials, wire)
        for out in outs:
            np.testing.assert_array_equal(out.view(np.uint32), reference.view(np.uint32))
        exact = sum(p.astype(np.float64) for p in partials)
        scale = sum(np.abs(p).max(initial=0) for p in partials)
        step_of = {"f32": 1e-6, "bf16": 2**-8, "f16": 2**-10, "q8": 1 / 126}[wire]
        np.testing.assert_allclose(outs[0], exact, atol=max(1e-30, 2 * scale * step_of))
    stats = group[0].stats
    sent = stats["frames_sent"] - stats["resend_served"]
    assert (sent > len(SHAPES)) == (algorithm == "scatter")
    close(group)


@pytest.fixture(params=[2, 4])
def groups(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Exchange]]]:
    made: list[Exchange] = []

    def make(**options: Any) -> list[Exchange]:
        group = local_group(request.param, max_payload_bytes=1 << 16, **options)
        made.extend(group)
        return group

    yield make
    close(made)


def rows_of(
    rank: int, partials: list[Array], asked: list[list[tuple[int, int]]]
) -> Callable[[int, int], Array | None]:
    """The rank's partial as a function; rank 1 adds nothing to the first rows."""

    def part(start: int, stop: int) -> Array | None:
        asked[rank].append((start, stop))
        return None if rank == 1 and start == 0 else partials[rank][start:stop]

    return part


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wire", ["bf16", "q8"])
def test_parts_change_no_bit(
    groups: Callable[..., list[Exchange]], wire: str, algorithm: str
) -> None:
    shape = (37, 70)
    results = []
    for parts in (1, 2, 5):
        group = groups(wire_dtype=wire, algorithm=algorithm, parts=parts)
        partials = partials_of(len(group), shape, 1)
        asked: list[list[tuple[int, int]]] = [[] for _ in group]
        for step in range(3):
            functions = [rows_of(rank, partials, asked) for rank in range(len(group))]
            outs = sums(group, functions, shape, step)
            for out in outs:
                np.testing.assert_array_equal(out, outs[0])
        edges = [stop for _, stop in asked[0][:parts]]
        assert [start for start, _ in asked[0][:parts]] == [0, *edges[:-1]] and edges[-1] == 37
        assert len(asked[0]) == 3 * parts
        results.append((edges[0], outs[0], sums(group, partials, shape, 3)[0]))
    for first, split, _ in results[1:]:  # the rows to which all ranks added something
        np.testing.assert_array_equal(split[first:], results[0][2][first:])


class Rows:
    """Rows of 61 elements by number; some ranks add nothing to some, and -0 to others."""

    def __init__(self, nodes: int) -> None:
        random = np.random.default_rng(5)
        size = 10.0 ** random.uniform(-9, 3, (40, 1, 1))
        values = random.standard_normal((40, nodes, 61)) * size
        values[random.random(values.shape) < 0.2] = -0.0
        self._owned = random.random((40, nodes)) < 0.6
        self._values = np.where(self._owned[:, :, None], values, 0).astype(np.float32)

    def sums(self, group: Sequence[Exchange], numbers: Sequence[int], step: int) -> list[Array]:
        """What the ranks end with, as float32: MLX arrays on rank 0, memory on the others."""
        call = Call(0, len(numbers), 61, mx.bfloat16, 7)
        outs = [np.empty((len(numbers), 61), np.float32) for _ in group]

        def run(rank: int) -> None:
            group[rank].step = step
            owned, values = self._owned[numbers, rank], self._values[numbers, rank]

            def part(start: int, stop: int) -> Array | None:
                return values[start:stop] if owned[start:stop].any() else None

            if rank == 0:
                total = group[0].all_reduce(call, lambda *at: to_mlx(part(*at)))
                outs[0][:] = np.asarray(total.astype(mx.float32))
            else:
                group[rank].all_reduce_host(call, part, outs[rank])

        assert together([lambda r=r: run(r) for r in range(len(group))]) == [None] * len(group)
        return outs


def to_mlx(part: Array | None) -> mx.array | None:
    return None if part is None else mx.array(part).astype(mx.bfloat16)


@pytest.mark.parametrize("wire", ["auto", *WIRES])
def test_a_row_is_summed_alike_among_any_others(
    groups: Callable[..., list[Exchange]], wire: str
) -> None:
    """In batches of up to 33, by both algorithms, whole and in parts."""
    kinds = [
        groups(wire_dtype=wire, algorithm=algorithm, parts=parts)
        for algorithm in ALGORITHMS
        for parts in (1, 3)
    ]
    rows, random = Rows(len(kinds[0])), np.random.default_rng(6)
    alone = [rows.sums(kinds[0], [number], number) for number in range(40)]
    for size in range(1, 34):
        numbers = random.integers(0, 40, size).tolist()
        for rank, out in enumerate(rows.sums(kinds[size % 4], numbers, 40 + size)):
            want = np.concatenate([alone[number][rank] for number in numbers])
            np.testing.assert_array_equal(out.view(np.uint32), want.view(np.uint32))


def test_in_f32_both_algorithms_give_the_same_bits(groups: Callable[..., list[Exchange]]) -> None:
    outs = []
    for algorithm in ALGORITHMS:
        group = groups(algorithm=algorithm)
        outs.append(sums(group, partials_of(len(group), (9, 64), 2), (9, 64), 0)[0])
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_to_mlx(groups: Callable[..., list[Exchange]], algorithm: str) -> None:
    """In parts, of bfloat16: a sum in the wire's own dtype is the same by both algorithms."""
    group = groups(algorithm=algorithm, parts=2)
    shape = (6, 33)
    partials = partials_of(len(group), shape, 3)
    arrays = [mx.array(partial).astype(mx.bfloat16) for partial in partials]
    mx.eval(arrays)
    host = [bf16(partial) for partial in partials]
    call = Call(0, *shape, mx.bfloat16, 7)

    def peer(rank: int) -> None:
        out = np.empty(shape, np.float32)
        group[rank].all_reduce_host(call, lambda a, b: host[rank][a:b], out)

    total, *others = together(
        [
            lambda: group[0].all_reduce(call, lambda a, b: arrays[0][a:b]),
            *(lambda r=r: peer(r) for r in range(1, len(group))),
        ]
    )
    assert others == [None] * (len(group) - 1) and isinstance(total, mx.array)
    assert total.dtype == mx.bfloat16
    reference = expected(partials, "bf16")
    np.testing.assert_array_equal(np.asarray(total.astype(mx.float32)), reference)


def test_a_wider_wire_keeps_what_a_narrow_one_rounds() -> None:
    """f32 between nodes of a bfloat16 model: the sum arrives as float32."""
    group = local_group(2, max_payload_bytes=1 << 12, wire_dtype="f32")
    value = np.full((1, 8), 1 + 2.0**-12, np.float32)
    assert group[0].sum_dtype(mx.bfloat16) == mx.float32
    assert group[0].sum_dtype(mx.float32) == mx.float32
    outs = sums(group, [value, value], (1, 8), 0)
    np.testing.assert_array_equal(outs[1], 2 * value)
    close(group)
    assert SingleNode().sum_dtype(mx.bfloat16) == mx.bfloat16
    with pytest.raises(InputError, match="wire_dtype is int4: expected auto or f32"):
        local_group(2, wire_dtype="int4")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_finite_shows(algorithm: str, bad: float) -> None:
    group = local_group(3, max_payload_bytes=1 << 16, wire_dtype="q8", algorithm=algorithm)
    partials = partials_of(3, (4, 100), 4)
    partials[1][2, 40] = bad
    for out in sums(group, partials, (4, 100), 0):
        lost = ~np.isfinite(out)
        assert lost[2, 32:64].all() and lost.sum() == 32  # its block, and nothing else
    close(group)


# ---- who must agree -----------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"choice": Choice(2, "direct", parts=1)},
        {"choice": Choice(2, "scatter", parts=2)},
        {"wire": Dtype.BF16},
    ],
    ids=["algorithm", "parts", "dtype"],
)
def test_ranks_that_choose_differently(other: dict[str, Any]) -> None:
    group = local_group(2, max_payload_bytes=1 << 16, algorithm="scatter", parts=1)
    for name, value in other.items():
        setattr(group[1], name, value)
    data = np.ones((8, 64), np.float32)
    results = together(
        [
            lambda r=r: group[r].all_reduce_host(
                Call(0, 8, 64, mx.float32, 7), lambda a, b: data[a:b], np.empty_like(data)
            )
            for r in range(2)
        ]
    )
    assert all(isinstance(result, DivergenceError) for result in results)
    close(group)


def test_calibration_is_agreed() -> None:
    group = local_group(3, max_payload_bytes=2 * LARGE_BYTES)
    for result in together([exchange.calibrate for exchange in group]):
        assert result is None
    chosen = [exchange.choice for exchange in group]
    assert len({choice.scatter_from for choice in chosen}) == 1
    assert chosen[0]._lines == chosen[1]._lines == chosen[2]._lines is not None
    assert chosen[0]._lines[0].at(LARGE_BYTES) > 0
    partials = partials_of(3, (1, 8), 0)
    outs = sums(group, partials, (1, 8), 1)  # the first step after it
    np.testing.assert_array_equal(outs[2], expected(partials, "f32"))
    close(group)


def test_no_chunk_is_refused() -> None:
    """However fast exchanges follow each other: a refused one costs a request for it."""
    group = local_group(2, max_payload_bytes=1 << 16, algorithm="scatter")

    def run(exchange: Exchange) -> None:
        exchange.native.time_exchanges(3072, Dtype.F32, Algorithm.SCATTER, 500)

    for result in together([lambda e=e: run(e) for e in group]):
        assert result is None
    for exchange in group:
        stats = exchange.stats
        assert stats["frames_sent"] - stats["resend_served"] == 1000
    close(group)


def test_small_payloads_need_no_calibration() -> None:
    group = local_group(2, max_payload_bytes=SMALL_BYTES)
    group[0].calibrate()  # alone: nothing is exchanged
    assert group[0].step == 1 and group[0].choice.scatter_from == math.inf
    close(group)


# ---- no peers -----------------------------------------------------------------------


def test_a_single_node_computes_all_rows_at_once() -> None:
    alone, out = SingleNode(), np.empty((3, 2), np.float32)
    asked: list[tuple[int, int]] = []

    def part(start: int, stop: int) -> Array:
        asked.append((start, stop))
        return np.ones((stop - start, 2), np.float32)

    alone.all_reduce_host(Call(0, 3, 2, mx.bfloat16, 0), part, out)
    assert asked == [(0, 3)] and (out == 1).all()
    total = alone.all_reduce(Call(0, 3, 2, mx.float16, 0), lambda a, b: mx.ones((b - a, 2)))
    assert total.dtype == mx.float16 and mx.all(total == 1).item()
