"""Whole layers on the kernels against the same model layer by layer in MLX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, build
from tests.one_sequence import sequence_on
from tests.ranks import Meeting, ThreadReducer, on_ranks, round_robin
from zmoe.config import EngineConfig
from zmoe.families.decoders import LAYERS, MLPS, ROUTERS
from zmoe.families.sites import model_classes
from zmoe.kernels.decoder import MlxFeedForward, NativeMoE, NativeMoEBlock
from zmoe.kernels.linear import MappedLinear, MappedQuantizedLinear
from zmoe.kernels.mlp import NativeMlp
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.loading.load import LoadedShard
from zmoe.obs import Spans
from zmoe.placement.types import Placement

FUSED = ["dbrx", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "gpt_oss"]
FUSED += ["minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_5", "qwen3_moe", "qwen3_next"]
# Models within others: of the same layers.
WRAPPED = ["kimi_k25", "kimi_vl", "qwen3_5_moe", "qwen3_vl_moe", "solar_open"]
STEPS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3], [5]]


def load(folder: Path, reducer: Any, fuse: bool, threads: int = 1) -> LoadedShard:
    info = describe(Skeleton(folder))
    placement = round_robin(reducer.nodes, EXPERTS, len(info.moe_layers))
    pool = ThreadPool(threads)
    return load_shard(info, placement, reducer, spans=Spans(), pool=pool, fuse=fuse)


def logits(shard: LoadedShard, reducer: Any) -> list[np.ndarray]:
    forward = sequence_on(shard, reducer)
    return [forward(tokens) for tokens in STEPS]


def alone() -> ThreadReducer:
    return ThreadReducer(0, Meeting(1))


@pytest.mark.parametrize("family", FUSED + WRAPPED)
def test_fused_layers_agree_with_mlx(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path)
    reducer = alone()
    plain = logits(load(folder, reducer, fuse=False), reducer)
    shard = load(folder, reducer, fuse=True)
    assert shard.paged is not None and len(shard.paged.parts) == len(shard.model.layers)
    assert all(isinstance(beside, (NativeMoE, NativeMlp)) for _, beside in shard.paged.parts)
    for got, want in zip(logits(shard, reducer), plain):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_window_is_that_of_mlx_lm(family: str, tmp_path: Path) -> None:
    """Whatever the steps, each row sees what it does in mlx-lm token by token.

    (mlx-lm's own rows of one chunk see other keys than they do one by one.)
    """
    folder, size = build(family, tmp_path), 12
    model, _ = load_model(folder, get_model_classes=model_classes)
    shard = load(folder, alone(), fuse=True)
    assert shard.paged is not None
    for lengths in ([7, 1, 1, 1, 1, 1, 1, 1], [*[1] * 30, 3, 1, 1], [30, 1, 1, 5, 12, *[1] * 20]):
        cache = make_prompt_cache(model, size)
        forward = sequence_on(shard, alone(), EngineConfig(max_kv_size=size))
        for step, rows in enumerate(lengths):
            tokens = [(3 * step + 5 * row + 1) % 96 for row in range(rows)]
            for token in tokens:
                row = model(mx.array([[token]]), cache=cache)[0, -1]
            want = np.array(row.astype(mx.float32))
            got = forward(tokens)
            assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max(), (lengths, step)


def test_the_tables_name_families_that_the_tests_have() -> None:
    assert {name.partition(".")[0] for name in LAYERS} == set(FUSED) <= FAMILIES.keys()
    routed = {name.partition(".")[0] for name in ROUTERS}
    assert routed == (set(FUSED) - {"qwen3_5"}) | PARTS.keys()  # whose block is qwen3_next's


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """MLX would compile its fused functions with the C compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# How many blocks are in C of layers that are not.
PARTS = {
    "deepseek_v32": 2,
    "exaone_moe": 1,
    "granitemoe": 2,
    "granitemoehybrid": 2,
    "hunyuan": 2,
    "jamba": 2,
    "mellum": 2,
}


@pytest.mark.parametrize("family", PARTS)
def test_known_parts_of_layers_on_mlxs_caches(
    family: str, tmp_path: Path, uncompiled: None
) -> None:
    folder, reducer = build(family, tmp_path), alone()
    plain = logits(load(folder, reducer, fuse=False), reducer)
    shard = load(folder, reducer, fuse=True)
    blocks = [module for module in shard.model.modules() if isinstance(module, NativeMoEBlock)]
    assert len(blocks) == PARTS[family]
    assert shard.paged is None
    for got, want in zip(logits(shard, reducer), plain):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "dbrx"])
