"""Where in a store's files each tensor goes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from zmoe.checkpoint.manifest import DENSE, IDENTITY, DataFile, Range
from zmoe.checkpoint.safetensors import MLX_DTYPES, Tensor

PAGE_BYTES = 16 << 10  # Apple's page; others' divide it
_LINE_BYTES = 64

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items() if not name.startswith("F8")}
Entries = list[tuple[str, str, tuple[int, ...], int]]  # name, dtype, shape, bytes


def dense_file(
    folder: Path, identity: str, names: Iterable[str], shapes: Mapping[str, mx.array]
) -> tuple[DataFile, bytes]:
    """The file of what every node holds, and its header."""
    # What fills whole cache lines comes first, then wide elements: so all are
    # aligned without holes, which the format forbids.
    ordered = sorted(
        names,
        key=lambda n: (shapes[n].nbytes % _LINE_BYTES != 0, -shapes[n].itemsize, n),
    )
    arrays = [shapes[name] for name in ordered]
    entries: Entries = [
        (name, _NAMES[array.dtype], tuple(array.shape), array.nbytes)
        for name, array in zip(ordered, arrays)
    ]
    header, places = _header(identity, entries)
    tensors = tuple(
        Tensor(name, dtype, shape, folder / DENSE, start, nbytes)
        for (name, dtype, shape, nbytes), start in zip(entries, places)
    )
    ranges = (Range(_range_name(t), t.start, t.nbytes) for t in tensors)
    return DataFile(DENSE, None, (_of_header(header), *ranges), tensors), header


def experts_file(
    folder: Path,
    identity: str,
    layer: int,
    experts: int,
    names: Iterable[str],
    shapes: Mapping[str, mx.array],
) -> tuple[DataFile, bytes]:
    """The file of one layer's experts, and its header; `shapes` are those of one expert.

    Every record takes whole pages, so that neighbours share none.
    """
    name = f"experts-{layer:05d}.safetensors"
    offsets, end = [], 0
    for array in (shapes[n] for n in names):
        offsets.append(end)
        end = _up(end + array.nbytes, _LINE_BYTES)
    record = _up(end, PAGE_BYTES)
    header, places = _header(
        identity, [(f"expert {e}", "U8", (record,), record) for e in range(experts)]
    )
    tensors = tuple(
        Tensor(
            n,
            _NAMES[shapes[n].dtype],
            (experts, *shapes[n].shape[1:]),
            folder / name,
            places[0] + offset,
            shapes[n].nbytes * experts,
            record,
        )
        for n, offset in zip(names, offsets)
    )
    ranges = (Range(f"expert {e}", start, record, e) for e, start in enumerate(places))
    return DataFile(name, layer, (_of_header(header), *ranges), tensors), header


def parts(file: DataFile, part: Range) -> list[tuple[str, int]]:
    """The tensors in a range of `file`, by name, and where in the file each begins."""
    if part.expert is not None:
        return [(t.name, t.start + part.expert * (t.stride or 0)) for t in file.tensors]
    return [(t.name, t.start) for t in file.tensors if _range_name(t) == part.name]


def _range_name(tensor: Tensor) -> str:
    return f"tensor {tensor.name}"


def _header(identity: str, entries: Entries) -> tuple[bytes, list[int]]:
    """A safetensors header that ends with a page, and where each tensor then begins."""
    described: dict[str, object] = {"__metadata__": {"format": "mlx", IDENTITY: identity}}
    offsets, end = [], 0
    for name, dtype, shape, nbytes in entries:
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        offsets.append(end)
        end += nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    size = _up(8 + len(text), PAGE_BYTES)
    header = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    return header, [size + offset for offset in offsets]


def _of_header(header: bytes) -> Range:
    return Range("header", 0, len(header))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
