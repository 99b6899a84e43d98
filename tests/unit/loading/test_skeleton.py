"""A node builds its model once: what inspects, plans and loads it shares one skeleton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.families import FAMILIES, build
from tests.ranks import Meeting, ThreadReducer, on_ranks, round_robin
from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.cluster import Cluster
from zmoe.families import dbrx
from zmoe.loading import Skeleton, describe, load_experts, load_shard
from zmoe.obs import Spans
from zmoe.store.writer import prestack

TINY = "zmoe-tiny"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The args of every model of zmoe-tiny's class that is constructed from here on."""
    seen: list[Any] = []
    construct = dbrx.Model.__init__

    def counting(self: dbrx.Model, args: dbrx.ModelArgs) -> None:
        seen.append(args)
        construct(self, args)

    monkeypatch.setattr(dbrx.Model, "__init__", counting)
    return seen


def test_a_run_builds_the_model_once(built: list[Any]) -> None:
    with Cluster(TINY) as cluster:
        assert len(list(cluster.generate("O", max_tokens=2))) > 0
    assert len(built) == 1


def test_a_worker_with_experts_alone_builds_the_model_once(built: list[Any]) -> None:
    skeleton = Skeleton(resolve_model(TINY))
    info = describe(skeleton)
    placement = round_robin(2, info.experts, len(info.moe_layers))
    load_experts(info, placement, ThreadReducer(1, Meeting(2)), skeleton=skeleton)
    assert len(built) == 1


def test_prestacking_builds_the_model_once(built: list[Any], tmp_path: Path) -> None:
    skeleton = Skeleton(resolve_model(TINY))
    info = describe(skeleton)
    prestack(info, tmp_path / "store", None, lambda done, total: None, skeleton)
    assert len(built) == 1


def test_a_skeleton_reads_no_weights_and_is_used_up_by_loading(built: list[Any]) -> None:
    skeleton = Skeleton(resolve_model(TINY))
    assert not built  # nor does it build what nobody asks for
    info = describe(skeleton)
    shapes = {name: array.shape for name, array in skeleton.parameters.items()}
    placement = round_robin(2, info.experts, len(info.moe_layers))
    for times in (1, 2):
        load_experts(info, placement, ThreadReducer(1, Meeting(2)), skeleton=skeleton)
        assert len(built) == times
    assert {name: array.shape for name, array in skeleton.parameters.items()} == shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_another_thread_may_load_what_one_has_inspected(family: str, tmp_path: Path) -> None:
    """MLX binds what is lazy to the thread that made it."""
    skeleton = Skeleton(build(family, tmp_path / family))
    info = describe(skeleton)
    placement = round_robin(1, info.experts, len(info.moe_layers))

    def work(reducer: ThreadReducer) -> bool:
        shard = load_shard(info, placement, reducer, spans=Spans(), skeleton=skeleton)
        model: Any = shard.model
        return bool(mx.isfinite(model(mx.array([[5, 9, 2]]))).all().item())

    assert on_ranks(1, work) == [True]
