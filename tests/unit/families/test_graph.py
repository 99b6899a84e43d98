"""Every family with slices of its experts in one graph says what mlx-lm says in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, build
from tests.ranks import ThreadGraph, ThreadReducer, on_ranks
from tests.unit.families.test_families import BATCH, generate
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.moe.graph import Form
from zmoe.obs import Spans
from zmoe.placement.types import Placement

EVERYTHING = tuple(range(EXPERTS))
Cut = tuple[tuple[int, int], ...]
CUTS: tuple[Cut, ...] = (
    ((0, 1), (1, 3), (3, 4)),
    ((0, 1), (1, 4)),
    ((0, 1), (1, 2), (2, 3), (3, 4)),
)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def check(folder: Path, *quarters: tuple[int, int]) -> None:
    """With these quarters of every expert on one node each."""
    info = describe(Skeleton(folder))
    each = info.moe_intermediate_size // 4
    slices = tuple((start * each, end * each) for start, end in quarters)
    owned = ((EVERYTHING,) * len(slices),) * len(info.moe_layers)
    placement = Placement(len(slices), EXPERTS, owned, slices)
    reference, _ = load_model(folder)
    tokens, scores = generate(reference)
    batch = np.array(reference(mx.array(BATCH)))

    def work(reducer: ThreadReducer) -> tuple[list[int], np.ndarray, np.ndarray, int]:
        form = Form(ThreadGraph(reducer, mx.float32))
        shard = load_shard(info, placement, reducer, spans=Spans(), form=form)
        assert shard.notices == ()
        said = generate(shard.model)
        return *said, np.array(shard.model(mx.array(BATCH))), len(reducer.calls)

    for said, logprobs, logits, calls in on_ranks(len(slices), work):
        assert said == tokens
        assert np.abs(logprobs - scores).max() <= 1e-4 * np.abs(scores).max()
        assert np.abs(logits - batch).max() <= 1e-4 * np.abs(batch).max()
        assert calls % len(info.moe_layers) == 0 < calls


@pytest.mark.parametrize(("family", "cut"), zip(FAMILIES, itertools.cycle(CUTS)))
def test_slices_in_one_graph(family: str, cut: Cut, tmp_path: Path) -> None:
    """On two to four nodes; of all that a family has beside its experts there is one."""
    check(build(family, tmp_path / family), *cut)


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.to_hf])
def test_published_layouts(family: str, tmp_path: Path) -> None:
    """What lies otherwise in the checkpoint is cut when MLX has made it."""
    check(build(family, tmp_path / family, layout="hf"), (0, 2), (2, 4))