def test_ranks_agree_to_the_bit_and_with_one_node(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path)
    reducer = alone()
    want = logits(load(folder, reducer, fuse=True), reducer)

    def work(reducer: ThreadReducer) -> list[np.ndarray]:
        return logits(load(folder, reducer, fuse=True, threads=1 + reducer.rank), reducer)

    results = on_ranks(3, work)
    for rows in results:
        for got, first, single in zip(rows, results[0], want):
            assert (got == first).all()
            assert np.abs(got - single).max() <= 1e-5 * np.abs(single).max()


def test_what_is_not_known_is_mlx_within_a_fused_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown router, and an unknown MLP as a dense layer and as a shared expert."""
    folder, reducer = build("glm4_moe", tmp_path), alone()
    plain = logits(load(folder, reducer, fuse=False), reducer)
    for names, name, kinds in (
        (ROUTERS, "glm4_moe.MoE", [NativeMlp, MlxFeedForward]),
        (MLPS, "glm4_moe.MLP", [MlxFeedForward, NativeMoE]),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(names, name)
            shard = load(folder, reducer, fuse=True)
        assert shard.paged is not None
        assert [type(beside) for _, beside in shard.paged.parts][:2] == kinds
        for got, want in zip(logits(shard, reducer), plain):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("quantize", [None, ("affine", 4, 32), ("mxfp4", 4, 32)], ids=str)
def test_what_the_file_has_as_the_kernels_want_it_is_mapped(
    quantize: tuple[str, int, int] | None, tmp_path: Path
) -> None:
    folder = build("qwen3_moe", tmp_path, quantize=quantize)
    before = mx.get_active_memory()
    shard = load(folder, alone(), fuse=True)
    kinds = (MappedLinear, MappedQuantizedLinear)
    attention = shard.model.layers[0].self_attn
    assert isinstance(attention.q_proj, kinds)
    assert shard.bytes_read == shard.share_bytes
    kept = mx.get_active_memory() - before
    assert kept < shard.share_bytes / 4  # of the weights MLX holds the embedding alone
    model, _ = load_model(folder)
    want = model.layers[0].self_attn.q_proj.weight
    assert mx.array_equal(attention.q_proj.weight, want)  # a copy for whoever asks


def test_experts_apart_in_the_file_are_stacked_once(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path, layout="hf")
    reducer = alone()
    shard = load(folder, reducer, fuse=True)
    want = np.array(load_model(folder)[0](mx.array([STEPS[0]])))[0, -1]
    assert np.abs(logits(shard, reducer)[0] - want).max() <= 1e-4 * np.abs(want).max()


def test_a_node_without_experts_of_a_layer(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path)
    info = describe(Skeleton(folder))
    placement = Placement(2, EXPERTS, (((), tuple(range(EXPERTS))),) * len(info.moe_layers))
    want = np.array(load_model(folder)[0](mx.array([STEPS[0]])))[0, -1]

    def work(reducer: ThreadReducer) -> list[np.ndarray]:
        pool = ThreadPool()
        shard = load_shard(info, placement, reducer, spans=Spans(), pool=pool)
        return logits(shard, reducer)

    for rows in on_ranks(2, work):
        assert np.abs(rows[0] - want).max() <= 1e-4 * np.abs(want).max()


def test_the_cache_goes_on_in_further_blocks(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path)
    reducer = alone()
    tokens = [(7 * i) % 60 for i in range(300)]
    rows = []
    for fuse in (False, True):
        shard = load(folder, reducer, fuse=fuse)
        forward = sequence_on(shard, reducer)
        for start in range(0, 300, 50):
            row = forward(tokens[start : start + 50])
        rows.append(row)
    assert np.abs(rows[0] - rows[1]).max() <= 1e-5 * np.abs(rows[0]).max()
