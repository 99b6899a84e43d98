"""MoE layers as a part of MLX's graph: every node has a slice of every expert.

Nothing is evaluated within a pass, so that a decode step is one graph. Its exchanges are
collectives of MLX groups; only a pass of many rows, which may take seconds, is evaluated
at each of them: a GPU that waits for peers for long ends the process.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from zmoe.errors import DivergenceError, PeerError
from zmoe.exchange.groups import Groups
from zmoe.moe.adapter import Adapter, Block, bound_hook
from zmoe.moe.experts import linears

_MOST_LAZY_ROWS = 32


class Graph:
    """The exchanges of the passes of one model with `layers` MoE layers.

    `dtype` is that of the partial sums. At the end of a pass the ranks compare digests of
    each layer's routing, which each of them has computed by itself.
    """

    def __init__(self, groups: Groups, layers: int, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._groups, self._layers = groups, layers
        self._routed: list[mx.array] = []
        self._summed: list[int] = []  # the layers of the sums of a pass, as they were called for
        self._last: mx.array | None = None
        self._digests: mx.array | None = None

    @contextmanager
    def step(self, step: int, plan: int) -> Iterator[None]:
        """Around one pass and its evaluation; `plan` is the digest of the step's plan.

        Raises PeerError and DivergenceError at its end, when what was computed is void.
        """
        self._routed.clear()
        self._summed.clear()
        self._last = self._digests = None
        try:
            with self._groups.step(step, plan):
                yield
        except PeerError as lost:  # its layer is the number of a sum, or of the digests
            layers = (*self._summed, self._layers)
            if lost.layer is None or lost.layer >= len(layers):
                raise
            raise PeerError(lost.rank, layers[lost.layer], lost.step, lost.reason) from lost
        self._compare(step)

    def sum(self, layer: int, partial: mx.array, ids: mx.array | None = None) -> mx.array:
        """The sum of the ranks' `partial` (..., width), of `dtype`.

        `ids` (..., k): the routing, of a layer's experts; else it is its attention's.
        """
        if ids is not None:
            self._routed.append(ids)
        rows = partial.shape[:-1] if ids is None else ids.shape[:-1]
        evaluates = math.prod(rows) > _MOST_LAZY_ROWS
        if evaluates:
            mx.eval(partial)
        elif self._last is not None:  # or the ranks might call in different orders
            (partial,) = mx.depends([partial], [self._last])
        group = self._groups.of(len(self._summed), partial.shape[-1])
        self._summed.append(layer)
        self._last = mx.distributed.all_sum(partial, group=group)
        if evaluates:
            mx.eval(self._last)
        return self._last

    def evaluate(self, *arrays: object) -> None:
        """Evaluate a pass: `arrays`, or lists of them, and all of its exchanges."""
        assert self._last is not None
        (mine,) = mx.depends([_digests_of(self._routed)], [self._last])
        group = self._groups.of(len(self._summed), 0)
        self._digests = mx.distributed.all_gather(mine, group=group)
        mx.eval(*arrays, self._digests)

    def _compare(self, step: int) -> None:
        assert self._digests is not None
        found = np.array(self._digests).reshape(-1, self._layers)
        differ = np.argwhere(found != found[self._groups.rank])
        if len(differ):
            rank, layer = differ[0].tolist()
            raise DivergenceError(
                f"rank {rank} has another routing: layer {layer}, step {step}; "
                f"rank {self._groups.rank} is at the same"
            )


@dataclass(frozen=True)
class Form:
    """How MoE layers are computed on MLX: in `graph`; `as_it_is`, with mlx-lm's own blocks, on
    a single node; or else evaluated one by one. `cuts_attention`: in a graph, each node has its
    share of the attention heads. `notices` are lines for the user.
    """

    graph: Graph | None = None
    as_it_is: bool = False
    cuts_attention: bool = False
    notices: tuple[str, ...] = ()


def _digests_of(routed: list[mx.array]) -> mx.array:
    """A digest of each layer's `ids` (..., k), in whatever order a token's experts are: uint32."""
    most = max(ids.shape[-1] for ids in routed)
    rows = [ids.reshape(-1, ids.shape[-1]).astype(mx.uint32) for ids in routed]
    same = [
        r if r.shape[-1] == most else mx.pad(r, [(0, 0), (0, most - r.shape[-1])]) for r in rows
    ]
    mixed = (mx.stack(same) + 1) * mx.array(0x9E3779B1, mx.uint32)
    mixed = (mixed ^ (mixed >> 15)) * mx.array(0x85EBCA77, mx.uint32)
    places = 2 * mx.arange(mixed.shape[1], dtype=mx.uint32) + 1
    of_rows = mixed.sum(axis=-1)
    return ((of_rows ^ (of_rows >> 13)) * places).sum(axis=-1)


class GraphMoE(Module):
    """Stands in for `block`, which an adapter takes apart, and whose switch layer is a slice."""

    def __init__(self, block: Block, adapter: Adapter, layer: int, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self._adapter, self._layer, self._graph = adapter, layer, graph
        switch = operator.attrgetter(adapter.switch)(block)
        self._outputs = switch.__call__
        self._experts = linears(switch)[0].weight.shape[0]
        self._hook = bound_hook(adapter, switch)

    def __call__(self, x: mx.array, *given: mx.array) -> mx.array:
        """The block's output, not evaluated."""
        adapter, graph = self._adapter, self._graph
        routing = adapter.route(self.block, x, *given)
        shared = adapter.shared(self.block, x, routing)
        ids, weights = routing.ids, routing.weights
        if adapter.skips_ids:
            own = ids < self._experts
            ids, weights = mx.where(own, ids, 0), mx.where(own, weights, 0)
        y = self._outputs(routing.x, ids)
        if self._hook is None:
            total = graph.sum(self._layer, weighted(y, weights).astype(graph.dtype), routing.ids)
        else:  # it is no sum of the slices': every expert's output travels apart
            y = graph.sum(self._layer, y.astype(graph.dtype), routing.ids).astype(y.dtype)
            total = weighted(self._hook(y), weights)
        total = total.reshape(routing.x.shape).astype(routing.x.dtype)
        return adapter.finish(self.block, x, total, shared)


class GraphSwitch(Module):
    """Stands in for the switch layer, a slice, of a block that has no adapter."""

    def __init__(self, switch: Block, layer: int, graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.switch = switch
        self._layer, self._graph = layer, graph

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Every chosen expert's output: (..., k, width) of `x` (..., width), `indices` (..., k)."""
        y = self.switch(x, indices)
        return self._graph.sum(self._layer, y.astype(self._graph.dtype), indices).astype(y.dtype)


def weighted(y: mx.array, weights: mx.array) -> mx.array:
    """The experts' outputs `y` (..., k, width) by `weights` (..., k), summed in float32."""
    return (y.astype(mx.float32) * weights.astype(mx.float32)[..., None]).sum(axis=-2)
