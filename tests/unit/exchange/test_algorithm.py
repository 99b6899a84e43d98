"""Which algorithm, and how many parts: pure functions of rank 0's figures."""

from __future__ import annotations

import math

import pytest

from zmoe.errors import InputError
from zmoe.exchange.algorithm import (
    LARGE_BYTES,
    SMALL_BYTES,
    Choice,
    Line,
    crossover,
    line_through,
    measure,
)
from zmoe.native import Algorithm


def test_the_line_through_two_points() -> None:
    line = line_through((1000, 110.0), (11000, 210.0))
    assert (line.start, line.per_byte) == (pytest.approx(100), pytest.approx(0.01))
    assert line_through((1000, 50.0), (2000, 40.0)) == Line(50.0, 0.0)  # noise
    assert line_through((1000, 10.0), (2000, 40.0)) == Line(0.0, 0.03)


def test_the_crossover() -> None:
    assert crossover(Line(50, 0.03), Line(150, 0.02)) == SMALL_BYTES  # lines cross below
    assert crossover(Line(50, 0.003), Line(150, 0.002)) == pytest.approx(100_000)
    assert crossover(Line(50, 0.003), Line(150, 0.003)) == math.inf
    assert crossover(Line(50, 0.003), Line(150, 0.0028)) == math.inf  # by 4%: may be chance


def test_measuring_takes_the_median_of_both() -> None:
    asked: list[tuple[int, Algorithm]] = []

    def exchange_us(size: int, algorithm: Algorithm) -> float:
        asked.append((size, algorithm))
        late = 1e6 if asked.count((size, algorithm)) in (1, 4) else 0.0  # a first one, and one more
        return late + (100 if algorithm is Algorithm.SCATTER else 50) + size / 1000

    found = measure(exchange_us, 1 << 30, True)
    assert found is not None
    direct, scatter = found
    assert direct.start == pytest.approx(50) and direct.per_byte == pytest.approx(1e-3)
    assert scatter.start == pytest.approx(100)
    assert {size for size, _ in asked} == {SMALL_BYTES, LARGE_BYTES}
    asked.clear()
    assert measure(exchange_us, 1 << 30, False) == (direct, direct)
    assert {algorithm for _, algorithm in asked} == {Algorithm.DIRECT}
    assert measure(exchange_us, SMALL_BYTES, True) is None


def test_what_is_chosen() -> None:
    auto = Choice(4)
    assert auto.algorithm(1 << 30) is Algorithm.DIRECT  # until it has learnt
    assert auto.bounds(4096, 1 << 30) == [(0, 4096)]
    auto.learn(Line(50, 0.003), Line(150, 0.002))
    assert auto.algorithm(99_000) is Algorithm.DIRECT
    assert auto.algorithm(101_000) is Algorithm.SCATTER
    assert auto.bounds(512, 900_000) == [(0, 512)]  # 1.95 ms are not worth hiding
    assert auto.bounds(513, 1 << 20) == [(0, 128), (128, 256), (256, 384), (384, 513)]
    assert auto.bounds(129, 1 << 20) == [(0, 64), (64, 129)]
    assert auto.bounds(63, 1 << 20) == [(0, 63)]
    pair = Choice(2)
    pair.learn(Line(50, 0.003), Line(150, 0.002))
    assert pair.algorithm(1 << 30) is Algorithm.DIRECT and not pair.may_scatter
    fixed = Choice(4, "scatter", parts=3)
    fixed.learn(Line(50, 0.003), Line(150, 0.003))
    assert fixed.algorithm(512) is Algorithm.SCATTER
    assert fixed.algorithm(511) is Algorithm.DIRECT  # no whole block a rank
    assert fixed.bounds(2, 8) == [(0, 1), (1, 2)]
    assert fixed.bounds(0, 0) == [(0, 0)]
    with pytest.raises(InputError, match="algorithm is ring: expected auto or direct or scatter"):
        Choice(2, "ring")
