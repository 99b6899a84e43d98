"""What lies in the checkpoint as the kernels want it stays there, expert by expert."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.families import EXPERTS, build
from tests.ranks import Meeting, ThreadReducer, on_ranks
from zmoe.checkpoint.folder import read_tensors
from zmoe.checkpoint.select import whole
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import LoadedShard, Skeleton, describe, load_shard, mapping
from zmoe.loading.places import trace
from zmoe.obs import Spans
from zmoe.placement.types import ModelInfo, Placement

TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]
OWNED = ((0, 3, 5), (1, 2, 4))
SIZE = {"hidden_size": 256, "intermediate_size": 512}
EXPERT = 3 * 256 * 512 * 4  # bytes


def load(info: ModelInfo, reducer: ThreadReducer, pool: ThreadPool | None) -> LoadedShard:
    placement = Placement(2, EXPERTS, (OWNED,) * len(info.moe_layers))
    return load_shard(info, placement, reducer, spans=Spans(), pool=pool, fuse=False)


def held_by_mlx(folder: Path, pool: ThreadPool | None) -> tuple[int, int]:
    """Bytes that MLX holds and held at most for a share, and those of the share."""
    info = describe(Skeleton(folder))
    gc.collect()  # or what earlier tests left would be freed meanwhile
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load(info, ThreadReducer(0, Meeting(2)), pool)
    assert loaded.bytes_read == loaded.share_bytes
    return mx.get_peak_memory() - before, loaded.share_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say where pages lie")
def test_weights_in_the_memory_of_other_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CPUs of a NUMA node that there is none of, all that is mapped lies far away."""
    info = describe(Skeleton(build("mixtral", tmp_path, **SIZE)))
    assert load(info, ThreadReducer(0, Meeting(2)), ThreadPool()).notices == ()
    monkeypatch.setattr(mapping, "near_numa_nodes", lambda: frozenset({63}))
    (notice,) = load(info, ThreadReducer(0, Meeting(2)), ThreadPool()).notices
    assert re.fullmatch(
        r"(0\.0[1-9]) of \1 GiB of the weights lie in the memory of other sockets", notice
    )


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_experts_stay_where_they_are(layout: str, tmp_path: Path) -> None:
    """Stacked or one by one, and with those of other nodes between them."""
    folder = build("mixtral", tmp_path, layout=layout, **SIZE)
    read, share = held_by_mlx(folder, None)
    mapped, same = held_by_mlx(folder, ThreadPool())
    experts = 2 * len(OWNED[0]) * EXPERT
    assert same == share > experts
    assert read >= share
    assert mapped < share - experts + 65536


@pytest.mark.parametrize(
    ("family", "layout", "quantize"),
    [
        ("mixtral", "mlx", None),
        ("mixtral", "hf", None),
        ("mixtral", "mlx", ("affine", 4, 32)),
        ("mixtral", "hf", ("affine", 4, 32)),
        ("mixtral", "hf", ("mxfp4", 4, 32)),
        ("deepseek_v3", "hf", None),
        ("dbrx", "hf", None),
        ("dbrx", "mlx", ("affine", 8, 32)),
    ],
    ids=str,
)
def test_mapped_experts_compute_the_same(
    family: str, layout: str, quantize: Any, tmp_path: Path
) -> None:
    info = describe(Skeleton(build(family, tmp_path, layout=layout, quantize=quantize)))

    def logits(pool: ThreadPool | None) -> list[np.ndarray]:
        def work(reducer: ThreadReducer) -> np.ndarray:
            model = load(info, reducer, ThreadPool() if pool else None).model
            return np.array(model(mx.array(TOKENS)))[:, -1]

        return on_ranks(2, work)

    for ours, mlx in zip(logits(ThreadPool()), logits(None), strict=True):
        np.testing.assert_allclose(ours, mlx, atol=1e-4 * np.abs(mlx).max())


def test_only_what_is_renamed_or_stacked_has_a_place(tmp_path: Path) -> None:
    folder = build("mixtral", tmp_path)
    tensors = list(read_tensors(folder).values())[:4]
    pieces = [whole(t, name) for t, name in zip(tensors, "abcd")]
    arrays = {name: mx.zeros((2, 3)) for name in "abcd"}

    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        a, b, c, d = (weights[name] for name in "abcd")
        return {
            "renamed": a,
            "stacked": mx.stack([b, c]),
            "other axis": mx.stack([b, c], axis=1),
            "of a result": mx.stack([b, c + 1]),
            "changed": d * 2,
        }

    original = mx.stack
    _, places = trace(sanitize, arrays, pieces)
    assert mx.stack is original
    assert {name: [p.name for p in place.pieces] for name, place in places.items()} == {
        "renamed": ["a"],
        "stacked": ["b", "c"],
    }
    assert [place.stacked for place in places.values()] == [False, True]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
def test_slices_take_no_page_of_the_experts_in_the_checkpoint(tmp_path: Path) -> None:
    """They are copies, of which a node holds exactly as much as its placement says."""
    folder = build("mixtral", tmp_path, **SIZE)
    info = describe(Skeleton(folder))
    everything = tuple(range(EXPERTS))
    layers = ((everything, everything),) * len(info.moe_layers)
    placement = Placement(2, EXPERTS, layers, ((0, 256), (256, 512)))
    shard = load_shard(
        info, placement, ThreadReducer(1, Meeting(2)), spans=Spans(), pool=ThreadPool()
    )
    experts = len(info.moe_layers) * EXPERTS * EXPERT
    assert resident(folder) < info.dense_bytes + (1 << 20) < experts / 4
    assert shard.share_bytes == pytest.approx(info.dense_bytes + experts / 2, rel=0.01)


def resident(folder: Path) -> int:
    """Bytes of the files in `folder` that are resident in this process's maps of them."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1].startswith(str(folder))
        elif ours and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total
