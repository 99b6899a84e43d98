"""Every family, on one node and spread over several, says what mlx-lm says in one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, VOCAB, build
from tests.ranks import ThreadReducer, on_ranks, round_robin
from zmoe.loading import LoadedShard, Skeleton, describe, load_shard
from zmoe.obs import Spans
from zmoe.placement.types import ModelInfo

TOKENS = 12
PROMPT = [(7 * i + 3) % VOCAB for i in range(20)]  # three prefill chunks of 8
BATCH = [[5, 9, 2, 40, 41, 7, 1], [80, 3, 3, 15, 60, 61, 62]]
# Their blocks and layers are those of another family; only their wrapping is new.
REUSED = {
    "gemma4",
    "glm_moe_dsa",
    "kimi_k25",
    "kimi_vl",
    "longcat_flash_ngram",
    "mistral3",
    "qwen3_5",
    "qwen3_vl_moe",
    "solar_open",
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """MLX compiles fused functions with the C compiler on CPU; a minute for all families."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def generate(model: Module) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the log-probabilities (tokens, vocabulary) they came from."""
    steps = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS, prefill_step_size=8)
    tokens, scores = zip(*((int(t), np.array(p.astype(mx.float32))) for t, p in steps), strict=True)
    return list(tokens), np.stack(scores)


def load(info: ModelInfo, reducer: ThreadReducer) -> LoadedShard:
    placement = round_robin(reducer.nodes, info.experts, len(info.moe_layers))
    return load_shard(info, placement, reducer, spans=Spans())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_nodes_agrees_with_one_process(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / family)
    info = describe(Skeleton(folder))
    reference, _ = load_model(folder)
    tokens, scores = generate(reference)
    batch = np.array(reference(mx.array(BATCH)))
    scale = np.abs(scores).max()
    # Decided and varied, or equal tokens would prove little.
    best = np.sort(scores, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > 1e-5 * scale
    assert len(set(tokens)) > 3
    assert info.experts == EXPERTS

    for nodes in (3,) if family in REUSED else (1, 4):  # 4 do not divide the experts

        def work(reducer: ThreadReducer) -> tuple[list[int], np.ndarray, np.ndarray, set[int]]:
            shard = load(info, reducer)
            assert shard.notices == ()
            said = generate(shard.model)
            layers = {call.layer for call in reducer.calls if call.contributed}
            return *said, np.array(shard.model(mx.array(BATCH))), layers

        for said, logprobs, logits, layers in on_ranks(nodes, work):
            assert said == tokens
            assert np.abs(logprobs - scores).max() <= 1e-4 * scale
            assert np.abs(logits - batch).max() <= 1e-4 * np.abs(batch).max()
            assert layers  # nobody was idle


def test_the_families_are_all_that_mlx_lm_has() -> None:
    """A family that a later mlx-lm adds shall not go unnoticed; nor shall it be a failure."""
    folder = Path(__import__("mlx_lm").__file__).parent / "models"
    sources = {path.stem: path.read_text() for path in folder.glob("*.py")}
    switches = {
        name
        for name, text in sources.items()
        if "SwitchGLU(" in text or "SwitchMLP(" in text or name == "dbrx"
    }
    # Metal kernels alone route muse_spark: its adapter has a test of its own.
    untested = switches - {"switch_layers", "muse_spark"} - set(FAMILIES)
    assert set(FAMILIES) <= set(sources)
    if untested:
        warnings.warn(f"untested families of mlx-lm: {', '.join(sorted(untested))}", stacklevel=1)
