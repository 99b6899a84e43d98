"""The centralised schedule: the leader dispatches rows, workers with experts only answer.

The leader is a Reducer as in the decentralised one: `dispatch` tells each worker
its rows and pairs, `all_reduce` adds its own partial sums and the workers'. A
worker runs no model, only `serve_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.errors import InputError
from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.base import Call
from zmoe.exchange.buffers import DTYPES, ReceiveBuffers
from zmoe.exchange.dispatched import Received
from zmoe.exchange.native import Source
from zmoe.native import PAIR_BYTES, Dtype, Status
from zmoe.obs import Spans
from zmoe.placement.assignment import layer_owners
from zmoe.placement.pairs import Floats, Ints
from zmoe.placement.types import Placement

__all__ = ["PAIR_BYTES", "CentralExchange", "Held", "Received", "Sharing", "serve_step"]

Masks = npt.NDArray[np.uint64]


class Sharing:
    """Which ranks compute which pairs of one layer."""

    def __init__(self, placement: Placement, layer: int) -> None:
        """`layer` is the ordinal."""
        self._owners, self._experts = layer_owners(placement, layer), placement.experts

    def masks(self, ids: Ints) -> Masks:
        """Of expert ids (rows, k): bit r of each for a rank that computes this pair.

        None is set for an id that is no expert.
        """
        self._owners.assign(np.ascontiguousarray(ids))
        ranks = self._owners.ranks
        bits = np.where(ranks >= 0, np.uint64(1) << ranks.astype(np.uint64), np.uint64(0))
        table = np.append(np.bitwise_or.reduce(bits, axis=0), np.uint64(0))
        known = (ids >= 0) & (ids < self._experts)
        found: Masks = table[np.where(known, ids, self._experts)]
        return found

    @property
    def busiest(self) -> int:
        """How many experts the rank with most of them computes, of the ids last given."""
        return int(self._owners.counts.max())


class Held(Protocol):
    """One layer's experts on a worker; `dtype` is that of the sums on the wire."""

    local: Ints  # by expert id: its number on this node, or -1
    width: int  # of the rows that the experts see
    dtype: mx.Dtype

    def partial(self, received: Received) -> Any:
        """The weighted sum of each row's pairs: (rows, width), float32 or `dtype`."""
        ...

    def run_idle(self, received: Received) -> None:
        """Run the experts that the policy adds, for nothing."""
        ...


class CentralExchange(Exchange):
    """One layer at a time: rows out of the leader (rank 0), partial sums back to it."""

    def __init__(
        self, rank: int, nodes: int, *, max_rows: int, max_pairs: int, **others: Any
    ) -> None:
        """`max_rows`, `max_pairs` of one layer and step; `others` are Exchange's."""
        super().__init__(rank, nodes, max_rows=max_rows, algorithm="direct", parts=1, **others)
        if rank > 0:  # it waits for the leader, who may wait as long for another
            self._deadline_s *= 2
        self._sharing: list[Sharing] = []
        self._rows = Received(others["max_payload_bytes"], max_pairs) if rank > 0 else None

    def place(self, placement: Placement) -> None:
        """Who computes what, before the first step."""
        self._sharing = [Sharing(placement, layer) for layer in range(len(placement.owned))]

    def calibrate(self) -> None:
        """Nothing: there is one algorithm."""

    # ---- leader ------------------------------------------------------------------

    def dispatch(
        self,
        call: Call,
        x: Any,
        x_dtype: mx.Dtype,
        ids: Ints,
        weights: Floats,
    ) -> None:
        """See zmoe.exchange.base.Reducer."""
        if x.shape != (call.rows, call.width) or len(ids) != call.rows:
            raise ValueError(f"{x.shape} activations and {ids.shape} expert ids for {call}")
        with self._spans.span("exchange"):
            sharing = self._sharing[call.layer]
            if isinstance(x, mx.array):
                x, _ = ReceiveBuffers.source(x, x.size)
            routed = (
                x,
                DTYPES[x_dtype],
                np.ascontiguousarray(ids),
                np.ascontiguousarray(weights),
                sharing.masks(ids),
                sharing.busiest,
            )
            native, step, wire = self.native, self.step, self._wire_dtype(call)
            status = self._again(lambda s: native.dispatch(step, call, wire, *routed, s))
        if status == Status.INVALID:
            raise InputError(
                f"{call.rows} rows of {call.width} {x_dtype} do not fit the exchange's "
                f"{self._max_bytes} bytes, or layer {call.layer}, step {step} does not come after "
                "the last one"
            )
        if status != Status.OK:
            self._fail(status, call.layer)

    # ---- workers -----------------------------------------------------------------

    def receive(self, layer: int, width: int, local: Ints) -> Received:
        """The leader's rows for this rank in `layer`, valid until the next call.

        Their experts are numbered by `local`. An expert that has no number there is a
        DivergenceError, and so are rows of another width, step or layer than ours.
        """
        assert self._rows is not None
        received = self._rows
        due = (self.step, layer, width, local)
        self._wait(lambda s: self.native.receive(received, *due, s), layer)
        return received

    def reply(self, layer: int, received: Received, partial: Any, dtype: mx.Dtype) -> None:
        """Answer with `partial`, for which there were rows (None: there were none)."""
        source: Source = (partial, Dtype.F32)
        if isinstance(partial, mx.array):
            source = ReceiveBuffers.source(partial, partial.size)
        call = Call(layer, received.rows, received.width, dtype, received.digest)
        self._publish(call, self._wire_dtype(call), source)


def serve_step(exchange: CentralExchange, layers: Sequence[Held], spans: Spans) -> None:
    """A worker's part of one step: the rows of each layer in turn."""
    for layer, held in enumerate(layers):
        with spans.span("exchange"):
            received = exchange.receive(layer, held.width, held.local)
        partial = None
        with spans.span("experts"):
            if received.rows:
                partial = held.partial(received)
            held.run_idle(received)
        with spans.span("exchange"):
            exchange.reply(layer, received, partial, held.dtype)
