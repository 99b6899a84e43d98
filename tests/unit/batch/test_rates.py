"""The time of a step by its rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmoe.batch.rates import MEMORY, Rates


def test_nothing_is_known_at_first() -> None:
    assert Rates().seconds(1) is None
    assert Rates().rows(1.0) == 0


def test_lines_between_and_proportion_beyond() -> None:
    rates = Rates()
    rates.took(10, 0.1)
    rates.took(100, 0.4)
    assert rates.seconds(1) == rates.seconds(10) == pytest.approx(0.1)
    assert rates.seconds(55) == pytest.approx(0.25)
    assert rates.seconds(200) == pytest.approx(0.8)
    assert rates.rows(0.05) == 0
    assert rates.rows(0.2501) == 55
    assert rates.rows(0.801) == 200


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 100)), min_size=1), st.floats(0, 100))
def test_the_rows_stay_within_the_time(measured: list[tuple[int, float]], within: float) -> None:
    rates = Rates()
    for rows, seconds in measured:
        rates.took(rows, seconds)
    if rows := rates.rows(within):
        predicted = rates.seconds(rows)
        assert predicted is not None and predicted <= within * (1 + 1e-6)


def test_a_slower_machine_is_noticed_and_an_old_measurement_forgotten() -> None:
    rates = Rates()
    rates.took(512, 5.0)
    for _ in range(20):
        rates.took(16, 0.1)
    assert rates.rows(0.25) < 64
    for _ in range(MEMORY):
        rates.took(16, 0.01)
    assert rates.rows(0.25) == pytest.approx(400, abs=2)
    for _ in range(20):
        rates.took(16, 0.2)
    assert rates.rows(0.25) == pytest.approx(20, abs=1)
