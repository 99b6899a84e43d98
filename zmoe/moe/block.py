"""The forward of a MoE block whose experts are spread over the nodes.

`forward` is the one sequence: route, compute the owned experts, sum over the nodes, finish.
What it calls is a Backend: ExpertParallelMoE and ExpertParallelSwitch on MLX arrays, and
zmoe.kernels.decoder.NativeMoE in C on the memory of a whole decoder layer.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from zmoe.exchange.base import Call, Reducer
from zmoe.moe.adapter import Adapter, Block, Routing, bound_hook
from zmoe.moe.experts import Experts, MlxExperts, weighted_sum
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


@dataclass
class Routed:
    """Tokens whose routing is on the host.

    `x` (tokens, hidden_size) of `x_dtype`, an MLX array or the memory of one: the input of
    the experts. `ids` int32 and `weights` float32 (tokens, k). `digest`: that of the
    routing, equal on all ranks. `out`: float32 memory for the sum, (tokens, hidden_size);
    None: the sum is an MLX array.
    """

    x: Any
    x_dtype: mx.Dtype
    ids: Ints
    weights: Floats
    digest: int
    out: Floats | None


class Backend(Protocol):
    """What computes a MoE block on this node, apart from the exchange."""

    def route(self, *given: Any) -> Any:
        """Route what the block was called with; returns a Routed."""
        ...

    def partial(self, routed: Any, start: int, stop: int) -> Any:
        """The owned experts' weighted sum for tokens [start, stop), (stop - start, hidden_size).

        None if none of them was chosen. Called in order, for each token once. An MLX array,
        evaluated, of the layer's dtype, or float32 memory if `routed.out` is memory.
        """
        ...

    def shared(self, routed: Any) -> Any:
        """What the block computes beside its routed experts, while the exchange is in flight."""
        ...

    def finish(self, routed: Any, total: Any, shared: Any) -> Any:
        """The block's output from `total`, the sum over the nodes, and what `shared` returned."""
        ...


def forward(backend: Backend, layer: Layer, *given: Any) -> Any:
    """The output of a MoE block for `given`, with its experts spread over the nodes.

    The routing goes to the host once, and only the local (token, expert) pairs are computed.
    Raises PeerError, DivergenceError.
    """
    routed = backend.route(*given)
    reducer, (tokens, width) = layer.reducer, routed.x.shape
    call = Call(layer.ordinal, tokens, width, layer.dtype, routed.digest)
    reducer.dispatch(call, routed.x, routed.x_dtype, routed.ids, routed.weights)
    shared = None

    def partial(start: int, stop: int) -> Any:
        return backend.partial(routed, start, stop)

    def beside_the_exchange() -> None:
        nonlocal shared
        shared = backend.shared(routed)

    total: Any = routed.out
    if total is None:
        total = reducer.all_reduce(call, partial, beside_the_exchange)
    else:
        reducer.all_reduce_host(call, partial, total, beside_the_exchange)
    return backend.finish(routed, total, shared)


def _run_padding(experts: Experts, x: mx.array, pairs: LocalPairs, spans: Spans) -> None:
    """Run the padding of a node to which no token is assigned."""
    if len(pairs.padding):
        with spans.span("experts"):
            mx.eval(experts.outputs(x, pairs))


@dataclass
class _Routed(Routed):
    """`given`: the block's input; `routing`: as the adapter returned it."""

    ownership: Ownership
    given: mx.array
    routing: Routing

    @functools.cached_property
    def pairs(self) -> LocalPairs:
        """Found only once the tokens are dispatched: other ranks wait for those."""
        return self.ownership.pairs(self.ids)


