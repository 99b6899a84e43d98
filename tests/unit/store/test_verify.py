"""Stores that are damaged or mixed up are told by file; whole ones cost nothing to check."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import build
from tests.unit.loading.test_layouts import OWNED, shard
from tests.unit.store.stores import EXPERTS_1, flip, quietly, store_of
from zmoe.checkpoint import verify as verification
from zmoe.checkpoint.manifest import MANIFEST, Range, checksum_of, read_manifest
from zmoe.checkpoint.verify import verify
from zmoe.cli import prestack
from zmoe.errors import ModelError
from zmoe.loading import Skeleton, describe
from zmoe.store.writer import Quantization


def swap(whole: Path, name: str) -> None:
    """Put a file of a store of the same shape in the place of ours."""
    other = build("mixtral", whole.parent / "other", layout="hf", seed=1)
    shutil.copy2(store_of(other, whole.parent / "others") / name, whole / name)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda s: os.truncate(s / EXPERTS_1, 70000),
        rf"{EXPERTS_1} is truncated: 70000 bytes of",
    ),
    "empty": (lambda s: os.truncate(s / EXPERTS_1, 0), rf"{EXPERTS_1} is truncated: 0 bytes"),
    "grown": (lambda s: os.truncate(s / EXPERTS_1, 10**6), rf"{EXPERTS_1} is too long"),
    "missing": (lambda s: (s / EXPERTS_1).unlink(), rf"incomplete: {EXPERTS_1} is missing"),
    "header": (lambda s: flip(s / EXPERTS_1, 8), rf"{EXPERTS_1} is corrupt"),
    "another's experts": (lambda s: swap(s, EXPERTS_1), rf"{EXPERTS_1} is of another store"),
    "another's dense": (
        lambda s: swap(s, "model.safetensors"),
        r"model\.safetensors is of another store",
    ),
    "another's manifest": (lambda s: swap(s, MANIFEST), r"model\.safetensors is of another store"),
    "config": (
        lambda s: rewrite(s / "config.json", '"rope_theta": 10000.0', '"rope_theta": 500.0'),
        r"config\.json is not the one that the store was written with",
    ),
    "no config": (lambda s: (s / "config.json").unlink(), r"config\.json"),
    "manifest": (
        lambda s: rewrite(s / MANIFEST, '"expert 1", ', '"expert 2", '),
        rf"{MANIFEST} has been altered",
    ),
    "no JSON": (lambda s: os.truncate(s / MANIFEST, 100), rf"{MANIFEST} is corrupt"),
    "a later version": (
        lambda s: rewrite(s / MANIFEST, '"version": 1', '"version": 2'),
        rf"{MANIFEST} is of version 2",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_belong_together_is_no_model(kind: str, whole: Path) -> None:
    damage, reason = DAMAGE[kind]
    damage(whole)
    with pytest.raises(ModelError, match=reason) as raised:
        describe(Skeleton(whole))
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError):
        verify(whole, quietly)


def range_of(folder: Path, name: str, part: str) -> Range:
    manifest = read_manifest(folder)
    assert manifest is not None
    (file,) = (f for f in manifest.files if f.name == name)
    return next(r for r in file.ranges if r.name == part)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (EXPERTS_1, "expert 3"),
        (EXPERTS_1, "header"),
        ("model.safetensors", "tensor lm_head.weight"),
    ],
)
def test_an_altered_byte_is_found(name: str, part: str, whole: Path) -> None:
    """By --verify wherever it is, and while loading by those that need it."""
    assert verify(whole, quietly).nbytes == sum(
        p.stat().st_size for p in whole.glob("*.safetensors")
    )
    place = range_of(whole, name, part)
    text = (whole / name).read_bytes()
    flip(whole / name, text.index(b"U8") if part == "header" else place.end - 1)
    where = rf"{name} is damaged: {part} \(bytes {place.start} to {place.end}\)"
    with pytest.raises(ModelError, match=where):
        verify(whole, quietly)
    describe(Skeleton(whole))  # reads no weights, so it cannot know
    for rank, ids in enumerate(OWNED):
        if place.expert in (None, *ids):
            with pytest.raises(ModelError, match=where):
                shard(whole, rank)
        else:
            assert "compared with their checksums" in shard(whole, rank).notices[0]


def test_all_damage_is_counted(whole: Path) -> None:
    for part in ("expert 1", "expert 4"):
        flip(whole / EXPERTS_1, range_of(whole, EXPERTS_1, part).start)
    with pytest.raises(ModelError, match=r"expert 1 .* \(and 1 more\)"):
        verify(whole, quietly)


def test_other_files_are_verified_too(tmp_path: Path) -> None:
    source = build("mixtral", tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    whole = store_of(source, tmp_path / "whole")
    (whole / "tokenizer.json").write_text("{ }")
    with pytest.raises(ModelError, match=r"tokenizer\.json does not match its checksum"):
        verify(whole, quietly)


def test_what_did_not_change_is_not_hashed(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A copy is, with a notice, until it has been verified, which a read-only one cannot record."""

    def refuse(path: Path) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    hashed: list[str] = []

    def noted(path: Path, start: int, nbytes: int) -> str:
        hashed.append(path.name)
        return checksum_of(path, start, nbytes)

    monkeypatch.setattr(verification, "checksum_of", noted)
    assert shard(whole).notices == ()
    assert set(hashed) == {"config.json"}
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    time.sleep(0.02)
    shutil.copy2(whole / EXPERTS_1, copy / EXPERTS_1)  # whatever its mtime says
    hashed.clear()
    assert "zmoe-prestack --verify spares that" in shard(copy).notices[0]
    assert hashed.count(EXPERTS_1) == 1 + len(OWNED[0])
    with monkeypatch.context() as read_only:
        read_only.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        read_only.setattr(os, "utime", refuse)
        assert "--verify, done where the store can be written, spares" in shard(copy).notices[0]
        assert prestack.main(["--verify", str(copy)]) == 0
        captured = capsys.readouterr()
        assert captured.out.endswith("every checksum matches\n")
        assert f"{copy} cannot be written, so this is not recorded" in captured.err
    assert prestack.main(["--verify", str(copy)]) == 0
    assert capsys.readouterr().err == ""
    verify(copy, quietly)
    hashed.clear()
    assert shard(copy).notices == ()
    assert set(hashed) == {"config.json"}


def test_stores_of_one_model_have_one_fingerprint(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    again = describe(Skeleton(store_of(moved, tmp_path / "again")))
    assert again.fingerprint == describe(Skeleton(whole)).fingerprint
    manifest = read_manifest(whole)
    assert manifest is not None and again.fingerprint == manifest.digest  # of every byte
    affine = store_of(source, tmp_path / "affine", Quantization("affine", 4, 32))
    assert describe(Skeleton(affine)).fingerprint != again.fingerprint


def test_a_folder_without_a_manifest_is_no_store(source: Path) -> None:
    with pytest.raises(ModelError, match=f"source is no store: it holds no {MANIFEST}"):
        verify(source, quietly)
