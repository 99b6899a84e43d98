"""A plain test run calls each benchmark once; `--benchmark-enable` measures."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture
def benchmark(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> BenchmarkFixture:
    """pytest-benchmark's fixture, asleep unless measuring was asked for."""
    wanted = ("benchmark_enable", "benchmark_only")
    if not any(pytestconfig.getoption(name) for name in wanted):
        benchmark.disabled = True
    return benchmark
