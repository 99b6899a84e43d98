"""Every family with slices of its experts in one graph says what mlx-lm says in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, build
from tests.ranks import ThreadGraph, ThreadReducer, on_ranks
from tests.unit.families.test_families import BATCH, generate
from zmoe.errors import SettingError
from zmoe.exchange.groups import OneGroup
from zmoe.loading import Skeleton, check_attention, describe, load_shard
from zmoe.loading.attention import cut_attention, sum_heads
from zmoe.moe.graph import Form, Graph
from zmoe.obs import Spans
from zmoe.placement.types import Placement

EVERYTHING = tuple(range(EXPERTS))
Cut = tuple[tuple[int, int], ...]
CUTS: tuple[Cut, ...] = (
    ((0, 1), (1, 3), (3, 4)),
    ((0, 1), (1, 4)),
    ((0, 1), (1, 2), (2, 3), (3, 4)),
)
CUT = {  # of these mlx-lm's shard() cuts attention, and adds up its outputs alone
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v41",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "kimi_k25",
    "kimi_k3",
    "longcat_flash",
    "longcat_flash_ngram",
    "minimax_m3_vl",
    "mistral4",
    "qwen3_moe",
    "solar_open",
    "step3p5",
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def check(folder: Path, *quarters: tuple[int, int], cuts_attention: bool = False) -> None:
    """With these quarters of every expert on one node each, and their shares of the heads."""
    info = describe(Skeleton(folder))
    each = info.moe_intermediate_size // 4
    slices = tuple((start * each, end * each) for start, end in quarters)
    owned = ((EVERYTHING,) * len(slices),) * len(info.moe_layers)
    placement = Placement(len(slices), EXPERTS, owned, slices)
    reference, _ = load_model(folder)
    tokens, scores = generate(reference)
    batch = np.array(reference(mx.array(BATCH)))

    def work(reducer: ThreadReducer) -> tuple[list[int], np.ndarray, np.ndarray, int]:
        form = Form(ThreadGraph(reducer, mx.float32), cuts_attention=cuts_attention)
        shard = load_shard(info, placement, reducer, spans=Spans(), form=form)
        assert shard.notices == ()
        said = generate(shard.model)
        return *said, np.array(shard.model(mx.array(BATCH))), len(reducer.calls)

    for said, logprobs, logits, calls in on_ranks(len(slices), work):
        assert said == tokens
        assert np.abs(logprobs - scores).max() <= 1e-4 * np.abs(scores).max()
        assert np.abs(logits - batch).max() <= 1e-4 * np.abs(batch).max()
        layers = info.layers if cuts_attention else 0
        assert calls >= len(info.moe_layers) + layers
        assert cuts_attention or calls % len(info.moe_layers) == 0


@pytest.mark.parametrize(("family", "cut"), zip(FAMILIES, itertools.cycle(CUTS)))
def test_slices_in_one_graph(family: str, cut: Cut, tmp_path: Path) -> None:
    """On two to four nodes; of all that a family has beside its experts there is one."""
    check(build(family, tmp_path / family), *cut)


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.to_hf])
def test_published_layouts(family: str, tmp_path: Path) -> None:
    """What lies otherwise in the checkpoint is cut when MLX has made it."""
    check(build(family, tmp_path / family, layout="hf"), (0, 2), (2, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_cut_by_heads(family: str, tmp_path: Path) -> None:
    """For the families whose attention ends in a sum of heads; the others are refused."""
    folder = build(family, tmp_path / family)
    if family in CUT:
        check(folder, (0, 1), (1, 4), cuts_attention=True)
        return
    with pytest.raises(SettingError, match="attention is sharded: expected replicated, as "):
        check_attention(folder, 2)


@pytest.mark.parametrize("mode", [("affine", 4, 32), ("mxfp4", 4, 32)], ids=lambda mode: mode[0])
def test_quantised_attention_cut_by_heads(mode: tuple[str, int, int], tmp_path: Path) -> None:
    folder = build("gpt_oss", tmp_path / "model", quantize=mode, intermediate_size=128)
    check(folder, (0, 1), (1, 4), cuts_attention=True)


def test_caches_and_weights_are_those_of_a_nodes_heads(tmp_path: Path) -> None:
    skeleton = Skeleton(build("qwen3_moe", tmp_path / "model"))
    model: Any = skeleton.module
    whole = model.layers[0].self_attn.v_proj.weight.shape[0]
    heads = cut_attention(model, skeleton.sites, "qwen3_moe", 1, 2)
    graph = Graph(OneGroup(mx.distributed.init(backend="ring")), 0, 0, mx.float32)
    sum_heads(model, skeleton.sites, heads, graph)
    cache = make_prompt_cache(model)
    model(mx.array([[1, 2]]), cache=cache)
    assert cache[0].keys.shape[1] == 1  # of 2
    assert model.layers[0].self_attn.v_proj.weight.shape[0] == whole / 2
