"""What a checkpoint folder holds, learned from its config and tensor headers alone."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zmoe.errors import ModelError

# Element sizes of the safetensors dtypes that MLX can load.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
}

# A header lists names and shapes only; one beyond this is damage, not a model.
MAX_HEADER_BYTES = 256 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor's place: `nbytes` bytes at `start` of `file`, row-major."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`; ModelError when it is not usable."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a model folder: no such directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} holds no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that mlx-lm would load, by name."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no weights: no model*.safetensors")
    for name in _indexed_files(folder / "model.safetensors.index.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is incomplete: {name} is missing")
    return files


def _indexed_files(path: Path) -> list[str]:
    """The files that an index, where there is one, says the weights are in."""
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is corrupt") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name, from headers only."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for tensor in read_header(path):
            tensors[tensor.name] = tensor
    return tensors


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, validated; in order of their place."""
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
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
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


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    """One entry of a header; ModelError unless it is consistent in itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} is corrupt: tensor {name} has a malformed entry") from None
    numbers = (*shape, begin, end)
    if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in numbers):
        raise ModelError(f"{path} is corrupt: tensor {name} has a malformed entry")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{path}: tensor {name} has the unsupported dtype {dtype}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise ModelError(
            f"{path} is corrupt: tensor {name} of {nbytes} bytes spans {end - begin} bytes"
        )
    return Tensor(name, dtype, shape, path, data_start + begin, nbytes)
