"""A store holds exactly what mlx-lm would make of its source, and computes the same."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import mmap
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model

from tests.families import EXPERTS, FAMILIES, build
from tests.ranks import Meeting, ThreadReducer, on_ranks
from tests.unit.loading.test_layouts import OWNED, arrays, shard, stacked
from tests.unit.store.stores import quietly, store_of
from zmoe.checkpoint.folder import read_tensors
from zmoe.checkpoint.hub import resolve_model
from zmoe.checkpoint.manifest import read_manifest
from zmoe.errors import InputError, ModelError
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.loading.mapping import Mapping
from zmoe.loading.places import Place
from zmoe.obs import Spans
from zmoe.placement.types import ModelInfo, Placement
from zmoe.store.layout import PAGE_BYTES
from zmoe.store.writer import Quantization, prestack

TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]
# mlx-lm's layout is alike for all families; the published ones are not.
LAYOUTS = {name: "mlx" if family.to_hf is None else "hf" for name, family in FAMILIES.items()}
SEVERAL = [
    ("dbrx", "hf"),
    ("dbrx", "mlx"),
    ("mixtral", "hf"),
    ("qwen3_moe", "hf"),
    ("qwen2_moe", "mlx"),
    ("gpt_oss", "hf"),
    ("gpt_oss", "mlx"),
]


def check(store: Path, wanted: dict[str, np.ndarray]) -> None:
    """The store loads to the arrays `wanted`, cut to each node's experts, and no more is read."""
    sizes = [(t.nbytes, t.stride is not None) for t in read_tensors(store).values()]
    for rank, ids in enumerate(OWNED):
        loaded = shard(store, rank)
        ours = arrays(loaded.model)
        assert ours.keys() == wanted.keys()
        for name, array in ours.items():
            want = wanted[name]
            want = want if array.shape == want.shape else want[list(ids)]
            np.testing.assert_array_equal(array, want, err_msg=name)
        own = (size * len(ids) // EXPERTS if of_experts else size for size, of_experts in sizes)
        assert loaded.bytes_read == sum(own)


def mlx_arrays(family: str, model: Any) -> dict[str, np.ndarray]:
    return stacked(arrays(model)) if family == "dbrx" else arrays(model)


@pytest.mark.parametrize(
    ("family", "layout"), [*LAYOUTS.items(), ("mixtral", "mlx"), ("dbrx", "mlx")]
)
def test_a_store_loads_to_what_its_source_does(family: str, layout: str, tmp_path: Path) -> None:
    source = build(family, tmp_path / "source", layout=layout)
    store = store_of(source, tmp_path / "store")
    check(store, mlx_arrays(family, load_model(source)[0]))
    before, after = describe(Skeleton(source)), describe(Skeleton(store))
    for field in ("model_type", "dtype", "moe_layers", "experts", "top_k", "exchange_width"):
        assert getattr(after, field) == getattr(before, field)
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_on_the_way_as_mlx_lm_would(family: str, tmp_path: Path) -> None:
    source = build(family, tmp_path / "source", layout=LAYOUTS[family])
    model, config = load_model(source)
    with redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, 32, 4)
    store = store_of(source, tmp_path / "store", Quantization("affine", 4, 32))
    check(store, mlx_arrays(family, model))
    written = json.loads((store / "config.json").read_text())
    assert written["quantization"] == config["quantization"]
    assert written["quantization_config"] == config["quantization"]


