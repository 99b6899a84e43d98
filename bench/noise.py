"""Random weights, streamed into a safetensors file: memory stays at a few blocks.

A block of random rows is made once for each row length (and quantised once),
then repeated: gigabytes take seconds. Each tensor begins at another row, and a
block has an odd number of rows, so that no two experts come out alike.

A matrix neither magnifies nor shrinks what it is multiplied with, and
embeddings are larger than what a layer adds to them. Otherwise the mean over
the context, which attention adds to every row, would take over within a few
layers, and the router would send all rows to the same experts.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK = 1 << 22  # random numbers of a block
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
EMBEDDING_SPREAD = 4.0
STRIDE = 7919  # rows from one tensor's beginning to the next one's
ITEM_BYTES = {"F32": 4, "BF16": 2, "U32": 4, "U8": 1}
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `rows` (rows, bytes of a row) is repeated from row `first` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: np.ndarray[Any, np.dtype[np.uint8]]
    first: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        """The tensor's bytes, at most a block at a time."""
        source = self.rows.reshape(-1).data
        left, at = self.nbytes, self.first % len(self.rows) * self.rows.shape[1]
        while left > 0:
            part = source[at : at + left]
            yield part
            left, at = left - len(part), 0


def spread(name: str, columns: int) -> float:
    """The standard deviation of the numbers of the matrix `name`."""
    return EMBEDDING_SPREAD if name.endswith(EMBEDDINGS) else columns**-0.5


@cache
def noise(columns: int, spread: float, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """An odd number of random rows of `columns` numbers with that standard deviation."""
    rows = max(1, BLOCK // columns) | 1
    # Numbers of their own for embeddings: a row that a matrix has too would excite it.
    random = np.random.default_rng((seed, columns, int(spread * 2**20)))
    return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(spread)


def encoded(
    values: np.ndarray[Any, np.dtype[np.float32]], dtype: str
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`values` (rows, columns) in safetensors' `dtype`, rows of bytes; BF16 rounds to nearest."""
    if dtype == "F32":
        return values.view(np.uint8)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


@cache
def _plain_rows(
    columns: int, spread: float, dtype: str, seed: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return encoded(noise(columns, spread, seed), dtype)


def plain(name: str, shape: tuple[int, ...], dtype: str, number: int, seed: int) -> Tensor:
    """An unquantised tensor: noise, but for vectors, which are norms and get ones."""
    if len(shape) == 1:
        return Tensor(name, dtype, shape, encoded(np.ones((1, shape[0]), np.float32), dtype))
    rows = _plain_rows(shape[-1], spread(name, shape[-1]), dtype, seed)
    return Tensor(name, dtype, shape, rows, number * STRIDE)


def write_safetensors(path: Path, tensors: Sequence[Tensor], written_by: str) -> int:
    """Write one file, `written_by` "pt" or "mlx" as mlx-lm tells them apart; returns its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": written_by}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(chunk)
        _forget(file)
        return file.tell()


def _forget(file: BinaryIO) -> None:
    """Have the system read `file` from its disk when it is needed, in large pages where somebody
    asks for them, as if it had lain there for long: what was written stays in small ones.
    """
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
