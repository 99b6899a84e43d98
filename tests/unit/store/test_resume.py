"""A run that is interrupted is no store, and the next goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from tests.families import build
from tests.unit.store.stores import EXPERTS_1, flip, quietly
from zmoe.checkpoint.manifest import JOURNAL
from zmoe.checkpoint.verify import verify
from zmoe.errors import InputError, ModelError, ZmoeError
from zmoe.loading import Skeleton, describe
from zmoe.store.convert import Source
from zmoe.store.journal import Journal
from zmoe.store.writer import Quantization, prestack


class Stopped(Exception):
    """What a test raises in the middle of a run."""


def stop_after(ranges: int) -> Callable[[int, int], None]:
    calls = iter(range(ranges))

    def progress(done: int, total: int) -> None:
        if next(calls, None) is None:
            raise Stopped

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ranges", [0, 1, 7, 20, 31])
def test_an_interrupted_run_is_no_model_and_goes_on_where_it_was(
    ranges: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, out = describe(Skeleton(source)), tmp_path / "out"
    with pytest.raises(Stopped):
        prestack(info, out, None, stop_after(ranges))
    with pytest.raises(ModelError, match="out is an unfinished store: run zmoe-prestack again"):
        describe(Skeleton(out))
    with pytest.raises(ModelError, match="out is no store: it is unfinished"):
        verify(out, quietly)
    made: list[tuple[int, int]] = []
    original = Source.expert_arrays

    def noted(self: Source, layer: int, expert: int) -> dict[str, mx.array]:
        made.append((layer, expert))
        return original(self, layer, expert)

    monkeypatch.setattr(Source, "expert_arrays", noted)
    seen: list[tuple[int, int]] = []
    manifest = prestack(info, out, None, lambda *sizes: seen.append(sizes))
    assert contents(out) == contents(whole)
    dense = len(manifest.files[0].ranges)
    # The range of which we heard last was written, and a header is no expert.
    everything = [(None, "h"), *((0, e) for e in "h012345"), *((1, e) for e in "h012345")]
    left = everything[1:] if ranges < dense else everything[1 + ranges + 1 - dense :]
    assert made == [(layer, int(e)) for layer, e in left if e != "h"]
    assert seen == sorted(seen) and seen[-1] == (manifest.nbytes, manifest.nbytes)


def test_what_was_written_is_compared_before_it_is_kept(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    """Bytes that never reached the disk, and a journal that was cut in a line."""
    info, out = describe(Skeleton(source)), tmp_path / "out"
    with pytest.raises(Stopped):
        prestack(info, out, None, stop_after(31))
    size = (out / EXPERTS_1).stat().st_size
    flip(out / EXPERTS_1, size // 2)
    flip(out / "model.safetensors", 20000)
    os.truncate(out / "experts-00000.safetensors", 20000)
    os.truncate(out / JOURNAL, (out / JOURNAL).stat().st_size - 9)
    prestack(info, out, None, quietly)
    assert contents(out) == contents(whole)


def test_a_finished_store_stays_as_it_is(source: Path, whole: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    # Killed between the manifest and the end, so to speak.
    (whole / JOURNAL).write_text("")
    prestack(describe(Skeleton(source)), whole, None, quietly)
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_nothing_else_is_overwritten(source: Path, whole: Path, tmp_path: Path) -> None:
    info, affine = describe(Skeleton(source)), Quantization("affine", 4, 32)
    other = describe(Skeleton(build("mixtral", tmp_path / "other", layout="hf", seed=1)))
    unfinished = tmp_path / "unfinished"
    with pytest.raises(Stopped):
        prestack(info, unfinished, None, stop_after(3))
    file = tmp_path / "file"
    file.write_text("x")
    for args, reason in [
        ((other, whole, None), "whole holds the store of another model"),
        ((info, whole, affine), "whole holds the store of another model, or in another format"),
        ((other, unfinished, None), "unfinished holds the unfinished store of another model"),
        ((info, unfinished, affine), "unfinished holds the unfinished store"),
        ((info, source, None), "source is not empty, and no store"),
        ((info, file, None), "file is a file"),
        ((info, file / "below", None), "below cannot be made"),
    ]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=reason):
            prestack(*args, quietly)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before


def test_a_journal_that_is_damaged_is_named(source: Path, tmp_path: Path) -> None:
    info, out = describe(Skeleton(source)), tmp_path / "out"
    with pytest.raises(Stopped):
        prestack(info, out, None, stop_after(3))
    journal = out / "zmoe-store.journal"
    journal.write_bytes(journal.read_bytes() + b"{\n")
    with pytest.raises(InputError, match=f"{journal} is corrupt: remove {out} to begin anew"):
        prestack(info, out, None, quietly)


def test_two_runs_do_not_write_one_store(source: Path, tmp_path: Path) -> None:
    info, out = describe(Skeleton(source)), tmp_path / "out"
    with pytest.raises(Stopped):
        prestack(info, out, None, stop_after(3))
    identity = json.loads((out / JOURNAL).read_text().splitlines()[0])
    with (
        Journal(out / JOURNAL, identity),
        pytest.raises(InputError, match="out is being written by another process"),
    ):
        prestack(info, out, None, quietly)
    prestack(info, out, None, quietly)


def test_a_disk_that_is_too_small(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    info, out = describe(Skeleton(source)), tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(InputError, match=r"out would take 0\.00 GiB more.*disk has 0\.00 GiB"):
        prestack(info, out, None, quietly)
    assert not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40))

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ZmoeError, match="out: No space left on device; the same") as raised:
            prestack(info, out, None, quietly)
        assert raised.value.exit_code == 1
    prestack(info, out, None, quietly)
