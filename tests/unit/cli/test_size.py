"""Sizes as people read them."""

from __future__ import annotations

import pytest

from zmoe.cli.common import size_text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (3 << 20, "3 MiB"),
        (1000 << 20, "0.977 GiB"),
        (2.53 * 2**30, "2.53 GiB"),
        (512 << 30, "512 GiB"),
        (1 << 40, "1 TiB"),
    ],
)
def test_three_digits(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text