@pytest.mark.parametrize(
    "mode", [("affine", 8, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_conversion_by_mlx_lm(
    mode: tuple[str, int, int], dtype: str, tmp_path: Path
) -> None:
    """Its command casts to the type that the config names, and then quantises."""
    source = Path(shutil.copytree(resolve_model("zmoe-tiny"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    name, bits, group = mode
    theirs = tmp_path / "theirs"
    with redirect_stdout(io.StringIO()):
        mlx_lm.convert(
            str(source), str(theirs), quantize=True, q_mode=name, q_bits=bits, q_group_size=group
        )
    store = store_of(source, tmp_path / "store", Quantization(name, bits, group))
    wanted = stacked(arrays(load_model(theirs)[0]))
    info = describe(Skeleton(store))
    whole = Placement(1, 16, ((tuple(range(16)),),) * 4)
    (ours,) = on_ranks(1, lambda r: arrays(load_shard(info, whole, r, spans=Spans()).model))
    assert ours.keys() == wanted.keys()
    for key, array in ours.items():
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
    assert info.quantization == f"{name}-{bits}bit-g{group}"
    assert info.dtype == describe(Skeleton(theirs)).dtype == dtype


def logits(info: ModelInfo, native: bool) -> list[np.ndarray]:
    """Of two nodes, and greedy tokens after them."""
    placement = Placement(2, EXPERTS, (OWNED,) * len(info.moe_layers))

    def work(reducer: ThreadReducer) -> np.ndarray:
        pool = ThreadPool() if native else None
        loaded = load_shard(info, placement, reducer, spans=Spans(), pool=pool, fuse=False)
        rows, tokens = [], list(TOKENS[0])
        for _ in range(4):
            rows.append(np.array(loaded.model(mx.array([tokens]))[0, -1].astype(mx.float32)))
            tokens.append(int(rows[-1].argmax()))
        return np.stack(rows)

    return on_ranks(2, work)


@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
@pytest.mark.parametrize("quantize", [False, True], ids=["floats", "quantised"])
@pytest.mark.parametrize(("family", "layout"), SEVERAL)
def test_the_same_logits_to_the_bit(
    family: str, layout: str, quantize: bool, native: bool, tmp_path: Path
) -> None:
    """With the experts mapped apart or read into one array; and of a store of a store."""
    source = build(family, tmp_path / "source", layout=layout)
    once = store_of(source, tmp_path / "store")
    if quantize:
        affine = Quantization("affine", 4, 32)
        twice = store_of(once, tmp_path / "twice", affine)
        once = store_of(source, tmp_path / "quantised", affine)
        source = twice
    for ours, theirs in zip(
        logits(describe(Skeleton(once)), native),
        logits(describe(Skeleton(source)), native),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_every_expert_has_pages_of_its_own(tmp_path: Path) -> None:
    store = store_of(build("gpt_oss", tmp_path / "source"), tmp_path / "store")
    manifest = read_manifest(store)
    assert manifest is not None and [file.layer for file in manifest.files] == [None, 0, 1]
    for file in manifest.files:
        end = 0
        for part in file.ranges:  # no byte is left out
            assert part.start == end
            end = part.end
            assert file.layer is None or part.start % PAGE_BYTES == part.nbytes % PAGE_BYTES == 0
        assert end == (store / file.name).stat().st_size
        assert len(file.ranges) == 1 + (EXPERTS if file.layer is not None else len(file.tensors))
        for tensor in file.tensors:
            assert tensor.start % 64 == 0 or tensor.nbytes % 64
            assert tensor.start % 4 == 0
        mx.load(str(store / file.name))  # any reader of safetensors can open it


@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
def test_only_own_ranges_are_read(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(build("mixtral", tmp_path / "source"), tmp_path / "store")
    manifest = read_manifest(store)
    assert manifest is not None
    seen: defaultdict[tuple[str, int | None], int] = defaultdict(int)
    preadv, stored = os.preadv, Mapping.stored

    def note(path: Path, start: int, size: int) -> None:
        (file,) = (f for f in manifest.files if f.name == path.name)
        (part,) = (r for r in file.ranges if r.start <= start and start + size <= r.end)
        seen[path.name, part.expert] += size

    def read(descriptor: int, buffers: Sequence[Any], start: int) -> int:
        size = preadv(descriptor, buffers, start)
        note(Path(os.readlink(f"/proc/self/fd/{descriptor}")), start, size)
        return size

    def mapped(self: Mapping, place: Place, progress: Any, cut: Any) -> Any:
        for piece in place.pieces:
            for run in piece.runs():
                note(piece.source.file, *run)
        return stored(self, place, progress, cut)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(Mapping, "stored", mapped)
    info = describe(Skeleton(store))
    placement = Placement(2, EXPERTS, (OWNED,) * 2)
    reducer = ThreadReducer(1, Meeting(2))
    loaded = load_shard(
        info, placement, reducer, spans=Spans(), pool=ThreadPool() if native else None
    )
    files = ("experts-00000.safetensors", "experts-00001.safetensors")
    experts = {(name, expert): 3 * 64 * 64 * 4 for name in files for expert in OWNED[1]}
    dense = sum(tensor.nbytes for tensor in manifest.files[0].tensors)
    assert seen == {**experts, ("model.safetensors", None): dense}
    assert loaded.bytes_read == sum(seen.values())


@pytest.mark.parametrize("layout", ["mlx", "hf"])
@pytest.mark.parametrize("quantization", [None, Quantization("affine", 4, 64)], ids=str)
def test_memory_stays_at_about_one_expert(
    layout: str, quantization: Quantization | None, tmp_path: Path
) -> None:
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    source = build("mixtral", tmp_path / "source", layout=layout, **size)
    expert = 3 * 256 * 512 * 4
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    store_of(source, tmp_path / "store", quantization)
    # The expert as it was read, and one projection stacked and maybe quantised.
    assert expert <= mx.get_peak_memory() - before <= 2 * expert
    assert mx.get_active_memory() - before < 65536


def test_tokenizer_and_so_on_go_along(tmp_path: Path) -> None:
    source = Path(shutil.copytree(resolve_model("zmoe-tiny"), tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / ".hidden").write_text("x")
    (source / "figures").mkdir()
    store = store_of(source, tmp_path / "store")
    kept = {p.name for p in source.iterdir()} - {"pytorch_model.bin", ".hidden", "figures"}
    experts = {f"experts-{layer:05d}.safetensors" for layer in range(4)}
    assert {p.name for p in store.iterdir()} == kept | experts | {"zmoe-store.json"}
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, store))
    assert before == after


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    source = store_of(resolve_model("zmoe-tiny"), tmp_path / "8", Quantization("affine", 8, 32))
    with pytest.raises(InputError, match=r"8 has nothing to quantise.*affine-8bit-g32"):
        store_of(source, tmp_path / "4", Quantization("affine", 4, 32))
    assert not (tmp_path / "4").exists()


def test_a_source_that_is_cut_short_meanwhile_is_named(tmp_path: Path) -> None:
    info = describe(Skeleton(build("mixtral", tmp_path / "source")))
    path = tmp_path / "source" / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is truncated"):
        prestack(info, tmp_path / "store", None, quietly)


def in_memory(file: Path) -> int:
    """How many of the file's pages lie in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        base = ctypes.c_char.from_buffer(memory)
        address, size = ctypes.c_void_p(ctypes.addressof(base)), ctypes.c_size_t(len(memory))
        assert libc.mincore(address, size, pages) == 0, os.strerror(ctypes.get_errno())
        del base
    return sum(page & 1 for page in pages)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a program drop cached pages")
def test_a_store_is_left_to_be_read_from_the_disk(tmp_path: Path) -> None:
    """What has just been written lies in small pages, with which the kernels are slower."""
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(probe):
        pytest.skip("this file system keeps its files in memory")
    source = build("mixtral", tmp_path / "source")
    store = store_of(source, tmp_path / "store")
    assert [file.name for file in sorted(store.glob("*.safetensors")) if in_memory(file)] == []
