"""Sizes as people read them."""

from __future__ import annotations

import pytest

from zmoe.perf.units import in_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.977 KiB"),
        (3 << 20, "3 MiB"),
        (0.328 * 2**30, "336 MiB"),
        (1023 << 20, "0.999 GiB"),
        (5 << 40, "5120 GiB"),
    ],
)
def test_three_digits_and_a_unit(count: float, text: str) -> None:
    assert in_bytes(count) == text
