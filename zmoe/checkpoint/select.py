"""A node's share of a checkpoint: the byte ranges that it needs, and a reader of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from zmoe.checkpoint.safetensors import MLX_DTYPES, Tensor
from zmoe.errors import ModelError

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
class Piece:
    """One tensor as this node's model sees it: some rows of `source`, renumbered.

    `rows` are (first, count) ranges along the first axis; `padding` rows of
    zeros follow them. `shape` includes both.
    """

    name: str
    source: Tensor
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    padding: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        if not self.source.shape:
            return 0 if self.padding else self.source.nbytes
        return sum(count for _, count in self.rows) * self.source.row_bytes

    def runs(self) -> Iterator[tuple[int, int]]:
        """Where its bytes lie, in order: (start in the file, bytes) each."""
        if not self.source.shape:
            yield self.source.start, self.nbytes
        for first, count in self.rows:
            yield from self.source.runs(first, count)


def layer_of(name: str) -> int | None:
    """The layer index in a tensor's or module's name: its first number."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def select(
    tensors: Mapping[str, Tensor],
    experts: int,
    owned: Mapping[int, Sequence[int]],
    count: int,
) -> list[Piece]:
    """The pieces that a node needs, with its experts renumbered from 0.

    `owned[layer index]` are the node's expert ids in a MoE layer. Every MoE
    layer appears to have `count` experts; those that the node does not own
    are padding, so that layers may own different numbers of experts. Raises
    ModelError for an expert's tensor that is missing.
    """
    pieces: list[Piece] = []
    single: dict[tuple[int, str, str], dict[int, Tensor]] = {}
    for tensor in tensors.values():
        layer = layer_of(tensor.name)
        if layer is None or not of_experts(tensor, experts, owned):
            pieces.append(whole(tensor))
        elif match := _ONE_EXPERT.fullmatch(tensor.name):
            group = single.setdefault((layer, match[1], match[3]), {})
            group[int(match[2])] = tensor
        else:
            pieces.append(_slab(tensor, experts, owned[layer], count))
    for (layer, prefix, suffix), group in single.items():
        pieces += _renumbered(prefix, suffix, group, owned[layer], count)
    return pieces


def of_experts(tensor: Tensor, experts: int, layers: Container[int]) -> bool:
    """Whether `tensor` holds one expert's weights, or all experts', of one of `layers`."""
    if layer_of(tensor.name) not in layers:
        return False
    return bool(_ONE_EXPERT.fullmatch(tensor.name)) or _is_stacked(tensor, experts)


def _is_stacked(tensor: Tensor, experts: int) -> bool:
    name, shape = tensor.name, tensor.shape
    if not shape or not _STACKED.match(name + ".") or _NOT_STACKED.match(name):
        return False
    # dbrx stacks the rows of all experts in one matrix.
    return shape[0] == experts or (".experts.mlp." in name and shape[0] % experts == 0)


def whole(tensor: Tensor, name: str | None = None) -> Piece:
    """All of a tensor, maybe under another name."""
    rows = ((0, tensor.shape[0]),) if tensor.shape else ()
    return Piece(name or tensor.name, tensor, tensor.shape, rows)


def _slab(tensor: Tensor, experts: int, ids: Sequence[int], count: int) -> Piece:
    """The rows of the experts `ids`, then zeros up to `count` experts."""
    each = tensor.shape[0] // experts
    rows: list[tuple[int, int]] = []
    for expert in ids:
        first = expert * each
        if rows and sum(rows[-1]) == first:
            rows[-1] = (rows[-1][0], rows[-1][1] + each)
        else:
            rows.append((first, each))
    shape = (each * count, *tensor.shape[1:])
    return Piece(tensor.name, tensor, shape, tuple(rows), each * (count - len(ids)))


def _renumbered(
    prefix: str, suffix: str, group: Mapping[int, Tensor], ids: Sequence[int], count: int
) -> Iterator[Piece]:
    """One expert's tensors each, named 0..count-1 in the order of `ids`."""
    like = next(iter(group.values()))
    for local in range(count):
        name = f"{prefix}{local}{suffix}"
        if local >= len(ids):
            yield Piece(name, like, like.shape, (), like.shape[0] if like.shape else 1)
        elif ids[local] in group:
            yield whole(group[ids[local]], name)
        else:
            raise ModelError(f"tensor {prefix}{ids[local]}{suffix} is missing from the checkpoint")


def placeholder(piece: Piece) -> mx.array:
    """An array of the piece's shape and dtype that is never computed."""
    return mx.zeros(piece.shape, MLX_DTYPES[piece.source.dtype])


class Reader:
    """Reads pieces from their files straight into MLX's memory.

    `bytes_read` counts exactly what was read. A context manager.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, piece: Piece) -> mx.array:
        """The piece's rows, evaluated; its padding, if any, as a lazy concatenation.

        Raises ModelError when the file ends early or cannot be read.
        """
        dtype = MLX_DTYPES[piece.source.dtype]
        real = piece.nbytes // dtype.size
        if piece.padding and not real:
            return mx.zeros(piece.shape, dtype)
        shape = (piece.shape[0] - piece.padding, *piece.shape[1:]) if piece.shape else ()
        assert math.prod(shape) == real
        array = mx.zeros(shape, dtype)
        mx.eval(array)
        if real:
            self._fill(piece, memoryview(array).cast("B"))  # type: ignore[arg-type]
        if not piece.padding:
            return array
        zeros = mx.zeros((piece.padding, *piece.shape[1:]), dtype)
        return mx.concatenate([array, zeros])

    def _fill(self, piece: Piece, view: memoryview) -> None:
        done = 0
        for start, size in piece.runs():
            self.read_range(piece.source, view[done : done + size], start)
            done += size

    def read_range(self, source: Tensor, part: memoryview, start: int) -> None:
        """Fill `part` from byte `start` of the file of `source`. Raises ModelError as read does."""
        try:
            if source.file not in self._files:
                self._files[source.file] = os.open(source.file, os.O_RDONLY)
            done = 0
            while done < len(part):
                chunk = part[done : done + _READ_BYTES]
                got = os.preadv(self._files[source.file], [chunk], start + done)
                if got == 0:
                    raise ModelError(f"{source.file} is truncated: tensor {source.name} ends early")
                done += got
                self.bytes_read += got
        except OSError as error:
            raise ModelError(
                f"{source.file} cannot be read at tensor {source.name}: {error.strerror}"
            ) from None
