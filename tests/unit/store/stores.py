"""Small stores, and how to damage them."""

from __future__ import annotations

from pathlib import Path

from zmoe.loading import Skeleton, describe
from zmoe.store.writer import Quantization, prestack

EXPERTS_1 = "experts-00001.safetensors"


def quietly(done: int, total: int) -> None:
    """No progress is shown."""


def store_of(source: Path, out: Path, quantization: Quantization | None = None) -> Path:
    prestack(describe(Skeleton(source)), out, quantization, quietly)
    return out


def flip(path: Path, at: int) -> None:
    """Change one bit of the file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
