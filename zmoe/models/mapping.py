"""Weights that stay in their files: mapped, so that nodes of one machine share them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from zmoe.compute.weight import Stored
from zmoe.errors import ModelError
from zmoe.models.share import MLX_DTYPES, Piece
from zmoe.native import ffi

if TYPE_CHECKING:
    from zmoe.native import CData

_CHUNK_BYTES = 64 << 20
_PAGE_BYTES = 4096
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14


def can_be_mapped(piece: Piece) -> bool:
    """Whether the piece is one run of bytes in its file, its padding apart."""
    return len(piece.rows) == 1 and piece.nbytes > 0


class Mapping:
    """Read-only maps of a checkpoint's files; `bytes_read` counts what was paged in."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, tuple[mmap.mmap, CData]] = {}

    def stored(self, piece: Piece, progress: Callable[[int], None]) -> Stored:
        """The piece's real rows where they lie, paged in; `progress` gets bytes now and then."""
        memory, base = self._file(piece.source.file)
        start = piece.source.start + piece.rows[0][0] * piece.row_bytes
        if start + piece.nbytes > len(memory):
            raise ModelError(
                f"{piece.source.file} is truncated: tensor {piece.source.name} ends early"
            )
        for at in range(0, piece.nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, piece.nbytes - at)
            _page_in(memory, start + at, size)
            self.bytes_read += size
            progress(size)
        shape = (piece.shape[0] - piece.padding, *piece.shape[1:])
        dtype = MLX_DTYPES[piece.source.dtype]
        assert math.prod(shape) * dtype.size == piece.nbytes
        return Stored(base, base + start, dtype, shape)

    def _file(self, path: Path) -> tuple[mmap.mmap, CData]:
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be mapped: {error}") from None
            self._files[path] = (memory, ffi.from_buffer("uint8_t[]", memory))
        return self._files[path]


def _page_in(memory: mmap.mmap, start: int, size: int) -> None:
    """So that the first token does not wait for the disk."""
    begin = start // _PAGE_BYTES * _PAGE_BYTES
    end = min(start + size, len(memory))
    with suppress(OSError, ValueError):
        memory.madvise(_POPULATE_READ, begin, end - begin)
        return
    sum(memory[begin:end:_PAGE_BYTES])  # the system is older: touch every page
