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
from zmoe.exchange.buffers import DTYPES, ResultPool
from zmoe.exchange.dispatched import DispatchBatch
from zmoe.exchange.native import Source
from zmoe.native import PAIR_BYTES, Dtype, Status
from zmoe.obs import Spans
from zmoe.placement.assignment import layer_owners
from zmoe.placement.pairs import Floats, Ints
from zmoe.placement.types import Placement

__all__ = ["PAIR_BYTES", "CentralExchange", "DispatchBatch", "Held", "Sharing", "serve_step"]

Masks = npt.NDArray[np.uint64]


class Sharing:
    """Which ranks compute which pairs of one layer."""

    def __init__(self, placement: Placement, layer: int) -> None:
        """`layer` is the ordinal."""
        self._owners = layer_owners(placement, layer)

    def masks(self, ids: Ints) -> Masks:
        """For expert ids (rows, k): uint64 (rows, k) with bit r set where rank r computes the pair.

        No bit is set for an id that is not an expert's. Valid until the next call.
        """
        return self._owners.assign(np.ascontiguousarray(ids))

    @property
    def busiest(self) -> int:
        """How many experts the rank with most of them computes, of the ids last given."""
        return int(self._owners.counts.max())


class Held(Protocol):
    """One layer's experts on a worker; `dtype` is that of the sums on the wire."""

    local: Ints  # by expert id: its number on this node, or -1
    width: int  # of the rows that the experts see
    dtype: mx.Dtype

    def partial(self, received: DispatchBatch) -> Any:
        """The weighted sum of each row's pairs: (rows, width), float32 or `dtype`."""
        ...

    def run_idle(self, received: DispatchBatch) -> None:
        """Run the experts that the policy adds, for nothing."""
        ...


class CentralExchange(Exchange):
    """One layer at a time: rows out of the leader (rank 0), partial sums back to it."""

    def __init__(
        self, rank: int, nodes: int, *, max_rows: int, max_pairs: int, **others: Any
    ) -> None:
        """`max_rows` and `max_pairs` bound one layer of one step; `others` are Exchange's."""
        super().__init__(rank, nodes, max_rows=max_rows, algorithm="direct", parts=1, **others)
        if rank > 0:  # it waits for the leader, who may wait as long for another
            self.deadline_s *= 2
        self.placement: Placement | None = None
        self._sharing: list[Sharing] = []
        self._rows = DispatchBatch(others["max_payload_bytes"], max_pairs) if rank > 0 else None

    def place(self, placement: Placement) -> None:
        """Tell the exchange who computes what; called before the first step."""
        self.placement = placement
        self._sharing = [Sharing(placement, layer) for layer in range(len(placement.owned))]

    def calibrate(self) -> None:
        """Does nothing: there is only one algorithm."""

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
        with self.spans.span("exchange"):
            sharing = self._sharing[call.layer]
            if isinstance(x, mx.array):
                x, _ = ResultPool.source(x, x.size)
            routed = (
                x,
                DTYPES[x_dtype],
                np.ascontiguousarray(ids),
                np.ascontiguousarray(weights),
                sharing.masks(ids),
                sharing.busiest,
            )
            native, step, wire = self.native, self.step, self._wire_dtype(call)
            status = self._again(lambda s: native.dispatch(step, call, wire, *routed, s, self.plan))
        if status == Status.INVALID:
            raise InputError(
                f"{call.rows} rows of {call.width} {x_dtype} do not fit the exchange's "
                f"{self.max_bytes} bytes, or layer {call.layer}, step {step} does not come after "
                "the last one"
            )
        if status != Status.OK:
            self._fail(status, call.layer)

    def takes_whole(self, call: Call) -> bool:
        """No: workers wait for `dispatch`."""
        return False

    # ---- workers -----------------------------------------------------------------

    def receive(self, layer: int, width: int, local: Ints) -> DispatchBatch:
        """The leader's rows for this rank in `layer`, valid until the next call.

        `local` int32 (experts,) is each expert's number on this rank, or -1. Raises
        DivergenceError for an expert of another rank and for rows of another width,
        step or layer, PeerError for a lost or silent leader.
        """
        assert self._rows is not None
        received = self._rows
        due = (self.step, layer, width, local)
        self._wait(lambda s: self.native.receive(received, *due, s), layer)
        return received

    def reply(self, layer: int, received: DispatchBatch, partial: Any, dtype: mx.Dtype) -> None:
        """Send `partial`, (rows, width) of float32 or `dtype`; None where no rows came.

        It travels as `dtype` unless the exchange has a wire dtype. Raises PeerError.
        """
        source: Source = (partial, Dtype.F32)
        if isinstance(partial, mx.array):
            source = ResultPool.source(partial, partial.size)
        call = Call(layer, received.rows, received.width, dtype, received.digest)
        self._publish(call, self._wire_dtype(call), source)


def serve_step(exchange: CentralExchange, layers: Sequence[Held], spans: Spans) -> None:
    """A worker's share of one step: receive, compute and answer, layer by layer.

    Raises PeerError and DivergenceError.
    """
    for layer, held in enumerate(layers):
        serve_layer(exchange, layer, held, spans)


def serve_layer(exchange: CentralExchange, layer: int, held: Held, spans: Spans) -> None:
    """As serve_step, of one layer."""
    with spans.span("exchange"):
        received = exchange.receive(layer, held.width, held.local)
    partial = None
    with spans.span("experts"):
        if received.rows:
            partial = held.partial(received)
        held.run_idle(received)
    with spans.span("exchange"):
        exchange.reply(layer, received, partial, held.dtype)
