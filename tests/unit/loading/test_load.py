"""Loading: uneven shares, progress, memory, and checkpoints that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from tests.families import EXPERTS, build, save
from tests.ranks import Meeting, ThreadReducer, on_ranks, round_robin
from zmoe.errors import ModelError, PlacementError
from zmoe.families.table import ADAPTERS
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.obs import Spans
from zmoe.placement.types import ModelInfo, Placement

TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def alone() -> ThreadReducer:
    return ThreadReducer(0, Meeting(1))


def everything(info: ModelInfo) -> Placement:
    return Placement(1, info.experts, ((tuple(range(info.experts)),),) * len(info.moe_layers))


@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_layers_may_own_different_numbers_of_experts_or_none(
    family: str, layout: str, tmp_path: Path
) -> None:
    folder = build(family, tmp_path, layout=layout)
    info = describe(Skeleton(folder))
    placement = Placement(3, EXPERTS, (((), (0, 1, 2, 3, 5), (4,)), ((1, 2), (), (0, 3, 4, 5))))
    want = np.array(load_model(folder)[0](mx.array(TOKENS)))

    def work(reducer: ThreadReducer) -> tuple[np.ndarray, list[bool], int]:
        loaded = load_shard(info, placement, reducer, spans=Spans())
        logits = np.array(loaded.model(mx.array(TOKENS)))
        assert loaded.bytes_read == loaded.share_bytes
        return logits, [call.contributed for call in reducer.calls], loaded.share_bytes

    results = on_ranks(3, work)
    for logits, _, _ in results:
        np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
    assert [contributed for _, contributed, _ in results] == [
        [False, True],
        [True, False],
        [True, True],
    ]
    expert = 3 * 64 * 64 * 4  # three matrices of 64 x 64 float32
    sizes = [size for _, _, size in results]
    assert [size - min(sizes) for size in sizes] == [0, 3 * expert, 3 * expert]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["dbrx", "mixtral", "deepseek_v3", "gpt_oss"])
def test_half_models_stay_near_the_same_weights_in_float32(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """A roundoff of 2^-8 or 2^-11 per step, some two dozen steps to a logit: their mean
    error is bounded by the sum of these. (mlx-lm cannot run half experts on CPU.)
    """
    folder = build(family, tmp_path, dtype=dtype)
    reference, _ = load_model(folder)
    reference.set_dtype(mx.float32)
    want = np.array(reference(mx.array(TOKENS)))
    info = describe(Skeleton(folder))

    def work(reducer: ThreadReducer) -> np.ndarray:
        placement = round_robin(reducer.nodes, EXPERTS, len(info.moe_layers))
        model = load_shard(info, placement, reducer, spans=Spans()).model
        logits = model(mx.array(TOKENS))
        assert str(logits.dtype).endswith(dtype)
        return np.array(logits.astype(mx.float32))

    roundoff = 2**-8 if dtype == "bfloat16" else 2**-11
    for nodes in (1, 3):
        results = on_ranks(nodes, work)
        for logits in results:
            assert (logits == results[0]).all()  # the ranks agree bit for bit
        assert np.abs(results[0] - want).mean() <= 24 * roundoff * want.std()


def test_progress_ends_at_exactly_what_was_read(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path)
    info = describe(Skeleton(folder))
    seen: list[tuple[int, int]] = []
    loaded = load_shard(
        info, everything(info), alone(), spans=Spans(), progress=lambda *p: seen.append(p)
    )
    assert seen == sorted(seen) and {total for _, total in seen} == {loaded.bytes_read}
    assert seen[-1][0] == loaded.bytes_read and len(seen) > 10


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_memory_stays_below_the_share_and_one_tensor(layout: str, tmp_path: Path) -> None:
    """As MLX counts it: evaluated arrays alone."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    folder = build("mixtral", tmp_path, layout=layout, **size)
    info = describe(Skeleton(folder))
    owned = (tuple(range(4)), (4, 5))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    reducer = ThreadReducer(0, Meeting(2))
    placement = Placement(2, EXPERTS, (owned,) * 4)
    loaded = load_shard(info, placement, reducer, spans=Spans())
    stacked = 4 * 256 * 512 * 4  # the largest array of the finished share
    peak = mx.get_peak_memory() - before
    assert loaded.share_bytes <= peak <= loaded.share_bytes + stacked + 65536
    assert mx.get_active_memory() - before <= loaded.share_bytes + 65536
    assert loaded.largest_tensor_bytes == stacked
    assert mx.get_cache_memory() <= 16 << 20  # what was stacked went back to the system


