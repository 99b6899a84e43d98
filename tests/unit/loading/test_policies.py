"""Policies: which experts run on which node, and that the output never changes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.families import EXPERTS, FAMILIES, build, random_model, save
from tests.one_sequence import sequence_on
from tests.ranks import ThreadReducer, on_ranks
from zmoe.config import POLICIES
from zmoe.families.table import ADAPTERS
from zmoe.kernels.experts import NativeExperts
from zmoe.kernels.threads import ThreadPool
from zmoe.loading import Skeleton, describe, load_shard
from zmoe.moe import experts as mlx_experts
from zmoe.native import ffi
from zmoe.obs import Spans
from zmoe.placement.types import Placement

STEPS = [[3, 1, 4, 1, 5, 9, 2], [6], [5], [3], [5], [8], [9]]
# Replicas, different per layer, and a rank without experts in one.
OWNED = (((0, 1, 2, 3), (2, 3, 4), (0, 5)), ((), (0, 1, 2, 3, 4, 5), (1, 3, 5)))
NODES = 3


class Event(NamedTuple):
    """What one node's recorder heard of one layer in one step, and what really ran."""

    ids: list[list[int]]
    assigned: list[int]
    executed: list[int]


class Trace:
    """A recorder that keeps everything: events[layer], by step."""

    def __init__(self) -> None:
        self.events: defaultdict[int, list[Event]] = defaultdict(list)

    def __call__(self, layer: int, ids: Any, assigned: Any, executed: Any) -> None:
        event = Event(*(each.tolist() for each in (ids, assigned, executed)))
        self.events[layer].append(event)


def heard(traces: list[Trace]) -> list[Event]:
    """What all ranks heard, in all layers and steps."""
    return [event for trace in traces for each in trace.events.values() for event in each]


def run(
    folder: Path, policy: str, native: bool, fuse: bool
) -> tuple[list[list[np.ndarray]], list[Trace]]:
    """Each rank's logits of each step, and what its recorder heard."""
    info = describe(Skeleton(folder))
    owned = tuple(OWNED[m % len(OWNED)] for m in range(len(info.moe_layers)))
    placement = Placement(NODES, EXPERTS, owned)

    def work(reducer: ThreadReducer) -> tuple[list[np.ndarray], Trace]:
        trace, pool = Trace(), ThreadPool() if native else None
        shard = load_shard(
            info,
            placement,
            reducer,
            spans=Spans(),
            pool=pool,
            fuse=fuse,
            policy=policy,
            recorder=trace,
        )
        forward = sequence_on(shard, reducer)
        return [forward(tokens) for tokens in STEPS], trace

    logits, traces = zip(*on_ranks(NODES, work))
    return list(logits), list(traces)


WAYS = {
    "fused": ("mixtral", True, True),
    "native": ("deepseek_v3", True, False),
    "mlx": ("longcat_flash", False, False),
    "switch alone": ("qwen2_moe", False, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_policies_run_what_they_say_and_change_no_bit(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, native, fuse = WAYS[way]
    if way == "switch alone":
        monkeypatch.delitem(ADAPTERS, "qwen2_moe.Qwen2MoeSparseMoeBlock")
    folder = build(family, tmp_path)
    want, plain = run(folder, "selected", native, fuse)
    for policy in POLICIES:
        ran = _spy(monkeypatch)
        logits, traces = run(folder, policy, native, fuse)
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(logits, want)
        events = heard(traces)
        # Idle nodes make no call; without an adapter a row's outputs may take several.
        decoded = [len(e.executed) for e in events if e.executed and len(e.ids) == 1]
        assert sorted(ran) == sorted(decoded) or way == "switch alone"
        for layer, expected in plain[0].events.items():
            owned = OWNED[layer % len(OWNED)]
            steps = list(zip(*(trace.events[layer] for trace in traces), strict=True))
            assert len(steps) == len(expected) == len(STEPS)
            _check_layer(policy, owned, steps)


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many distinct experts each call of the products of one row is to compute.

    The rows of a prompt may be shared out among several calls.
    """
    ran: list[int] = []
    multiply, outputs = NativeExperts._multiply, mlx_experts.expert_outputs

    def native(self: Any, x: Any, x_dtype: Any, rows: int, pairs: Any, *more: Any) -> None:
        if rows <= 2:  # the second is that of the padding
            ran.append(len(set(ffi.unpack(pairs[1], pairs[3]))))
        multiply(self, x, x_dtype, rows, pairs, *more)

    def mlx(switch: Any, x: mx.array, pairs: Any) -> mx.array:
        if x.shape[0] <= 2:
            ran.append(len(set(pairs.experts.tolist())))
        return outputs(switch, x, pairs)

    monkeypatch.setattr(NativeExperts, "_multiply", native)
    monkeypatch.setattr(mlx_experts, "expert_outputs", mlx)
    return ran


def _check_layer(
    policy: str, owned: tuple[tuple[int, ...], ...], steps: list[tuple[Event, ...]]
) -> None:
    last: dict[tuple[int, int], int] = {}
    for number, events in enumerate(steps):
        selected = {expert for row in events[0].ids for expert in row if expert < EXPERTS}
        assert all(event.ids == events[0].ids for event in events)
        assigned = [expert for event in events for expert in event.assigned]
        assert set(assigned) == selected
        # Each row is shared out by itself, so that in a prompt replicas may work beside each other.
        assert len(assigned) == len(selected) or len(events[0].ids) > 1
        busiest = max(len(event.assigned) for event in events)
        for rank, event in enumerate(events):
            idle = [e for e in owned[rank] if e not in event.assigned]
            taken = {
                "selected": 0,
                "busy-full": len(idle),
                "router-aided": min(busiest, len(owned[rank])) - len(event.assigned),
            }[policy]
            oldest = sorted(idle, key=lambda e: (last.get((rank, e), -1), e))
            assert event.executed == sorted([*event.assigned, *oldest[:taken]])
            last.update(((rank, e), number) for e in event.executed)


@pytest.mark.parametrize("quantize", [None, ("affine", 4, 32), ("affine", 8, 32)], ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["native", "mlx"])
def test_an_idle_expert_that_gives_nan_or_infinity_is_harmless(
    native: bool, quantize: tuple[str, int, int] | None, tmp_path: Path
) -> None:
    """Experts whose biases are NaN and infinite, and which no token ever selects."""
    config = FAMILIES["gpt_oss"].config
    model = random_model(config)
    for layer in model.model.layers:
        layer.mlp.router.bias = mx.where(mx.arange(EXPERTS) < 2, -1e4, layer.mlp.router.bias)
        for linear in (layer.mlp.experts.up_proj, layer.mlp.experts.gate_proj):
            linear.bias[0], linear.bias[1] = mx.nan, mx.inf
    if quantize is not None:
        mode, bits, group = quantize
        config = {**config, "quantization": {"group_size": group, "bits": bits, "mode": mode}}
        nn.quantize(
            model,
            group,
            bits,
            class_predicate=lambda path, m: hasattr(m, "to_quantized") and "router" not in path,
        )
    folder = save(tmp_path, config, dict(tree_flatten(model.parameters())))
    results = {}
    for policy in POLICIES:
        logits, traces = run(folder, policy, native, fuse=native)
        results[policy] = logits
        ran = {expert for event in heard(traces) for expert in event.executed}
        assert ({0, 1} <= ran) == (policy != "selected")
        assert np.isfinite(logits).all()
    for policy in POLICIES[1:]:
        np.testing.assert_array_equal(results[policy], results["selected"])
