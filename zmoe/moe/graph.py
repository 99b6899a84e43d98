"""MoE layers as a part of MLX's graph: every node has a slice of every expert.

Nothing is evaluated within a pass, so that a decode step is one graph. Its exchanges are
collectives of MLX groups; only a pass of many rows, which may take seconds, is evaluated
at each of them: a GPU that waits for peers for long ends the process.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module

from zmoe.errors import DivergenceError, PeerError
from zmoe.exchange.groups import Groups
from zmoe.moe.adapter import Adapter, Block, bound_hook
from zmoe.moe.experts import linears

_MOST_LAZY_ROWS = 32


class Graph:
    """The exchanges of the passes of one model with `layers` MoE layers and `vocabulary` tokens.

    `dtype` is that of the partial sums. At the end of a pass rank 0 tells the others which tokens
    it has drawn, and all compare digests of each layer's routing, which each of them has
    computed by itself. So the next pass can begin before the host has seen a token.
    """

    def __init__(self, groups: Groups, layers: int, vocabulary: int, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._groups, self._layers, self._vocabulary = groups, layers, vocabulary
        self._begin_with([], False)

    def _begin_with(self, known: Sequence[mx.array], evaluates: bool) -> None:
        self._routed: list[mx.array] = []
        self._sums: list[mx.array] = []
        self._summed: list[int] = []  # the layers of these, in every pass alike
        self._known, self._evaluates = known, evaluates

    def begin(self, step: int, plan: int, rows: int) -> None:
        """Before a pass of so many rows; `plan` is the digest of the step's plan. Others may be
        under way.
        """
        self._begin_with([], rows > _MOST_LAZY_ROWS)
        self._groups.begin(step, plan, self._evaluates)

    def repeat(self, sums: Sequence[mx.array]) -> bool:
        """After check() has raised: begin the pass anew, evaluated at its exchanges, of which some
        of `sums` are known. False where a peer is not only slow.

        Passes that were begun after it then have to be computed anew, each after a begin_again().
        """
        done = self._groups.repeat()
        if done is not None:
            self._begin_with(sums[:done], True)
        return done is not None

    def begin_again(self, rows: int) -> None:
        """As begin(), of a pass that was begun after one that is repeated."""
        self._begin_with([], rows > _MOST_LAZY_ROWS)

    def waiting(self) -> AbstractContextManager[None]:
        """Around whatever may wait for an exchange: what is computed in a pass, or evaluated."""
        return self._groups.waiting()

    def sum(self, layer: int, partial: mx.array, ids: mx.array | None = None) -> mx.array:
        """The sum of the ranks' `partial` (..., width), of `dtype`.

        `ids` (..., k): the routing, of a layer's experts; else it is its attention's.
        """
        if ids is not None:
            self._routed.append(ids)
        done = len(self._sums)
        if done < len(self._known):
            total = self._known[done]
        else:
            if self._evaluates:
                mx.eval(partial)
            elif done:  # or the ranks might call in different orders
                (partial,) = mx.depends([partial], [self._sums[-1]])
            group = self._groups.of(done, partial.shape[-1])
            total = mx.distributed.all_sum(partial, group=group)
            if self._evaluates:
                mx.eval(total)
        self._sums.append(total)
        self._summed.append(layer)
        return total

    def tell(self, tokens: mx.array) -> tuple[mx.array, mx.array, list[mx.array]]:
        """After a pass, with as many `tokens` (sequences,), uint32, on all ranks: those of rank 0,
        what check() takes, (ranks, words), and what repeat() takes. To evaluate the second takes
        all exchanges of the pass.
        """
        words = mx.concatenate([_digests_of(self._routed), tokens])
        (mine,) = mx.depends([words], [self._sums[-1]])
        group = self._groups.of(len(self._sums), 0)
        told = mx.distributed.all_gather(mine, group=group).reshape(-1, words.size)
        # An embedding has nothing beyond the vocabulary, whatever a peer says.
        return mx.minimum(told[0, self._layers :], self._vocabulary - 1), told, self._sums

    def check(self, step: int, told: npt.NDArray[np.uint32]) -> None:
        """Raises PeerError and DivergenceError where what a pass has computed is void."""
        try:
            self._groups.check(step)
        except PeerError as lost:  # its layer is the number of a sum, or of what was told
            layers = (*self._summed, self._layers)
            if lost.layer is None or lost.layer >= len(layers):
                raise
            raise PeerError(lost.rank, layers[lost.layer], lost.step, lost.reason) from lost
        found = told[:, : self._layers]
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


def _digests_of(routed: Sequence[mx.array]) -> mx.array:
    """A digest of each layer's `ids` (..., k), in whatever order a token's experts are: uint32."""
    most = max(ids.shape[-1] for ids in routed)
    same = [
        ids
        if ids.shape[-1] == most
        else mx.pad(ids, [*[(0, 0)] * (ids.ndim - 1), (0, most - ids.shape[-1])])
        for ids in routed
    ]
    rows = mx.concatenate(same).reshape(len(routed), -1, most).astype(mx.uint32)
    mixed = (rows + 1) * mx.array(0x9E3779B1, mx.uint32)
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
