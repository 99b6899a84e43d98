"""Write a model as a prestacked store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import mlx.core as mx

from zmoe.checkpoint.manifest import (
    JOURNAL,
    MANIFEST,
    VERSION,
    DataFile,
    Manifest,
    Range,
    checksum,
    checksum_of,
    read_manifest,
    write_manifest,
)
from zmoe.errors import InputError, ModelError, ZmoeError
from zmoe.kernels.weights import Quantization
from zmoe.loading.places import Weights
from zmoe.loading.skeleton import Skeleton
from zmoe.placement.types import ModelInfo
from zmoe.store.convert import Source
from zmoe.store.journal import Journal
from zmoe.store.layout import dense_file, experts_file, parts

__all__ = ["Quantization", "prestack"]

Progress = Callable[[int, int], None]  # bytes written, bytes in all

# Of the source's folder everything goes along but its weights.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}


def prestack(
    info: ModelInfo,
    out: Path,
    quantization: Quantization | None,
    progress: Progress,
    skeleton: Skeleton | None = None,
) -> Manifest:
    """Write the model that `info` describes into the folder `out`, maybe quantised.

    Holds little more than one expert in memory, or one tensor of the others. A
    run that is interrupted leaves what is no store, and the next with the same
    arguments goes on from there; a store that is there already stays. Raises
    InputError before anything is written if `out` is something else, or the
    disk too small; ZmoeError if writing fails. `skeleton`, which `info` may
    have been learned from, is used up.
    """
    source = Source(info, quantization, skeleton)
    identity = _identity(source, quantization)
    try:
        finished = _finished(out, identity)
        if finished is not None:
            return finished
        layout = _layout(source, out, identity)
        _check_space(out, [file for file, _ in layout])
        _make_folder(out)
        with Journal(out / JOURNAL, identity) as journal:
            files = _Writer(source, out, journal, progress).write(layout)
            others = _copy_others(source, out)
            write_manifest(Manifest(out, info.fingerprint, identity, files, others))
        (out / JOURNAL).unlink()
    except OSError as error:
        where = error.filename or out
        raise ZmoeError(f"{where}: {error.strerror}; the same command goes on from here") from error
    manifest = read_manifest(out)
    assert manifest is not None
    return manifest


def _identity(source: Source, quantization: Quantization | None) -> str:
    """A digest of all that decides what the store will hold."""
    shapes = [(name, str(a.dtype), list(a.shape)) for name, a in sorted(source.shapes.items())]
    how = None if quantization is None else astuple(quantization)
    return checksum(json.dumps([VERSION, source.info.fingerprint, how, shapes]).encode())


def _finished(out: Path, identity: str) -> Manifest | None:
    """The manifest, if the store is there; InputError if something else is."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder to write to")
    finished = read_manifest(out)
    if finished is not None:
        if finished.identity != identity:
            raise InputError(
                f"{out} holds the store of another model, or in another format: "
                "remove it, or name another folder"
            )
        (out / JOURNAL).unlink(missing_ok=True)
        return finished
    if out.exists() and not (out / JOURNAL).exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty, and no store: name another folder")
    return None


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}") from error


def _layout(source: Source, out: Path, identity: str) -> list[tuple[DataFile, bytes]]:
    """Every file of weights, and its header."""
    shapes, experts = source.shapes, source.info.experts
    return [
        dense_file(out, identity, source.dense, shapes),
        *(
            experts_file(out, identity, layer, experts, names, shapes)
            for layer, names in source.experts.items()
        ),
    ]


def _check_space(out: Path, files: list[DataFile]) -> None:
    need = 0
    for file in files:
        path = out / file.name
        taken = path.stat().st_blocks * 512 if path.exists() else 0
        need += max(0, file.nbytes - taken)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise InputError(
            f"{out} would take {need / 2**30:.2f} GiB more than it has now, "
            f"and its disk has {free / 2**30:.2f} GiB left"
        )


class _Writer:
    """Writes the files range by range, except what the journal knows and is still there."""

    def __init__(self, source: Source, out: Path, journal: Journal, progress: Progress) -> None:
        self._source, self._out, self._journal = source, out, journal
        self._progress = progress
        self._done = self._total = 0

    def write(self, layout: list[tuple[DataFile, bytes]]) -> tuple[DataFile, ...]:
        """The files, with their checksums."""
        self._total = sum(file.nbytes for file, _ in layout)
        return tuple(self._file(file, header) for file, header in layout)

    def _file(self, file: DataFile, header: bytes) -> DataFile:
        path = self._out / file.name
        dense = self._source.dense_arrays() if file.layer is None else {}
        ranges = []
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, file.nbytes)
            for part in file.ranges:
                found = self._journal.checksum(file.name, part)
                if found is None or found != checksum_of(path, part.start, part.nbytes):
                    contents = self._contents(file, part, header, dense)
                    found = _write(descriptor, part, contents)
                    self._journal.add(file.name, part, found)
                ranges.append(replace(part, checksum=found))
                self._done += part.nbytes
                self._progress(self._done, self._total)
            os.fsync(descriptor)
            _forget(descriptor)
        finally:
            os.close(descriptor)
        return replace(file, ranges=tuple(ranges))

    def _contents(
        self, file: DataFile, part: Range, header: bytes, dense: Weights
    ) -> Iterator[tuple[int, memoryview]]:
        """The bytes of a range, and where in the file they go."""
        if part.start == 0:
            yield 0, memoryview(header)
            return
        arrays = dense
        if file.layer is not None and part.expert is not None:
            arrays = self._source.expert_arrays(file.layer, part.expert)
        for name, start in parts(file, part):
            try:
                yield start, _bytes_of(arrays.pop(name))
            except RuntimeError as error:  # MLX reads the dense tensors only now
                raise ModelError(f"{self._source.info.path}: tensor {name}: {error}") from error
        mx.clear_cache()


def _forget(descriptor: int) -> None:
    """Drop a written file from the page cache, where it lies in small pages.

    Nodes read it from the disk then, into large pages, with which they compute faster.
    """
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_of(array: mx.array) -> memoryview:
    array = mx.contiguous(array)
    mx.eval(array)
    view: memoryview = memoryview(array)  # type: ignore[arg-type]
    return view.cast("B") if array.nbytes else memoryview(b"")


def _write(descriptor: int, part: Range, contents: Iterator[tuple[int, memoryview]]) -> str:
    """Write a range, with zeros where it has no contents; its checksum."""
    digest = hashlib.blake2b(digest_size=16)
    at = part.start

    def put(data: memoryview) -> None:
        nonlocal at
        digest.update(data)
        while data:
            size = os.pwrite(descriptor, data, at)
            at, data = at + size, data[size:]

    for start, data in contents:
        put(memoryview(bytes(start - at)))
        put(data)
        del data  # before the next one is made
    put(memoryview(bytes(part.end - at)))
    return digest.hexdigest()


def _copy_others(source: Source, out: Path) -> dict[str, str]:
    """Copy tokenizer and so on, write config.json; their checksums by name."""
    written = [out / "config.json"]
    written[0].write_text(json.dumps(source.config, indent=4), encoding="utf-8")
    for path in sorted(Path(source.info.path).iterdir()):
        ours = path.name in (MANIFEST, JOURNAL, "config.json")
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not path.name.startswith(".") and not ours and not weights:
            written.append(Path(shutil.copyfile(path, out / path.name)))
    return {path.name: checksum(path.read_bytes()) for path in written}