class ExpertParallelMoE(Module):
    """Stands in for `block`, which an adapter takes apart."""

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
        """The block's output; evaluates what it is called with."""
        out: mx.array = forward(self, self._layer, x, *given)
        return out

    def route(self, x: mx.array, *given: mx.array) -> _Routed:
        """See Backend."""
        routing = self._adapter.route(self.block, x, *given)
        k = routing.ids.shape[-1]
        tokens = routing.x.reshape(-1, routing.x.shape[-1])
        ids = routing.ids.reshape(-1, k).astype(mx.int32)
        weights = routing.weights.reshape(-1, k).astype(mx.float32)
        mx.eval(tokens, ids, weights)
        host_ids: Ints = np.asarray(ids)
        # The order of a token's experts may differ between devices; the set may not.
        digest = routing_digest(np.sort(host_ids, axis=-1))
        ownership, host_weights = self._layer.ownership, np.asarray(weights)
        return _Routed(
            tokens, tokens.dtype, host_ids, host_weights, digest, None, ownership, x, routing
        )

    def partial(self, routed: _Routed, start: int, stop: int) -> mx.array | None:
        """See Backend."""
        layer, pairs = self._layer, routed.pairs.within(start, stop)
        x = routed.x if stop - start == routed.x.shape[0] else routed.x[start:stop]
        if not len(pairs.rows):
            _run_padding(self._experts, x, pairs, layer.spans)
            return None
        with layer.spans.span("experts"):
            weights = routed.weights[start:stop]
            return weighted_sum(self._experts, self._hook, x, pairs, weights, layer.dtype)

    def shared(self, routed: _Routed) -> mx.array | None:
        """See Backend; under way, not evaluated."""
        part = self._adapter.shared(self.block, routed.given, routed.routing)
        if part is not None:
            mx.async_eval(part)
        return part

    def finish(self, routed: _Routed, total: mx.array, shared: mx.array | None) -> mx.array:
        """See Backend."""
        x = routed.routing.x
        total = total.reshape(x.shape).astype(x.dtype)
        return self._adapter.finish(self.block, routed.given, total, shared)


@dataclass
class _SwitchRouted(Routed):
    """`x` and `ids` have one row for each chosen expert of each token.

    `tokens` (tokens, hidden_size); `chosen` (tokens, k): the routing.
    """

    ownership: Ownership
    tokens: mx.array
    chosen: Ints

    @functools.cached_property
    def pairs(self) -> LocalPairs:
        """Found only once the tokens are dispatched: other ranks wait for those."""
        return self.ownership.pairs(self.chosen)

    @functools.cached_property
    def places(self) -> Ints:
        """The rows of the local pairs, ascending."""
        places: Ints = self.pairs.rows * self.chosen.shape[1] + self.pairs.slots
        return places


class ExpertParallelSwitch(Module):
    """Stands in for the switch layer of a block that has no adapter.

    Returns every chosen expert's output, (..., k, hidden_size) as the switch layer
    does, so any block works; but k times the bytes travel.
    """

    def __init__(self, switch: Block, layer: Layer, experts: Experts | None = None) -> None:
        """`experts` are this node's own; None: those of `switch`, on MLX."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.switch = switch
        self._layer = layer
        self._experts = MlxExperts(switch) if experts is None else experts

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """`x` (..., hidden_size), `indices` (..., k)."""
        out: mx.array = forward(self, self._layer, x, indices)
        return out.reshape(*indices.shape, x.shape[-1])

    def route(self, x: mx.array, indices: mx.array) -> _SwitchRouted:
        """See Backend; every chosen expert's output is a row of its own, at weight 1."""
        k = indices.shape[-1]
        tokens = x.reshape(-1, x.shape[-1])
        ids = indices.reshape(-1, k).astype(mx.int32)
        mx.eval(tokens, ids)
        host_ids: Ints = np.asarray(ids)
        return _SwitchRouted(
            x=mx.repeat(tokens, k, axis=0),
            x_dtype=tokens.dtype,
            ids=host_ids.reshape(-1, 1),
            weights=np.ones((host_ids.size, 1), np.float32),
            digest=routing_digest(host_ids),
            out=None,
            ownership=self._layer.ownership,
            tokens=tokens,
            chosen=host_ids,
        )

    def partial(self, routed: _SwitchRouted, start: int, stop: int) -> mx.array | None:
        """See Backend: the local pairs' own outputs, else zeros."""
        pairs = routed.pairs
        begin, end = np.searchsorted(routed.places, (start, stop))
        own = slice(begin, end)
        padding = pairs.padding if start == 0 else no_experts()
        mine = LocalPairs(pairs.rows[own], pairs.slots[own], pairs.experts[own], padding)
        if begin == end:
            _run_padding(self._experts, routed.tokens, mine, self._layer.spans)
            return None
        with self._layer.spans.span("experts"):
            y = self._experts.outputs(routed.tokens, mine).astype(self._layer.dtype)
            place = np.full(stop - start, end - begin, np.int32)
            place[routed.places[own] - start] = np.arange(end - begin)
            padded = mx.concatenate([y, mx.zeros((1, y.shape[-1]), y.dtype)])
            part = padded[mx.array(place)]
            mx.eval(part)
        return part

    def shared(self, routed: _SwitchRouted) -> None:
        """Nothing: a switch layer has routed experts only."""

    def finish(self, routed: _SwitchRouted, total: mx.array, shared: None) -> mx.array:
        """See Backend."""
        return total.astype(routed.x_dtype)
