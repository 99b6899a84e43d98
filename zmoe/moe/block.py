"""A MoE block whose experts are spread over the nodes."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from zmoe.exchange.base import Call, Reducer
from zmoe.moe.adapter import Adapter, Block, bound_hook
from zmoe.moe.experts import Experts, MlxExperts, combine
from zmoe.obs import Spans
from zmoe.placement.assignment import Ownership
from zmoe.placement.pairs import Floats, Ints, LocalPairs, no_experts, routing_digest


@dataclass(frozen=True)
class Layer:
    """What a MoE layer knows of the cluster.

    `ordinal` is its place among the MoE layers; `ownership` what this node
    computes of it; `dtype` that of the partial sums.
    """

    ordinal: int
    ownership: Ownership
    dtype: mx.Dtype
    reducer: Reducer
    spans: Spans


def _on_host(ids: mx.array) -> Ints:
    return np.asarray(ids)


def _between(rows: mx.array, start: int, stop: int) -> mx.array:
    return rows if stop - start == rows.shape[0] else rows[start:stop]


def _run_padding(experts: Experts, rows: mx.array, pairs: LocalPairs, spans: Spans) -> None:
    """Of a node to which nothing is assigned."""
    if len(pairs.padding):
        with spans.span("experts"):
            mx.eval(experts.outputs(rows, pairs))


class ExpertParallelMoE(Module):
    """Routes as `block` would, computes the local experts, sums over the nodes.

    Calls evaluate: the routing goes to the host once, to keep of it only the
    local (row, expert) pairs.
    """

    def __init__(
        self, block: Block, adapter: Adapter, layer: Layer, experts: Experts | None = None
    ) -> None:
        """`experts` are this node's own; None: those of the block's switch layer, on MLX."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self._adapter = adapter
        self._layer = layer
        switch = operator.attrgetter(adapter.switch)(block)
        self._experts = MlxExperts(switch) if experts is None else experts
        self._hook = bound_hook(adapter, switch)

    def __call__(self, x: mx.array, *given: mx.array) -> mx.array:
        adapter, layer = self._adapter, self._layer
        routing = adapter.route(self.block, x, *given)
        width, k = routing.x.shape[-1], routing.ids.shape[-1]
        rows = routing.x.reshape(-1, width)
        ids = routing.ids.reshape(-1, k).astype(mx.int32)
        weights = routing.weights.reshape(-1, k).astype(mx.float32)
        mx.eval(rows, ids, weights)
        host_ids = _on_host(ids)
        host_weights = np.asarray(weights)
        # The order within a row may differ between devices; the set may not.
        digest = routing_digest(np.sort(host_ids, axis=-1))
        call = Call(layer.ordinal, rows.shape[0], width, layer.dtype, digest)
        layer.reducer.dispatch(call, rows, rows.dtype, host_ids, host_weights)
        shared: list[mx.array | None] = []

        def beside_the_exchange() -> None:
            shared.append(adapter.shared(self.block, x, routing))
            if shared[0] is not None:
                mx.async_eval(shared[0])

        pairs = layer.ownership.pairs(host_ids)

        def partial(start: int, stop: int) -> mx.array | None:
            own = pairs.within(start, stop)
            return self._partial(_between(rows, start, stop), own, host_weights[start:stop])

        routed = layer.reducer.all_reduce(call, partial, overlap=beside_the_exchange)
        routed = routed.reshape(routing.x.shape).astype(routing.x.dtype)
        return adapter.finish(self.block, x, routed, shared[0])

    def _partial(self, rows: mx.array, pairs: LocalPairs, weights: Floats) -> mx.array | None:
        if not len(pairs.rows):
            _run_padding(self._experts, rows, pairs, self._layer.spans)
            return None
        hook, dtype = self._hook, self._layer.dtype
        with self._layer.spans.span("experts"):
            if hook is None:
                part = self._experts.partial(rows, pairs, weights, dtype)
            else:
                y = hook(self._experts.outputs(rows, pairs))
                part = combine(y, pairs, weights, rows.shape[0]).astype(dtype)
            mx.eval(part)
        return part


class ExpertParallelSwitch(Module):
    """Stands in for the switch layer of a block that has no adapter.

    Returns every chosen expert's output, (..., k, width) as the switch layer
    does, so any block works; but k times the bytes travel.
    """

    def __init__(self, switch: Block, layer: Layer, experts: Experts | None = None) -> None:
        """`experts` are this node's own; None: those of `switch`, on MLX."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.switch = switch
        self._layer = layer
        self._experts = MlxExperts(switch) if experts is None else experts

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        layer, (width, k) = self._layer, (x.shape[-1], indices.shape[-1])
        rows = x.reshape(-1, width)
        ids = indices.reshape(-1, k).astype(mx.int32)
        mx.eval(rows, ids)
        host_ids = _on_host(ids)
        pairs, digest = layer.ownership.pairs(host_ids), routing_digest(host_ids)
        # Every chosen expert's output is a row of its own, of one expert at weight 1.
        call = Call(layer.ordinal, rows.shape[0] * k, width, layer.dtype, digest)
        layer.reducer.dispatch(
            call,
            mx.repeat(rows, k, axis=0),
            rows.dtype,
            host_ids.reshape(-1, 1),
            np.ones((host_ids.size, 1), np.float32),
        )
        summed = layer.reducer.all_reduce(
            call, lambda start, stop: self._outputs(rows, pairs, k, start, stop)
        )
        return summed.reshape(*indices.shape, width).astype(x.dtype)

    def _outputs(
        self, rows: mx.array, pairs: LocalPairs, k: int, start: int, stop: int
    ) -> mx.array | None:
        """Of the (rows * k, width) outputs, [start, stop): the local pairs' own, else zeros."""
        places = pairs.rows * k + pairs.slots
        begin, end = np.searchsorted(places, (start, stop))
        own = slice(begin, end)
        padding = pairs.padding if start == 0 else no_experts()
        mine = LocalPairs(pairs.rows[own], pairs.slots[own], pairs.experts[own], padding)
        if begin == end:
            _run_padding(self._experts, rows, mine, self._layer.spans)
            return None
        with self._layer.spans.span("experts"):
            y = self._experts.outputs(rows, mine).astype(self._layer.dtype)
            place = np.full(stop - start, end - begin, np.int32)
            place[places[own] - start] = np.arange(end - begin)
            padded = mx.concatenate([y, mx.zeros((1, y.shape[-1]), y.dtype)])
            part = padded[mx.array(place)]
            mx.eval(part)
        return part
