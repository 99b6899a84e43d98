"""A node's share of a checkpoint, as one virtual safetensors file.

MLX loads tensors lazily from any file-like object. `Share` offers it a file
that never exists: the node's own experts, renumbered from 0, and every dense
tensor, put together from byte ranges of the real files that are read only
when MLX asks for them. So mlx-lm's own renaming, stacking and quantising work
on the share as they would on a whole small model, and what mlx-lm drops is
never read.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from zmoe.errors import ModelError
from zmoe.models.checkpoint import Tensor

# ".experts.7." (most), "moe.mlp.7." (phixtral): one expert's own tensors.
_ONE_EXPERT = re.compile(r"(.*(?:\.experts|\.moe\.mlp)\.)(\d+)(\..+)")
# All experts of a layer stacked along the first axis.
_STACKED = re.compile(
    r".*\.(?:experts|switch_mlp|switch_glu"
    r"|block_sparse_moe\.(?:input_linear|output_linear)|moe\.(?:gate|up|down)_proj)\."
)
# These live under such a name too, but belong to the router or to a norm.
_NOT_STACKED = re.compile(r".*(?:e_score_correction_bias|norm\.weight)$")
# Some systems refuse a read of 2 GiB or more.
_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Segment:
    """`nbytes` of the virtual file: from `start` of `file`, or zeros."""

    file: Path | None
    start: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """One tensor of the virtual file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def file_bytes(self) -> int:
        return sum(s.nbytes for s in self.segments if s.file is not None)


def layer_of(name: str) -> int | None:
    """The layer index in a tensor's or module's name: its first number."""
    for part in name.split("."):
        if part.isdecimal():
            return int(part)
    return None


def select(
    tensors: Mapping[str, Tensor],
    experts: int,
    owned: Mapping[int, Sequence[int]],
    count: int,
) -> list[Piece]:
    """The pieces that a node needs, with its experts renumbered.

    `owned[layer index]` are the node's expert ids in a MoE layer. Every MoE
    layer appears to have `count` experts; those that the node does not own
    fill up with zeros, so that layers may own different numbers of experts.
    Raises ModelError for an expert's tensor that is missing.
    """
    pieces: list[Piece] = []
    single: dict[tuple[str, str], dict[int, Tensor]] = {}
    for tensor in tensors.values():
        layer = layer_of(tensor.name)
        match = _ONE_EXPERT.fullmatch(tensor.name)
        if layer is None or layer not in owned:
            pieces.append(_whole(tensor.name, tensor))
        elif match:
            group = single.setdefault((match[1], match[3]), {})
            group[int(match[2])] = tensor
        elif _is_stacked(tensor, experts):
            pieces.append(_slab(tensor, experts, owned[layer], count))
        else:
            pieces.append(_whole(tensor.name, tensor))
    for (prefix, suffix), group in single.items():
        layer = layer_of(prefix)
        assert layer is not None
        pieces += _renumbered(prefix, suffix, group, owned[layer], count)
    return pieces


def _is_stacked(tensor: Tensor, experts: int) -> bool:
    name, shape = tensor.name, tensor.shape
    if not shape or not _STACKED.match(name + ".") or _NOT_STACKED.match(name):
        return False
    # dbrx stacks the rows of all experts in one matrix.
    return shape[0] == experts or (".experts.mlp." in name and shape[0] % experts == 0)


def _whole(name: str, tensor: Tensor) -> Piece:
    segment = Segment(tensor.file, tensor.start, tensor.nbytes)
    return Piece(name, tensor.dtype, tensor.shape, (segment,))


