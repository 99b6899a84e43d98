"""Weights that stay in their files: mapped, so that nodes of one machine share them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from zmoe.checkpoint.safetensors import MLX_DTYPES
from zmoe.checkpoint.select import Piece, Reader
from zmoe.errors import ModelError
from zmoe.kernels.weights import Stored
from zmoe.loading.places import Place
from zmoe.loading.slices import Cut
from zmoe.native import ffi
from zmoe.topology.memory import move_near, near_numa_nodes

if TYPE_CHECKING:
    from zmoe.native import CData

_CHUNK_BYTES = 64 << 20
_PAGE_BYTES = 4096
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14


class Mapping:
    """Read-only maps of a checkpoint's files, near the CPUs that this process may use.

    `bytes_read` counts what was paged in, `far_bytes` what of it lies in the memory of NUMA
    nodes that have none of these CPUs: another process maps it, too, or has filled the near ones.
    """

    def __init__(self) -> None:
        self.bytes_read = self.far_bytes = 0
        self._near = near_numa_nodes()
        self._files: dict[Path, tuple[mmap.mmap, CData]] = {}

    def stored(
        self, place: Place, progress: Callable[[int], None], cut: Cut | None = None
    ) -> Stored:
        """The tensor where it lies, paged in, or a copy of what `cut` keeps of its matrices.

        It is valid while this object lives. `progress` gets the number of bytes that
        were read since its last call. Raises ModelError for a file that is truncated.
        """
        dtype = MLX_DTYPES[place.pieces[0].source.dtype]
        if cut is not None:
            return self._kept(place, dtype, cut, progress)
        runs = [self._run(piece) for piece in place.pieces]
        assert math.prod(place.shape) * dtype.size == sum(size for _, _, size in runs)
        pointers = []
        for file, start, nbytes in runs:
            memory, base = self._file(file)
            for at in range(0, nbytes, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, nbytes - at)
                _page_in(memory, start + at, size)
                if self._near:
                    address = int(ffi.cast("uintptr_t", base + start + at))
                    self.far_bytes += move_near(self._near, address, size)
                self.bytes_read += size
                progress(size)
            pointers.append(base + start)
        bases = [self._file(file)[1] for file, _, _ in runs]
        return Stored(bases, tuple(pointers), dtype, place.shape)

    def _kept(
        self, place: Place, dtype: mx.Dtype, cut: Cut, progress: Callable[[int], None]
    ) -> Stored:
        """A copy of what `cut` keeps of each matrix, read one matrix at a time.

        Kept rows could stay in the file, as one run of bytes per matrix. But a system that
        pages in such a run takes much of what lies around it too, and takes it again
        whenever memory was short.
        """
        count, rows, columns = place.shape
        (top, bottom), (left, right) = (0, rows), (0, columns * dtype.size)
        if cut.of_columns:
            left, right = (edge * dtype.size for edge in cut.edges(columns))
        else:
            top, bottom = cut.edges(rows)
        row_bytes = columns * dtype.size
        memory = _anonymous(count * (bottom - top) * (right - left))
        kept: Any = np.frombuffer(memory, np.uint8).reshape(count, bottom - top, right - left)
        read: Any = np.empty((bottom - top, row_bytes), np.uint8)
        with Reader() as reader:
            for matrix, piece in zip(kept, place.pieces, strict=True):
                _, start, _ = self._run(piece)
                into = read if cut.of_columns else matrix
                reader.read_range(piece.source, memoryview(into).cast("B"), start + top * row_bytes)
                if cut.of_columns:
                    matrix[:] = read[:, left:right]
                self.bytes_read += matrix.nbytes
                progress(matrix.nbytes)
        base = ffi.from_buffer("uint8_t[]", memory)
        return Stored(base, (base,), dtype, (count, bottom - top, (right - left) // dtype.size))

    def _run(self, piece: Piece) -> tuple[Path, int, int]:
        """The file of a piece, where it begins there, and its bytes."""
        file = piece.source.file
        ((start, nbytes),) = piece.runs()
        if start + nbytes > len(self._file(file)[0]):
            raise ModelError(f"{file} is truncated: tensor {piece.source.name} ends early")
        return file, start, nbytes

    def _file(self, path: Path) -> tuple[mmap.mmap, CData]:
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be mapped: {error}") from None
            _in_large_pages(memory)
            self._files[path] = (memory, ffi.from_buffer("uint8_t[]", memory))
        return self._files[path]


def _anonymous(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _in_large_pages(memory)
    return memory


def _in_large_pages(memory: mmap.mmap) -> None:
    """Where the system has them, for what is not in memory yet: experts are read at random."""
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)


def _page_in(memory: mmap.mmap, start: int, size: int) -> None:
    """So that the first token does not wait for the disk."""
    begin = start // _PAGE_BYTES * _PAGE_BYTES
    end = min(start + size, len(memory))
    with suppress(OSError, ValueError):
        memory.madvise(_POPULATE_READ, begin, end - begin)
        return
    sum(memory[begin:end:_PAGE_BYTES])  # the system is older: touch every page
