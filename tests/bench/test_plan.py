"""How long the plan of a step takes from the leader to a worker, at 32 sequences."""

from __future__ import annotations

from dataclasses import replace

from pytest_benchmark.fixture import BenchmarkFixture

from zmoe.batch.plan import Plan, Span
from zmoe.cluster.messages import Step, decode, encode

SEQUENCES = 32
PLAN = Plan(
    step=1000,
    spans=tuple(Span(1000 + number, 128 + 7 * number, 1, 1) for number in range(SEQUENCES)),
    tokens=tuple(1000 * number for number in range(SEQUENCES)),
    blocks=(500,),
)


def test_encode(benchmark: BenchmarkFixture) -> None:
    assert len(benchmark(encode, Step(PLAN))) < 1024


def test_decode(benchmark: BenchmarkFixture) -> None:
    assert benchmark(decode, encode(Step(PLAN))) == Step(PLAN)


def test_digest(benchmark: BenchmarkFixture) -> None:
    assert (
        benchmark(lambda: replace(PLAN).digest)
        != Plan(PLAN.step + 1, PLAN.spans, PLAN.tokens).digest
    )
