"""One safetensors file: which tensors it holds, and where."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from zmoe.errors import ModelError

# MLX's dtypes for those of safetensors, as mx.load takes them.
MLX_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,  # as MLX takes them: bytes, for `from_fp8` or a quantised matmul
    "F8_E8M0": mx.uint8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}

# A header lists names and shapes only; one beyond this is damage, not a model.
MAX_HEADER_BYTES = 256 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: `nbytes` bytes at `start` of `file`, row-major.

    With a `stride`, each index of the first axis begins so many bytes after
    the one before: a store keeps the other tensors of the same expert between.
    """

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    stride: int | None = None

    @property
    def row_bytes(self) -> int:
        """What one index of the first axis takes."""
        return self.nbytes // self.shape[0] if self.shape[0] else 0

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Where `count` rows from `first` on lie: (start in the file, bytes) each."""
        if self.stride is None:
            yield self.start + first * self.row_bytes, count * self.row_bytes
            return
        for row in range(first, first + count):
            yield self.start + row * self.stride, self.row_bytes


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in order of their place.

    Raises ModelError for a header that is damaged or does not describe the file.
    """
    header, data_start, file_bytes = _parse(path)
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    end, before = data_start, ""
    for tensor in tensors:
        if tensor.start < end:
            raise ModelError(f"{path} is corrupt: tensor {tensor.name} overlaps {before}")
        end, before = tensor.start + tensor.nbytes, tensor.name
        if end > file_bytes:
            raise ModelError(
                f"{path} is truncated: tensor {tensor.name} ends at byte {end} of {file_bytes}"
            )
    return tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """What one safetensors file says of itself besides its tensors."""
    metadata = _parse(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the size of the file."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelError(f"{path} is truncated: {file_bytes} bytes, no header")
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise ModelError(f"{path} is truncated or corrupt: header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes).decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is corrupt: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is corrupt: its header is not a JSON object")
    return header, 8 + header_bytes, file_bytes


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    """One entry of a header; ModelError unless it is consistent in itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} is corrupt: tensor {name} has a malformed entry") from None
    numbers = (*shape, begin, end)
    if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in numbers):
        raise ModelError(f"{path} is corrupt: tensor {name} has a malformed entry")
    if dtype not in MLX_DTYPES:
        raise ModelError(f"{path}: tensor {name} has the unsupported dtype {dtype}")
    nbytes = math.prod(shape) * MLX_DTYPES[dtype].size
    if end - begin != nbytes:
        raise ModelError(
            f"{path} is corrupt: tensor {name} of {nbytes} bytes spans {end - begin} bytes"
        )
    return Tensor(name, dtype, shape, path, data_start + begin, nbytes)
