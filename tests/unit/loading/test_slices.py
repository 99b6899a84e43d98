"""Slices of experts: their outputs add up to mlx-lm's, and a node reads its own alone."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from tests.families import EXPERTS, build
from tests.ranks import Meeting, ThreadReducer, on_ranks
from tests.unit.store.stores import store_of
from zmoe.errors import ModelError, PlacementError
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_experts, load_shard
from zmoe.obs import Spans
from zmoe.placement.check import check_placement
from zmoe.placement.types import ModelInfo, Placement

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
HIDDEN = 192
EVERYTHING = tuple(range(EXPERTS))
# 64 and 128 of it, and replicas of the second part.
SLICES = ((0, 64), (64, 192), (64, 192))
WIDTHS = {
    "mixtral": {"intermediate_size": HIDDEN},
    "gpt_oss": {"intermediate_size": HIDDEN},
    "qwen3_moe": {"moe_intermediate_size": HIDDEN},
    "qwen2_moe": {"moe_intermediate_size": HIDDEN},
}


def sliced(info: ModelInfo) -> Placement:
    layer = (EVERYTHING, EVERYTHING, EVERYTHING)
    return Placement(3, EXPERTS, (layer,) * len(info.moe_layers), SLICES)


def check(folder: Path, native: bool, original: Path | None = None) -> None:
    info = describe(Skeleton(folder))
    want = np.array(load_model(original or folder)[0](TOKENS).astype(mx.float32))

    def work(reducer: ThreadReducer) -> np.ndarray:
        pool = ThreadPool() if native else None
        shard = load_shard(info, sliced(info), reducer, spans=Spans(), pool=pool, fuse=False)
        return np.array(shard.model(TOKENS).astype(mx.float32))

    for logits in on_ranks(3, work):
        np.testing.assert_allclose(logits[:, -1], want[:, -1], atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
@pytest.mark.parametrize("quantize", [None, ("affine", 4, 64), ("affine", 6, 32)], ids=str)
@pytest.mark.parametrize("family", WIDTHS)
def test_slices_add_up(
    family: str, quantize: tuple[str, int, int] | None, native: bool, tmp_path: Path
) -> None:
    """With biases (gpt_oss) and shared experts (qwen2_moe) too."""
    size = {"hidden_size": 64} if quantize is not None else {}
    check(build(family, tmp_path, quantize=quantize, **WIDTHS[family], **size), native)


@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
def test_published_layouts_and_stores(native: bool, tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path / "hf", layout="hf", **WIDTHS["mixtral"])
    check(folder, native)
    store = store_of(folder, tmp_path / "store")
    check(store, native, original=folder)


@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
def test_a_store_with_biases(native: bool, tmp_path: Path) -> None:
    folder = build("gpt_oss", tmp_path / "mlx", **WIDTHS["gpt_oss"])
    check(store_of(folder, tmp_path / "store"), native, original=folder)


def test_a_store_of_plain_mlps(tmp_path: Path) -> None:
    folder = build("phixtral", tmp_path / "mlx")
    store = store_of(folder, tmp_path / "store")
    info = describe(Skeleton(store))
    slices = ((0, 64), (64, 192), (192, 256))
    want = np.array(load_model(folder)[0](TOKENS))

    def work(reducer: ThreadReducer) -> np.ndarray:
        placement = replace(sliced(info), slices=slices)
        return np.array(load_shard(info, placement, reducer, spans=Spans()).model(TOKENS))

    for logits in on_ranks(3, work):
        np.testing.assert_allclose(logits, want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("pool", [None, ThreadPool(1)], ids=["mlx", "native"])
def test_a_node_reads_and_holds_its_slice(
    pool: ThreadPool | None, dense: bool, tmp_path: Path
) -> None:
    info = describe(Skeleton(build("mixtral", tmp_path, hidden_size=64, **WIDTHS["mixtral"])))
    whole = Placement(1, EXPERTS, ((EVERYTHING,),) * len(info.moe_layers))
    reports: list[tuple[int, int]] = []

    def load(placement: Placement, rank: int) -> tuple[int, int]:
        reducer = ThreadReducer(rank, Meeting(placement.nodes))
        told = {"pool": pool, "progress": lambda done, total: reports.append((done, total))}
        if dense:
            shard = load_shard(info, placement, reducer, spans=Spans(), **told)
        else:
            shard = load_experts(info, placement, reducer, **told)
        return shard.share_bytes, shard.bytes_read

    experts = len(info.moe_layers) * EXPERTS * 3 * 64 * HIDDEN * 4
    for all_bytes, part in zip(load(whole, 0), load(sliced(info), 0)):
        assert all_bytes - part == experts * 2 // 3
    assert all(done <= total for done, total in reports)
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
@pytest.mark.parametrize("family", ["dbrx", "gpt_oss"])
def test_slices_of_what_lies_otherwise(family: str, native: bool, tmp_path: Path) -> None:
    """DBRX as published has the rows of all experts in one matrix, two of them transposed, gpt-oss
    gate and up by turns. Every byte is read once.
    """
    config = {
        "attn_pdrop": 0,
        "ffn_hidden_size": HIDDEN,
        "moe_num_experts": EXPERTS,
        "moe_top_k": 2,
    }
    width = {"dbrx": {"ffn_config": config}, "gpt_oss": {"intermediate_size": HIDDEN}}
    folder = build(family, tmp_path, layout="hf", **width[family])
    check(folder, native)
    info = describe(Skeleton(folder))
    pool = ThreadPool() if native else None
    shard = load_shard(
        info, sliced(info), ThreadReducer(1, Meeting(3)), spans=Spans(), pool=pool, fuse=False
    )
    assert shard.bytes_read <= sum(tensor.nbytes for tensor in Skeleton(folder).tensors.values())


def test_a_truncated_file_of_what_lies_otherwise(tmp_path: Path) -> None:
    folder = build("gpt_oss", tmp_path, layout="hf", intermediate_size=HIDDEN)
    info, skeleton = describe(Skeleton(folder)), Skeleton(folder)
    assert skeleton.sites
    for file in folder.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        load_shard(
            info, sliced(info), ThreadReducer(1, Meeting(3)), spans=Spans(), skeleton=skeleton
        )


def test_what_cannot_be_sliced(tmp_path: Path) -> None:
    """Experts of several widths, or whose outputs are no sums."""
    folder = build("mixtral", tmp_path, **WIDTHS["mixtral"])
    info = replace(describe(Skeleton(folder)), slice_alignment=0)
    with pytest.raises(PlacementError, match="cannot be sliced: their widths differ"):
        check_placement(sliced(info), info.shape)
