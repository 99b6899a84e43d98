"""Sizes as people read them."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB")


def in_bytes(count: float) -> str:
    """`count` bytes to three digits, in the largest unit of which there is one: "3.07 MiB"."""
    unit, size = "bytes", count
    for larger in _UNITS:
        if abs(size) < 999.5:
            break
        unit, size = larger, size / 1024
    return f"{size:.0f} {unit}" if size >= 1000 else f"{size:.3g} {unit}"
