"""Every family with slices of its experts in one graph says what mlx-lm says in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from tests.families import EXPERTS, FAMILIES, build
from tests.ranks import ThreadReducer, on_ranks
from tests.unit.families.test_families import BATCH, generate
from zmoe.exchange.base import Call
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.moe.graph import Form, Graph
from zmoe.obs import Spans
from zmoe.placement.types import Placement

EVERYTHING = tuple(range(EXPERTS))


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


class ThreadGraph(Graph):
    """A graph whose ranks are threads: it evaluates, to meet the others."""

    def __init__(self, reducer: ThreadReducer, dtype: mx.Dtype) -> None:
        groups: Any = None
        super().__init__(groups, 0, dtype)
        self._reducer = reducer

    def sum(self, layer: int, partial: mx.array, ids: mx.array) -> mx.array:
        assert partial.dtype == self.dtype
        rows = partial.reshape(-1, partial.shape[-1])
        total = self._reducer.all_reduce(Call(layer, *rows.shape, rows.dtype, 0), rows)
        copied = mx.array(np.array(total.astype(mx.float32))).astype(partial.dtype)
        return copied.reshape(partial.shape)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_in_one_graph(family: str, tmp_path: Path) -> None:
    """Of different widths; of all that a family has beside its experts there is one."""
    check(build(family, tmp_path / family), (0, 1), (1, 3), (3, 4))


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.to_hf])
def test_published_layouts(family: str, tmp_path: Path) -> None:
    """What lies otherwise in the checkpoint is cut when MLX has made it."""
    check(build(family, tmp_path / family, layout="hf"), (0, 2), (2, 4))
