"""A node that holds experts only: the same experts as any node's, and nothing else."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.families import EXPERTS, FAMILIES, build, random_model, save
from tests.ranks import Meeting, ThreadReducer, round_robin
from tests.unit.moe.test_block import MUSE
from tests.unit.store.stores import flip, store_of
from zmoe.checkpoint.manifest import DENSE
from zmoe.errors import ModelError
from zmoe.exchange.dispatched import DispatchBatch
from zmoe.families.sites import find_sites
from zmoe.kernels.threads import ThreadPool
from zmoe.kernels.worker_experts import WorkerExperts
from zmoe.loading import Skeleton, describe, load_experts, load_shard
from zmoe.native import Dtype
from zmoe.obs import Spans
from zmoe.placement.types import Placement


def rank_1() -> ThreadReducer:
    return ThreadReducer(1, Meeting(2))


# mlx-lm's layout is alike for all families; the published ones are not.
CASES = [("mixtral", "mlx"), ("dbrx", "mlx")]
CASES += [(name, "hf" if FAMILIES[name].to_hf else "mlx") for name in sorted(FAMILIES)]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_same_experts_as_beside_dense_weights(name: str, layout: str, tmp_path: Path) -> None:
    info = describe(Skeleton(build(name, tmp_path, layout=layout)))
    placement = round_robin(2, EXPERTS, len(info.moe_layers))
    full = load_shard(info, placement, rank_1(), spans=Spans())
    loaded = load_experts(info, placement, rank_1())
    switches = [site.switch for site in find_sites(full.model)]
    assert len(loaded.layers) == len(switches)
    total = 0
    for layer, switch, owned in zip(loaded.layers, switches, placement.owned):
        mine = dict(tree_flatten(layer._experts._switch.parameters()))
        wanted = dict(tree_flatten(switch.parameters()))
        assert mine.keys() == wanted.keys()
        for key, array in wanted.items():
            assert mx.array_equal(mine[key], array), key
            total += array.nbytes
        assert layer.local.tolist() == [
            owned[1].index(e) if e in owned[1] else -1 for e in range(EXPERTS)
        ]
    assert loaded.share_bytes == total
    assert 0 < loaded.bytes_read < full.bytes_read


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_memory_holds_nothing_dense(layout: str, tmp_path: Path) -> None:
    """As MLX counts it, beside dense weights that are larger than all experts."""
    size = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 16384}
    info = describe(Skeleton(build("mixtral", tmp_path, layout=layout, **size)))
    placement = Placement(2, EXPERTS, (((0, 1), (2, 3, 4, 5)),) * 2)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_experts(info, placement, rank_1())
    stacked = 4 * 256 * 256 * 4  # the largest array of the finished share
    assert loaded.share_bytes == 2 * 3 * stacked == loaded.bytes_read
    assert mx.get_peak_memory() - before <= loaded.share_bytes + stacked + 65536
    assert mx.get_active_memory() - before <= loaded.share_bytes + 65536
    assert loaded.largest_tensor_bytes == stacked


@pytest.mark.parametrize("pool", [None, ThreadPool(1)], ids=["mlx", "native"])
def test_a_layer_without_own_experts(pool: ThreadPool | None, tmp_path: Path) -> None:
    info = describe(Skeleton(build("mixtral", tmp_path, layout="hf")))
    everything = tuple(range(EXPERTS))
    placement = Placement(2, EXPERTS, ((everything, ()), ((0, 1), (2, 3, 4, 5))))
    seen: list[tuple[int, int]] = []
    loaded = load_experts(
        info, placement, rank_1(), pool=pool, progress=lambda *given: seen.append(given)
    )
    assert loaded.layers[0].local.tolist() == [-1] * EXPERTS
    assert loaded.bytes_read == 4 * 3 * 64 * 64 * 4
    assert seen[-1] == (loaded.bytes_read, loaded.bytes_read)


def test_a_stores_dense_ranges_are_not_compared(tmp_path: Path) -> None:
    """They are damaged here, in a store that is compared since its files changed."""
    store = store_of(build("mixtral", tmp_path / "model"), tmp_path / "store")
    info = describe(Skeleton(store))
    flip(store / DENSE, (store / DENSE).stat().st_size - 1)
    placement = round_robin(2, EXPERTS, len(info.moe_layers))
    with pytest.raises(ModelError, match="is damaged"):
        load_shard(info, placement, rank_1(), spans=Spans())
    loaded = load_experts(info, placement, rank_1())
    assert loaded.bytes_read == loaded.share_bytes > 0
    mine = store / "experts-00000.safetensors"  # whose last expert is this rank's
    flip(mine, mine.stat().st_size - 1)
    with pytest.raises(ModelError, match="is damaged"):
        load_experts(info, placement, rank_1())


# ---- from rows to partial sums ------------------------------------------------------

WIDTH = 64


def received(x: np.ndarray, pairs: list[tuple[int, int, float]]) -> DispatchBatch:
    got = DispatchBatch(x.nbytes, len(pairs))
    got.raw.rows, got.raw.width = x.shape
    got.raw.dtype, got.raw.pairs = Dtype.F32, len(pairs)
    got._x[:] = x.view(np.uint8).ravel()
    got._rows[:], got._experts[:], got._weights[:] = zip(*pairs)
    return got


PAIRS = [(0, 1, 0.5), (0, 0, 0.25), (1, 2, 1.0), (3, 0, 2.0), (3, 1, 0.125), (3, 2, 1.5)]


@pytest.mark.parametrize("pool", [None, ThreadPool(2)], ids=["mlx", "native"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_partial_sums(name: str, pool: ThreadPool | None, tmp_path: Path) -> None:
    """Against each expert of the same switch layer on its own, summed in float64."""
    info = describe(Skeleton(build(name, tmp_path)))
    placement = Placement(2, EXPERTS, (((0, 2, 5), (1, 3, 4)),) * len(info.moe_layers))
    loaded = load_experts(info, placement, rank_1(), pool=pool)
    plain = load_experts(info, placement, rank_1()).layers[0]
    switch = plain._experts._switch
    width = int(switch.parameters()[next(iter(switch.parameters()))]["weight"].shape[-1])
    x = np.random.default_rng(3).standard_normal((4, width)).astype(np.float32)
    got = np.array(loaded.layers[0].partial(received(x, PAIRS))).reshape(4, width)
    want = np.zeros((4, width))
    for row, e, weight in PAIRS:
        y = switch(mx.array(x[row][None]), mx.array([[e]]))
        want[row] += weight * np.array(y, np.float64).reshape(width)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert not got[2].any()


def test_a_norm_in_the_switch_layer_is_loaded_too(tmp_path: Path) -> None:
    """muse_spark's, which every expert's output goes through."""
    config = {"model_type": "muse_spark", "text_config": MUSE}
    weights = dict(tree_flatten(random_model(config).parameters()))
    info = describe(Skeleton(save(tmp_path, config, weights)))
    loaded = load_experts(info, round_robin(2, EXPERTS, 1), rank_1()).layers[0]
    path = "model.language_model.layers.0.mlp.experts.post_expert_norm.weight"
    norm = loaded._experts._switch.post_expert_norm
    assert mx.array_equal(norm.weight, weights[path])
    x = mx.ones((1, 32))
    assert loaded._hook is not None and mx.array_equal(loaded._hook(x), norm(x))


def test_what_each_output_goes_through_is_applied(tmp_path: Path) -> None:
    info = describe(Skeleton(build("mixtral", tmp_path)))
    placement = round_robin(2, EXPERTS, len(info.moe_layers))
    switch = load_experts(info, placement, rank_1()).layers[0]._experts._switch
    x = np.random.default_rng(3).standard_normal((4, WIDTH)).astype(np.float32)
    owned = placement.owned[0][1]
    make = lambda hook: WorkerExperts(EXPERTS, owned, WIDTH, switch, None, hook, mx.float32)  # noqa: E731
    squared = np.array(make(mx.square).partial(received(x, PAIRS)))
    want = np.zeros_like(x)
    for row, e, weight in PAIRS:
        one = np.array(make(None).partial(received(x[row][None], [(0, e, 1.0)])))
        want[row] += weight * one[0] ** 2
    np.testing.assert_allclose(squared, want, rtol=1e-4, atol=1e-6)
