"""Families of models on 1 to 4 real nodes against mlx-lm in one process.

All of them run on threads with MLX's products (tests/unit/families/test_families.py), and
here on one node with the kernels' products; on real nodes runs one for each kind of block
and router.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tests.cluster.conftest import Workers
from tests.families import FAMILIES, build
from tests.one_sequence import ENOUGH_BLOCKS, OneSequence
from zmoe.cluster.leader import Leader
from zmoe.cluster.node import Node
from zmoe.cluster.resolver import PlacementResolver
from zmoe.cluster.spec import PlacementRequest
from zmoe.config import EngineConfig, Timing
from zmoe.loading import Skeleton, describe
from zmoe.placement.build import place_evenly

Run = tuple[list[int], list[np.ndarray]]
PROMPT = [5, 17, 3, 44, 29, 8, 61, 2, 33, 12, 7]
TOKENS = 8
CHUNK = 6


def reference(folder: Path, tokens_given: list[int] | None = None) -> Run:
    """mlx-lm alone, in float32: greedy tokens, and the logits (vocabulary,) of each step."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    tokens, logits, todo = [], [], PROMPT
    for _ in range(TOKENS):
        row = model(mx.array([todo]), cache=cache)[0, -1].astype(mx.float32)
        logits.append(np.array(row))
        tokens.append(int(logits[-1].argmax()))
        todo = tokens[-1:] if tokens_given is None else [tokens_given[len(tokens) - 1]]
    return tokens, logits


def worst_difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Largest difference of any logit, relative to the largest logit."""
    scale = max(float(np.abs(row).max()) for row in wanted)
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted)) / scale


def run(
    folder: Path,
    nodes: int,
    workers: Workers,
    compute: str = "native",
    schedule: str = "decentralized",
) -> Run:
    """The same on `nodes` nodes, prompt in chunks."""
    info = describe(Skeleton(folder))
    engine = EngineConfig(prefill_chunk=CHUNK, compute=compute, schedule=schedule)
    leader = None
    if nodes == 1:
        node = Node(info, engine, Timing())
        node.place(place_evenly(info.shape, 1))
        node.load(lambda done, total: None)
    else:
        spec = workers.spec(nodes, engine)
        resolver = PlacementResolver(PlacementRequest("experts"), info, nodes, engine)
        leader = Leader(info, str(folder), spec, resolver, lambda *_: None, lambda _: None, print)
    try:
        if leader is not None:
            leader.start()
            node = leader.node
        runner = leader or node
        if node.engine.paged:
            runner.make_cache(ENOUGH_BLOCKS)
        forward = OneSequence(runner.run, node.engine.paged)
        tokens, logits = [], []
        forward(PROMPT[:CHUNK])
        todo = PROMPT[CHUNK:]
        for _ in range(TOKENS):
            logits.append(forward(todo))
            tokens.append(int(logits[-1].argmax()))
            todo = tokens[-1:]
        return tokens, logits
    finally:
        if leader is not None:
            leader.close()


# By what is peculiar to their blocks: groups of experts, biases and sinks, a gate of the
# shared expert, weights that scale the input, experts that do nothing, MLPs without a gate.
# DBRX, Mixtral and Qwen3-MoE run on real nodes below, quantised and in half precision.
ON_NODES = {"deepseek_v3", "gpt_oss", "qwen2_moe", "llama4", "longcat_flash", "nemotron_h"}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_nodes_agree_with_mlx_lm(name: str, workers: Workers, tmp_path: Path) -> None:
    folder = build(name, tmp_path / name)
    tokens, logits = reference(folder)
    runs = [(1, "decentralized")]
    if name in ON_NODES:
        runs += [(2, "decentralized"), (4, "decentralized"), (3, "centralized")]
    for nodes, schedule in runs:
        found_tokens, found_logits = run(folder, nodes, workers, schedule=schedule)
        assert found_tokens == tokens, f"{nodes} nodes, {schedule}"
        difference = worst_difference(found_logits, logits)
        assert difference <= 1e-4, f"{nodes} nodes, {schedule}: logits differ by {difference:.1e}"


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_mlx_alone_may_compute(name: str, workers: Workers, tmp_path: Path) -> None:
    folder = build(name, tmp_path / name)
    tokens, logits = reference(folder)
    for nodes, schedule in ((2, "decentralized"), (2, "centralized")):
        found_tokens, found_logits = run(folder, nodes, workers, "mlx", schedule)
        assert found_tokens == tokens, f"{nodes} nodes, {schedule}"
        assert worst_difference(found_logits, logits) <= 1e-4, f"{nodes} nodes, {schedule}"


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("dbrx", ("affine", 4, 32)),
        ("mixtral", ("affine", 8, 32)),
        ("qwen3_moe", ("mxfp4", 4, 32)),
    ],
    ids=str,
)
def test_quantised_models_agree_with_mlx_lm(
    name: str, quantize: tuple[str, int, int], workers: Workers, tmp_path: Path
) -> None:
    """The activations are float32 and the products the same: so is the bound."""
    folder = build(name, tmp_path / name, quantize=quantize)
    tokens, logits = reference(folder)
    for nodes, schedule in ((1, "decentralized"), (3, "decentralized"), (2, "centralized")):
        found_tokens, found_logits = run(folder, nodes, workers, schedule=schedule)
        assert found_tokens == tokens, f"{nodes} nodes, {schedule}"
        assert worst_difference(found_logits, logits) <= 1e-4, f"{nodes} nodes, {schedule}"


@pytest.mark.parametrize(
    ("name", "dtype", "digits"),
    [("dbrx", "bfloat16", 8), ("mixtral", "float16", 11), ("qwen3_moe", "bfloat16", 8)],
)
def test_halves_agree_with_float32(
    name: str, dtype: str, digits: int, workers: Workers, tmp_path: Path
) -> None:
    """mlx-lm computes the reference in float32 from the same weights.

    A step rounds some twenty times per layer to `digits` binary digits, by half
    a unit each; errors of random sign add up to a few units of the largest
    logit. Sixteen leave room; a lost expert shows as more than a hundred.
    """
    folder = build(name, tmp_path / name, dtype=dtype)
    tokens, _ = run(folder, 1, workers)
    _, logits = reference(folder, tokens)
    for nodes, schedule in ((1, "decentralized"), (2, "decentralized"), (4, "centralized")):
        found_tokens, found_logits = run(folder, nodes, workers, schedule=schedule)
        same = next((i for i, (a, b) in enumerate(zip(found_tokens, tokens)) if a != b), TOKENS)
        assert same > 0
        difference = worst_difference(found_logits[:same], logits[:same])
        assert difference <= 16 * 2.0**-digits, f"{nodes} nodes: {difference * 2**digits:.1f} units"