def test_an_unknown_block_falls_back_to_its_switch_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ADAPTERS, "qwen2_moe.Qwen2MoeSparseMoeBlock")
    folder = build("qwen2_moe", tmp_path)
    info = describe(Skeleton(folder))
    assert info.exchange_width == info.top_k * info.hidden_size
    want = np.array(load_model(folder)[0](mx.array(TOKENS)))
    placement = Placement(2, EXPERTS, (((0, 1, 2, 3, 4, 5), ()), ((1, 4), (0, 2, 3, 5))))

    def work(reducer: ThreadReducer) -> tuple[np.ndarray, tuple[str, ...]]:
        loaded = load_shard(info, placement, reducer, spans=Spans())
        return np.array(loaded.model(mx.array(TOKENS))), loaded.notices

    for logits, notices in on_ranks(2, work):
        np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
        assert len(notices) == 1 and "Qwen2MoeSparseMoeBlock has no adapter" in notices[0]


def test_a_placement_of_another_model_is_refused(tmp_path: Path) -> None:
    info = describe(Skeleton(build("mixtral", tmp_path)))
    for placement in (
        Placement(1, 8, ((tuple(range(8)),),) * 2),
        Placement(1, EXPERTS, ((tuple(range(EXPERTS)),),)),
    ):
        with pytest.raises(PlacementError, match="does not fit"):
            load_shard(info, placement, alone(), spans=Spans())


def rewritten(folder: Path, change: dict[str, mx.array | None]) -> Path:
    """The checkpoint again, with some tensors replaced or (None) left out."""
    weights: dict[str, mx.array] = {}
    for path in folder.glob("*.safetensors"):
        weights.update(mx.load(str(path)))
        mx.eval(*weights.values())
        path.unlink()
    for name, value in change.items():
        assert name in weights or value is not None, name
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    return save(folder, json.loads((folder / "config.json").read_text()), weights)


EXPERT = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
SWITCH = "model.layers.0.block_sparse_moe.switch_mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
BROKEN = {
    "dense missing": ("mlx", {NORM: None}, f"tensor {NORM} is missing"),
    "switch missing": ("mlx", {SWITCH: None}, f"tensor {SWITCH} is missing"),
    "expert missing": ("hf", {EXPERT: None}, f"tensor {EXPERT} is missing"),
    "dense misshapen": ("mlx", {NORM: mx.zeros(63)}, NORM),
    "switch misshapen": ("mlx", {SWITCH: mx.zeros((EXPERTS, 64, 60))}, SWITCH),
    "expert misshapen": ("hf", {EXPERT: mx.zeros((64, 60))}, "shape"),
    "unknown": ("mlx", {"model.layers.0.odd": mx.zeros(3)}, "model.layers.0.odd is unknown"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_tensors_that_do_not_make_up_the_model_are_named(fault: str, tmp_path: Path) -> None:
    """By `describe` already, so before anything is launched, and in one line."""
    layout, change, reason = BROKEN[fault]
    folder = rewritten(build("mixtral", tmp_path, layout=layout), dict(change))
    with pytest.raises(ModelError) as raised:
        describe(Skeleton(folder))
    message = str(raised.value)
    assert reason in message and "\n" not in message


def test_a_checkpoint_damaged_after_inspection_is_still_named(tmp_path: Path) -> None:
    info = describe(Skeleton(build("mixtral", tmp_path, layout="hf")))
    rewritten(tmp_path, {EXPERT: None})
    with pytest.raises(ModelError, match=r"experts\.4\.w3\.weight is missing"):
        load_shard(info, everything(info), alone(), spans=Spans())
