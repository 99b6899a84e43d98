"""One MoE block over several ranks: shapes, order of things, and null cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import muse_spark

from tests.families import EXPERTS, FAMILIES, random_model
from tests.ranks import ThreadGraph, ThreadReducer, on_ranks, owning
from zmoe.exchange.base import Call, Partial, nothing
from zmoe.families.sites import find_sites, projections
from zmoe.families.table import ADAPTERS
from zmoe.moe.adapter import Adapter, Routing
from zmoe.moe.block import ExpertParallelMoE, Layer
from zmoe.moe.graph import GraphMoE
from zmoe.obs import Spans

DIM = 64


class Recorder:
    """A single node's reducer that keeps what it is asked."""

    rank, nodes = 0, 1

    def __init__(self) -> None:
        self.digests: list[int] = []
        self.partials: list[mx.array | None] = []
        self.events: list[str] = []

    def dispatch(self, *given: object) -> None:
        pass

    def all_reduce(
        self, call: Call, partial: Partial[mx.array], overlap: Callable[[], None] = nothing
    ) -> mx.array:
        self.digests.append(call.digest)
        mine = partial(0, call.rows) if callable(partial) else partial
        self.partials.append(mine)
        self.events.append("exchange begins")
        overlap()
        self.events.append("exchange ends")
        return mx.zeros((call.rows, call.width), call.dtype) if mine is None else mine


def site_of(family: str, dtype: mx.Dtype = mx.float32) -> Any:
    model = random_model(FAMILIES[family].config)
    model.set_dtype(dtype)
    return find_sites(model)[0]


def spread(site: Any, reducer: Any, owned: Sequence[int], dtype: mx.Dtype) -> ExpertParallelMoE:
    for layer in projections(site.switch):
        layer.apply(lambda a: a[mx.array(list(owned))])
    layer = Layer(0, owning(EXPERTS, owned), dtype, reducer, Spans())
    return ExpertParallelMoE(site.block, site.adapter, layer)


@pytest.mark.parametrize("shape", [(1, 1, DIM), (1, 7, DIM), (3, 5, DIM)], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "nemotron_h", "longcat_flash"])
def test_any_batch_and_length(family: str, shape: tuple[int, ...]) -> None:
    mx.random.seed(2)
    x = mx.random.normal(shape)
    want = np.array(site_of(family).block(x))
    mx.eval(x)

    def work(reducer: ThreadReducer) -> np.ndarray:
        owned = [e for e in range(EXPERTS) if e % 3 == reducer.rank]
        return np.array(spread(site_of(family), reducer, owned, mx.float32)(x))

    for got in on_ranks(3, work):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_one_evaluation_of_the_routing_and_no_work_without_local_pairs() -> None:
    site = site_of("mixtral")
    asked: list[int] = []

    def route(block: Any, x: mx.array) -> Routing:
        asked.append(1)
        ids = mx.broadcast_to(mx.array([1, 2]), (*x.shape[:-1], 2))
        return Routing(x, ids, mx.ones(ids.shape) / 2)

    reducer, spans = Recorder(), Spans()
    layer = Layer(0, owning(EXPERTS, (0, 3)), mx.float32, reducer, spans)
    block = ExpertParallelMoE(site.block, Adapter(route), layer)
    out = block(mx.ones((1, 4, DIM)))
    assert asked == [1] and reducer.partials == [None] and not spans.seconds
    assert out.shape == (1, 4, DIM) and not mx.any(out)


def test_the_shared_expert_is_computed_while_the_exchange_is_under_way() -> None:
    reducer, site = Recorder(), site_of("qwen2_moe")
    x = mx.random.normal((1, 3, DIM))
    want = site.block(x)
    plain = site.adapter.shared

    def shared(*given: Any) -> mx.array:
        reducer.events.append("shared expert")
        return plain(*given)

    site = replace(site, adapter=replace(site.adapter, shared=shared))
    got = spread(site, reducer, range(EXPERTS), mx.float32)(x)
    assert reducer.events == ["exchange begins", "shared expert", "exchange ends"]
    assert mx.allclose(got, want, atol=1e-5)