def _slab(tensor: Tensor, experts: int, ids: Sequence[int], count: int) -> Piece:
    """The rows of the experts `ids`, then zeros up to `count` experts."""
    each = tensor.nbytes // experts
    segments: list[Segment] = []
    for expert in ids:
        start = tensor.start + expert * each
        last = segments[-1] if segments else None
        if last and last.start + last.nbytes == start:
            segments[-1] = Segment(tensor.file, last.start, last.nbytes + each)
        else:
            segments.append(Segment(tensor.file, start, each))
    if count > len(ids):
        segments.append(Segment(None, 0, (count - len(ids)) * each))
    shape = (tensor.shape[0] // experts * count, *tensor.shape[1:])
    return Piece(tensor.name, tensor.dtype, shape, tuple(segments))


def _renumbered(
    prefix: str, suffix: str, group: Mapping[int, Tensor], ids: Sequence[int], count: int
) -> Iterable[Piece]:
    """One expert's tensors each, named 0..count-1 in the order of `ids`."""
    model = next(iter(group.values()))
    for local in range(count):
        name = f"{prefix}{local}{suffix}"
        if local >= len(ids):
            zeros = Segment(None, 0, model.nbytes)
            yield Piece(name, model.dtype, model.shape, (zeros,))
        elif ids[local] in group:
            yield _whole(name, group[ids[local]])
        else:
            raise ModelError(f"tensor {prefix}{ids[local]}{suffix} is missing from the checkpoint")


class Share:
    """The file-like object that MLX loads from; see the module's text.

    `bytes_read` counts what was read from the real files. MLX reads on its own
    threads, several at once, and would take an exception for the end of the
    process: errors are kept for `check`.
    """

    closed = False

    def __init__(self, pieces: Sequence[Piece]) -> None:
        header: dict[str, object] = {}
        ends: list[int] = []
        self._segments: list[Segment] = []
        offset = 0
        for piece in pieces:
            begin = offset
            for segment in piece.segments:
                offset += segment.nbytes
                if segment.nbytes:
                    ends.append(offset)
                    self._segments.append(segment)
            span = [begin, offset]
            header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": span}
        text = json.dumps(header).encode()
        self._head = struct.pack("<Q", len(text)) + text
        self._ends = [end + len(self._head) for end in ends]
        self._bytes = offset + len(self._head)
        self._files: dict[Path, int] = {}
        self._positions: dict[int, int] = {}  # of each thread: MLX seeks, then reads
        self._lock = threading.Lock()
        self._error: str | None = None
        self.bytes_read = 0

    def load(self) -> dict[str, mx.array]:
        """The share's tensors by name, unread."""
        for segment in self._segments:
            if segment.file is not None and segment.file not in self._files:
                self._files[segment.file] = os.open(segment.file, os.O_RDONLY)
        loaded: dict[str, mx.array] = mx.load(self, format="safetensors")  # type: ignore[arg-type, assignment]
        return loaded

    def check(self) -> None:
        """Raise ModelError if a read has failed."""
        if self._error:
            raise ModelError(self._error)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    # The rest is what MLX calls.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._bytes}[whence]
        self._positions[threading.get_ident()] = base + offset
        return base + offset

    def tell(self) -> int:
        return self._positions.get(threading.get_ident(), 0)

    def readinto(self, buffer: memoryview) -> int:
        position = self.tell()
        view = memoryview(buffer).cast("B")
        try:
            self._fill(view, position)
        except OSError as error:
            self._error = self._error or f"reading the checkpoint failed: {error}"
        self._positions[threading.get_ident()] = position + len(view)
        return len(view)

    def _fill(self, view: memoryview, position: int) -> None:
        done = 0
        if position < len(self._head):
            done = min(len(view), len(self._head) - position)
            view[:done] = self._head[position : position + done]
        index = bisect_right(self._ends, position + done)
        while done < len(view):
            segment, end = self._segments[index], self._ends[index]
            into = segment.nbytes - (end - (position + done))
            part = view[done : done + segment.nbytes - into]
            if segment.file is None:
                np.asarray(part)[:] = 0
            else:
                self._read(segment.file, part, segment.start + into)
            done += len(part)
            index += 1

    def _open_file(self, file: Path) -> int:
        if file not in self._files:
            raise OSError(f"{file} is closed")
        return self._files[file]

    def _read(self, file: Path, part: memoryview, start: int) -> None:
        done = 0
        while done < len(part):
            chunk = part[done : done + _READ_BYTES]
            got = os.preadv(self._open_file(file), [chunk], start + done)
            if got == 0:
                raise OSError(f"{file} ends at byte {start + done}")
            done += got
        with self._lock:
            self.bytes_read += done
