"""What the exchanges of a pass share in one graph; tests/cluster/test_graph.py has real ranks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.families import FAMILIES, random_model
from zmoe.errors import DivergenceError
from zmoe.exchange.groups import OneGroup
from zmoe.families.sites import find_sites
from zmoe.moe.graph import Graph, GraphMoE, GraphSwitch

LAYERS, VOCABULARY = 2, 100


def alone() -> OneGroup:
    """A group of one rank."""
    return OneGroup(mx.distributed.init(backend="ring"))


def told_after(*ids: list[list[int]], tokens: tuple[int, ...] = ()) -> tuple[list[int], Any]:
    """The tokens of rank 0, and what is compared, after a pass with this routing of each layer."""
    graph = Graph(alone(), LAYERS, VOCABULARY, mx.float32)
    graph.begin(1, 0, len(ids[0]))
    for layer, chosen in enumerate(ids):
        graph.sum(layer, mx.ones((len(chosen), 4)), mx.array(chosen))
    drawn, told, _ = graph.tell(mx.array(tokens, mx.uint32))
    mx.eval(told)
    graph.check(1, np.array(told))
    known: list[int] = drawn.tolist()
    return known, told


def digests(*ids: list[list[int]]) -> list[int]:
    _, told = told_after(*ids)
    found: list[int] = told.tolist()[0]
    return found


def test_no_token_is_beyond_the_vocabulary() -> None:
    tokens, told = told_after([[1]], [[1]], tokens=(5, 2**32 - 1, VOCABULARY - 1))
    assert tokens == [5, VOCABULARY - 1, VOCABULARY - 1]
    assert told.shape == (1, LAYERS + 3)


def test_a_digest_is_of_the_sets_of_every_token() -> None:
    first = digests([[1, 2], [3, 4]], [[5, 0], [0, 1]])
    assert len(first) == LAYERS and first[0] != first[1]
    assert digests([[2, 1], [4, 3]], [[0, 5], [1, 0]]) == first  # in whatever order
    for other in ([[3, 4], [1, 2]], [[1, 3], [2, 4]], [[1, 2], [3, 5]], [[1, 2], [4, 4]]):
        changed = digests(other, [[5, 0], [0, 1]])
        assert changed[0] != first[0] and changed[1] == first[1]


def test_layers_may_choose_different_numbers_of_experts() -> None:
    assert len(set(digests([[1, 2]], [[1]]))) == LAYERS


def test_another_routing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = mx.distributed.all_gather

    def with_another(mine: mx.array, **how: Any) -> mx.array:
        other = mine + mx.array([0, 1], mx.uint32)
        return mx.concatenate([gather(mine, **how), other])

    monkeypatch.setattr(mx.distributed, "all_gather", with_another)
    with pytest.raises(DivergenceError, match="rank 1 has another routing: layer 1, step 1"):
        told_after([[1, 2]], [[3, 4]])


def test_a_long_pass_is_evaluated_at_its_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[object] = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (evaluated.append(arrays), evaluate(*arrays)))
    told_after([[0, 1]] * 33, [[0, 1]] * 33)
    assert len(evaluated) == 2 * LAYERS + 1
    evaluated.clear()
    told_after([[0, 1]] * 32, [[0, 1]] * 32)
    assert len(evaluated) == 1


@pytest.mark.parametrize("whole", [True, False], ids=["block", "switch"])
def test_with_and_without_an_adapter(whole: bool) -> None:
    """On one rank the output is the block's."""
    site = find_sites(random_model(FAMILIES["qwen2_moe"].config))[0]
    x = mx.random.normal((2, 3, 64))
    want = np.array(site.block(x))
    graph = Graph(alone(), 1, VOCABULARY, mx.float32)
    block: Any = site.block
    graph.begin(1, 0, 6)
    if whole:
        assert site.adapter is not None
        block = GraphMoE(site.block, site.adapter, 0, graph)
    else:
        setattr(site.block, site.switch_path, GraphSwitch(site.switch, 0, graph))
    out = block(x)
    np.testing.assert_allclose(np.array(out), want, atol=1e-5 * np.abs(want).max())
