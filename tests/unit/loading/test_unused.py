"""What a model makes no use of is found by its renaming alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.families import EXPERTS, FAMILIES, build, random_model, save
from tests.families.layouts import deepseek_fp8_hf
from tests.ranks import Meeting, ThreadReducer
from zmoe.loading import LoadedShard, Skeleton, describe, load_shard
from zmoe.loading import plan as reading
from zmoe.loading.places import Weights
from zmoe.loading.plan import unused_names
from zmoe.obs import Spans
from zmoe.placement.types import Placement

NAMES = [
    "model.layers.0.norm.weight",
    "model.layers.0.q.weight",
    "model.layers.0.k.weight",
    "model.layers.1.q.weight",
    "model.layers.1.k.weight",
    "model.layers.2.norm.weight",
    "visual.blocks.0.norm.weight",
    "visual.blocks.1.norm.weight",
    "model.embed.weight",
    "lm_head.weight",
]


def everything() -> Weights:
    return {name: mx.zeros((2, 2)) for name in NAMES}


def sanitize(weights: Weights) -> Weights:
    """Drops images and the third layer, fuses q and k, turns the head around."""
    out = {}
    for name, array in weights.items():
        if name.startswith(("visual.", "model.layers.2.")) or ".k." in name:
            continue
        if ".q." in name:
            array = mx.concatenate([array, weights[name.replace(".q.", ".k.")]])
        out[name] = array.T if name == "lm_head.weight" else array
    return out


IDLE = {name for name in NAMES if "visual" in name or "layers.2" in name}


def test_dropped_parts_are_found_and_changed_ones_are_not() -> None:
    assert unused_names(sanitize, everything()) == IDLE


def test_parts_are_tried_apart_when_something_else_is_amiss_without_them() -> None:
    def strict(weights: Weights) -> Weights:
        if "lm_head.weight" not in weights:
            raise AttributeError("no head")
        return sanitize(weights)

    assert unused_names(strict, everything()) == IDLE
    assert (
        unused_names(lambda weights: {n: w + 1 for n, w in weights.items()}, everything()) == set()
    )
    assert unused_names(dict, everything()) == set()


def shard(folder: Path) -> LoadedShard:
    info = describe(Skeleton(folder))
    placement = Placement(2, EXPERTS, (((0, 2, 5), (1, 3, 4)),) * len(info.moe_layers))
    return load_shard(info, placement, ThreadReducer(0, Meeting(2)), spans=Spans())


def test_a_drafting_layer_in_fp8_is_not_read(tmp_path: Path) -> None:
    config = FAMILIES["deepseek_v3"].config
    weights = dict(tree_flatten(random_model(config).parameters()))
    lean = shard(save(tmp_path / "lean", config, deepseek_fp8_hf(weights, dict(config))))
    draft = {
        name.replace("layers.2.", "layers.61."): array
        for name, array in weights.items()
        if "layers.2." in name
    }
    laden = deepseek_fp8_hf({**weights, **draft}, dict(config))
    assert shard(save(tmp_path / "laden", config, laden)).bytes_read == lean.bytes_read


def test_an_array_that_was_taken_for_unused_is_right_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read by MLX instead, which we don't count: nothing worse."""
    folder = build("mixtral", tmp_path)
    want = shard(folder)
    name = "model.layers.1.self_attn.q_proj.weight"
    monkeypatch.setattr(reading, "unused_names", lambda sanitize, weights: {name})
    got = shard(folder)
    assert got.bytes_read < want.bytes_read and got.share_bytes == want.share_bytes
    for (path, one), (_, other) in zip(
        tree_flatten(got.model.parameters()), tree_flatten(want.model.parameters()), strict=True
    ):
        assert mx.array_equal(one, other), path