def test_the_digest_follows_the_sets_of_experts_and_not_their_order() -> None:
    digests = []
    for chosen in ([0, 1, 2], [2, 0, 1], [0, 1, 3]):

        def route(block: Any, x: mx.array, chosen: list[int] = chosen) -> Routing:
            return Routing(x, mx.array([[chosen]]), mx.ones((1, 1, 3)))

        reducer, site = Recorder(), site_of("mixtral")
        layer = Layer(0, owning(EXPERTS, range(EXPERTS)), mx.float32, reducer, Spans())
        ExpertParallelMoE(site.block, Adapter(route), layer)(mx.ones((1, 1, DIM)))
        digests += reducer.digests
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("family", ["minimax", "mixtral", "deepseek_v3", "gpt_oss", "phixtral"])
def test_halves_stay_near_float32(family: str, dtype: mx.Dtype) -> None:
    """The same weights and inputs in float32: routing apart, rounding alone differs.

    Outputs are sums of products of about 64 terms through two layers; a few
    units of roundoff at the scale of the largest output. The routing is that
    of the half model, or near ties would fall the other way.
    """
    mx.random.seed(4)
    x = mx.random.normal((2, 6, DIM)).astype(dtype)
    half = spread(site_of(family, dtype), Recorder(), range(EXPERTS), dtype)
    full = spread(site_of(family), Recorder(), range(EXPERTS), mx.float32)
    exact = {k: v.astype(mx.float32) for k, v in _flat(half).items()}
    full.load_weights(list(exact.items()))
    routing = half._adapter.route(half.block, x)
    adapter = full._adapter

    def same(block: Any, rows: mx.array) -> Routing:
        return Routing(rows, routing.ids, routing.weights.astype(mx.float32))

    full._adapter = Adapter(same, adapter.switch, adapter.shared, adapter.finish)
    got, want = half(x), full(x.astype(mx.float32))
    assert got.dtype == dtype
    error = mx.abs(got.astype(mx.float32) - want).max().item()
    epsilon = 2**-8 if dtype == mx.bfloat16 else 2**-11
    assert 0 < error <= 6 * epsilon * mx.abs(want).max().item()


def _flat(module: Any) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(module.parameters()))


# ---- muse_spark: routed by Metal kernels in mlx-lm, here by the same in plain MLX ----


MUSE = dict(
    hidden_size=DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_hidden_layers=1, vocab_size=32, rms_norm_eps=1e-5, post_norm_eps=1e-5,
    rope_parameters={"rope_theta": 1e4}, layer_rope_theta=[1e4],
    layer_types=["full_attention"], sliding_window=8, final_logit_softcapping=30.0,
    output_multiplier=0.5, num_local_experts=EXPERTS, num_experts_per_tok=3,
    moe_hidden_size=32, moe_intermediate_size=48, routed_scaling_factor=1.5,
)  # fmt: skip


def plain_routing(logits: mx.array, bias: mx.array, **how: Any) -> list[mx.array]:
    scores = mx.sigmoid(logits * how["multiplier"])
    ids = mx.argsort(-(scores + bias), axis=-1)[..., : how["top_k"]]
    chosen = mx.take_along_axis(scores, ids, axis=-1)
    total = chosen.sum(axis=-1, keepdims=True) + how["score_eps"]
    return [ids, chosen / total * how["route_scale"]]


def plain_combine(y: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float) -> mx.array:
    return (mx.fast.rms_norm(norm_weight * y, None, eps) * weights[..., None]).sum(axis=-2)


def test_muse_spark_norms_each_expert_where_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(muse_spark, "expert_routing", plain_routing)
    monkeypatch.setattr(muse_spark, "post_expert_norm_combine", plain_combine)
    args = muse_spark.TextArgs(**MUSE)

    def block() -> Any:
        mx.random.seed(6)
        moe = muse_spark.MoE(args)
        moe.apply(lambda a: mx.random.normal(a.shape) / a.shape[-1] ** 0.5)
        return moe

    mx.random.seed(7)
    x = mx.random.normal((2, 5, DIM))
    want = np.array(block()(x))
    mx.eval(x)

    def work(reducer: ThreadReducer) -> np.ndarray:
        moe = block()
        owned = [e for e in range(EXPERTS) if e % 2 == reducer.rank]
        for layer in projections(moe.experts):
            layer.apply(lambda a: a[mx.array(owned)])
        adapter = ADAPTERS["muse_spark.MoE"]
        layer = Layer(0, owning(EXPERTS, owned), mx.float32, reducer, Spans())
        return np.array(ExpertParallelMoE(moe, adapter, layer)(x))

    def work_on_slices(reducer: ThreadReducer) -> np.ndarray:
        moe = block()
        kept = slice(0, 16) if reducer.rank == 0 else slice(16, 48)
        *before, last = projections(moe.experts)
        for layer in before:
            layer.weight = layer.weight[:, kept]
        last.weight = last.weight[..., kept]
        graph = ThreadGraph(reducer, mx.float32)
        return np.array(GraphMoE(moe, ADAPTERS["muse_spark.MoE"], 0, graph)(x))

    for got in (*on_ranks(2, work), *on_ranks(2, work_on_slices)):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
