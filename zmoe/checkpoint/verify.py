"""Whether a store's files are those of its manifest: at a glance, a node's share, or all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from zmoe.checkpoint.manifest import (
    IDENTITY,
    MANIFEST,
    DataFile,
    Manifest,
    Range,
    checksum_of,
    is_unfinished,
    read_manifest,
)
from zmoe.checkpoint.safetensors import read_metadata
from zmoe.errors import ModelError
from zmoe.topology.cores import usable_cores


def open_store(folder: Path) -> Manifest | None:
    """The manifest, once all that is cheap to check is right; None if it is no store.

    That is every file's size, that it was written for this store, and config.json.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for file in manifest.files:
        path = folder / file.name
        found = _size(path)
        if found != file.nbytes:
            what = "is truncated" if found < file.nbytes else "is too long"
            raise ModelError(f"{path} {what}: {found} bytes of {file.nbytes}")
        if read_metadata(path).get(IDENTITY) != manifest.identity:
            raise ModelError(f"{path} is of another store than {folder / MANIFEST}")
    config = folder / "config.json"
    if checksum_of(config, 0, _size(config)) != manifest.others[config.name]:
        raise ModelError(f"{config} is not the one that the store was written with")
    return manifest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise ModelError(f"{path.parent} is incomplete: {path.name} is missing") from None


def check_share(
    folder: Path, owned: Mapping[int, Sequence[int]], tick: Callable[[], None], dense: bool = True
) -> tuple[str, ...]:
    """Compare with their checksums the ranges that a node loads of files that changed
    after the manifest was written; raise ModelError for the first that differs.

    `owned` are the node's experts by layer; without `dense` it loads nothing else.
    A file's inode tells when it changed, as nobody can set that time; so a store
    that stays as it was costs nothing here, and one that was copied is hashed until
    `verify` has seen it. Returns lines for the user.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return ()
    wanted = [
        (file, part)
        for file in changed_files(manifest)
        if dense or file.layer is not None
        for part in file.ranges
        if part.expert is None or (file.layer is not None and part.expert in owned[file.layer])
    ]
    for _, damage in _compare(folder, wanted):
        tick()
        if damage is not None:
            raise ModelError(damage)
    if not wanted:
        return ()
    size = sum(part.nbytes for _, part in wanted) / 1e9
    writable = os.access(folder / MANIFEST, os.W_OK)
    where = "" if writable else ", done where the store can be written,"
    return (
        f"{folder} changed since it was written, so {size:.1f} GB were compared with their "
        f"checksums; zmoe-prestack --verify{where} spares that",
    )


def changed_files(manifest: Manifest) -> list[DataFile]:
    """Those that changed after the manifest was written, or last verified."""
    folder = manifest.folder
    written = (folder / MANIFEST).stat().st_ctime_ns
    return [f for f in manifest.files if (folder / f.name).stat().st_ctime_ns >= written]


def verify(folder: Path, progress: Callable[[int, int], None]) -> Manifest:
    """Compare all of a store with its checksums; `progress` gets bytes done and in all. Where
    the store can be written, its manifest's time records that.

    Raises ModelError naming the first range that differs, and how many others do.
    """
    manifest = open_store(folder)
    if manifest is None:
        missing = "is unfinished" if is_unfinished(folder) else f"holds no {MANIFEST}"
        raise ModelError(f"{folder} is no store: it {missing}")
    wanted = [(file, part) for file in manifest.files for part in file.ranges]
    damages, done = [], 0
    for part, damage in _compare(folder, wanted):
        done += part.nbytes
        progress(done, manifest.nbytes)
        damages += [damage] if damage is not None else []
    for name, expected in manifest.others.items():
        if checksum_of(folder / name, 0, _size(folder / name)) != expected:
            damages.append(f"{folder / name} does not match its checksum")
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise ModelError(damages[0] + more)
    with suppress(OSError):  # someone else's store: then loading goes on to check it
        os.utime(folder / MANIFEST)
    return manifest


def _compare(
    folder: Path, wanted: Sequence[tuple[DataFile, Range]]
) -> Iterator[tuple[Range, str | None]]:
    """Each range, and a line about it if it is damaged."""

    def compare(each: tuple[DataFile, Range]) -> tuple[Range, str | None]:
        file, part = each
        path = folder / file.name
        if checksum_of(path, part.start, part.nbytes) == part.checksum:
            return part, None
        where = f"{part.name} (bytes {part.start} to {part.end})"
        return part, f"{path} is damaged: {where} does not match its checksum"

    pool = ThreadPoolExecutor(len(usable_cores()))  # hashing lets go of the interpreter
    try:
        yield from pool.map(compare, wanted)
    finally:
        pool.shutdown(cancel_futures=True)
