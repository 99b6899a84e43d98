"""A prestacked store: a model folder in which every expert has a page-aligned range of its own.

Beside config.json, tokenizer and so on it holds

    model.safetensors          what every node holds, tensor by tensor
    experts-00003.safetensors  the experts of layer 3, a record of bytes each: all of an
                               expert's tensors one after the other, so that a node touches
                               the pages of its own experts and no others
    zmoe-store.json            the manifest: every tensor's place, every range's checksum.
                               Written last: without it the folder is no model

To the rest of zmoe a store's experts are mlx-lm's own stacked tensors whose
rows lie a record apart (`Tensor.stride`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zmoe.checkpoint.safetensors import Tensor
from zmoe.errors import ModelError

MANIFEST = "zmoe-store.json"
JOURNAL = "zmoe-store.journal"
DENSE = "model.safetensors"
IDENTITY = "zmoe_store"  # the key of the store's identity in its files' headers
VERSION = 1
_CHUNK_BYTES = 4 << 20
_TICK_S = 0.01  # of a file system's clock: the manifest is to be younger than the weights


@dataclass(frozen=True)
class Range:
    """Bytes with one checksum: a file's header, a dense tensor, or all of one expert."""

    name: str
    start: int
    nbytes: int
    expert: int | None = None
    checksum: str = ""

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class DataFile:
    """One file of weights; its ranges leave no byte out. `layer` is that of its experts."""

    name: str
    layer: int | None
    ranges: tuple[Range, ...]
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return self.ranges[-1].end


@dataclass(frozen=True)
class Manifest:
    """What a store holds. `source` is the fingerprint of the model that it was made of,
    `identity` says how too, and `digest` is that of its contents; `others` are the
    checksums of the files without weights.
    """

    folder: Path
    source: str
    identity: str
    files: tuple[DataFile, ...]
    others: dict[str, str]
    digest: str = ""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name that mlx-lm's model gives it."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}


def checksum(*parts: Any) -> str:
    """32 hex digits of some bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def checksum_of(path: Path, start: int, nbytes: int) -> str:
    """The checksum of `nbytes` bytes at `start` of a file, or of as many of them as there are.

    Raises ModelError if the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    end = start + nbytes
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end and (chunk := file.read(min(_CHUNK_BYTES, end - start))):
                digest.update(chunk)
                start += len(chunk)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def write_manifest(manifest: Manifest) -> None:
    """Make the folder a store, from one moment to the next."""
    body = {
        "version": VERSION,
        "source": manifest.source,
        "identity": manifest.identity,
        "files": [_plain(file) for file in manifest.files],
        "others": manifest.others,
    }
    path = manifest.folder / MANIFEST
    draft = path.with_suffix(".draft")
    time.sleep(_TICK_S)
    with draft.open("w", encoding="utf-8") as file:
        json.dump({"digest": checksum(_canonical(body)), "store": body}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None if the folder is not a store.

    Raises ModelError for a manifest that is unreadable, altered or of another version.
    """
    path = folder / MANIFEST
    try:
        parsed = json.loads(path.read_bytes())
        digest, body = parsed["digest"], parsed["store"]
        version = body["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: {type(error).__name__}") from None
    if version != VERSION:
        raise ModelError(f"{path} is of version {version}; this zmoe knows version {VERSION}")
    if digest != checksum(_canonical(body)):
        raise ModelError(f"{path} has been altered: it does not match its checksum")
    files = tuple(_data_file(folder, entry) for entry in body["files"])
    return Manifest(folder, body["source"], body["identity"], files, body["others"], digest)


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _plain(file: DataFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "layer": file.layer,
        "ranges": [[r.name, r.start, r.nbytes, r.expert, r.checksum] for r in file.ranges],
        "tensors": [[t.name, t.dtype, t.shape, t.start, t.nbytes, t.stride] for t in file.tensors],
    }


def _data_file(folder: Path, entry: dict[str, Any]) -> DataFile:
    path = folder / entry["name"]
    return DataFile(
        name=entry["name"],
        layer=entry["layer"],
        ranges=tuple(Range(*fields) for fields in entry["ranges"]),
        tensors=tuple(
            Tensor(name, dtype, tuple(shape), path, start, nbytes, stride)
            for name, dtype, shape, start, nbytes, stride in entry["tensors"]
        ),
    )


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` is what zmoe-prestack left when it was interrupted."""
    return (folder / JOURNAL).exists() and not (folder / MANIFEST).exists()
