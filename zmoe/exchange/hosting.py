"""The exchange of a node that hosts more shards than its own.

A shard is what one rank of the placement owns, and whoever hosts it computes its partial
sums with that rank's own numbering, and publishes them as that rank. So no sum changes
when a shard moves to another node: neither its terms nor their order. Each shard that a node
hosts beside its own is a Guest: a rank of the exchange with sockets of its own, for which
another thread waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import mlx.core as mx
import numpy as np
import zmq

from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.base import Call, Partial, nothing
from zmoe.exchange.buffers import DTYPES, ResultPool
from zmoe.exchange.central import CentralExchange, Held, serve_layer
from zmoe.exchange.dispatched import DispatchBatch
from zmoe.exchange.sockets import Endpoint
from zmoe.placement.assignment import Ownership
from zmoe.placement.pairs import Floats, Ints

_SLICE_S = 0.1  # of a wait for the guests' threads


class Guest:
    """A shard of another rank, hosted here. `exchange` is that rank's."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.layers: Sequence[Held] = ()
        self._owned: Sequence[Ownership] = ()
        self._batch = DispatchBatch(0, 0)
        self._out: Floats = np.empty((0, 0), np.float32)

    def hold(self, layers: Sequence[Held], owned: Sequence[Ownership]) -> None:
        """The shard's experts, and what of a routing is theirs, by layer."""
        self.layers, self._owned = layers, owned

    def partial(
        self, call: Call, x: Any, x_dtype: mx.Dtype, ids: Ints, weights: Floats
    ) -> Callable[[int, int], Floats | None]:
        """The shard's partial sum of a layer; arguments are those of Reducer.dispatch."""
        pairs = self._owned[call.layer].pairs(ids)
        if not len(pairs.rows):
            return lambda start, stop: None
        if isinstance(x, mx.array):
            x, _ = ResultPool.source(x, x.size)
        shape = (call.rows, call.width)
        self._batch = self._batch.filled(x, DTYPES[x_dtype], shape, pairs, weights)
        sums = self.layers[call.layer].partial(self._batch)
        if isinstance(sums, mx.array):
            sums = np.array(sums.astype(mx.float32))
        sums = sums.reshape(shape)

        def between(start: int, stop: int) -> Floats | None:
            begin, end = np.searchsorted(pairs.rows, (start, stop))
            return sums[start:stop] if begin < end else None

        return between

    def reduce(self, call: Call, partial: Callable[[int, int], Floats | None]) -> None:
        """Take part in an exchange as this rank; the sum is left to the node's own."""
        if self._out.shape != (call.rows, call.width):
            self._out = np.empty((call.rows, call.width), np.float32)
        self.exchange.all_reduce_host(call, partial, self._out)


class Hosting(Exchange):
    """An exchange with guests, once there are any: each joins it as another rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._made_by = options
        self.guests: list[Guest] = []
        self._threads: ThreadPoolExecutor | None = None
        super().__init__(*args, **options)

    def host(self, session: int, guests: Sequence[int]) -> dict[int, Endpoint]:
        """Leave the peers, and listen for those of `session`: as this rank, and as each of the
        ranks `guests`, which get their experts before the next step.

        Returns the endpoint of each. `connect` joins the peers. Raises InputError where no port
        is free.
        """
        self._dismiss()
        endpoints = {self.rank: self.renew(session)}
        options = {**self._made_by, "session": session, "context": self._context, "spans": None}
        for rank in guests:
            exchange = self._exchange_of(rank, options)
            self.guests.append(Guest(exchange))
            endpoints[rank] = exchange.endpoint
        if guests:
            self._threads = ThreadPoolExecutor(len(guests), "zmoe-guest")
        return endpoints

    def retire(self) -> None:
        """Leave the peers for good. `host` listens for those of another run."""
        self._dismiss()
        self.leave()
        self.begin_anew(self.nodes)
        self.tick = nothing

    def _exchange_of(self, rank: int, options: dict[str, Any]) -> Exchange:
        """What a guest takes part by."""
        exchange = Exchange(rank, self.nodes, **options)
        exchange.choice = self.choice
        return exchange

    def connect(
        self,
        endpoints: Sequence[Endpoint],
        deadline_s: float,
        tick: Callable[[], None] = nothing,
    ) -> None:
        """See Exchange; every guest joins, too."""
        everyone = [self, *(guest.exchange for guest in self.guests)]
        for exchange in everyone:
            exchange.start_connect(endpoints)

        def let_all_proceed() -> None:
            for exchange in everyone:
                exchange.native.links()
            tick()

        for exchange in everyone:
            exchange.finish_connect(endpoints, deadline_s, let_all_proceed)

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """See Exchange."""
        mine = super().poll_sockets()
        for guest in self.guests:
            mine += guest.exchange.poll_sockets()
        return mine

    def service(self) -> None:
        """See Collective."""
        super().service()
        for guest in self.guests:
            guest.exchange.service()

    def close(self) -> None:
        """See Exchange."""
        self._dismiss()
        super().close()

    def _dismiss(self) -> None:
        """End the guests and their threads. Idempotent."""
        for guest in self.guests:
            guest.exchange.cancel()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        for guest in self.guests:
            guest.exchange.close()
        self.guests = []


class HostingExchange(Hosting):
    """An all-reduce in which each guest adds its shard's partial sums as well."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._routed: tuple[Any, mx.Dtype, Ints, Floats] | None = None
        super().__init__(*args, **options)

    def dispatch(self, call: Call, x: Any, x_dtype: mx.Dtype, ids: Ints, weights: Floats) -> None:
        """Keep what the guests' partial sums are made of."""
        if self.guests:
            self._routed = (x, x_dtype, ids, weights)

    def all_reduce(
        self, call: Call, partial: Partial[mx.array], overlap: Callable[[], None] = nothing
    ) -> mx.array:
        """See zmoe.exchange.base.Reducer."""
        if not self.guests:
            return super().all_reduce(call, partial, overlap)
        found: list[mx.array] = []
        own = super().all_reduce
        self._with_guests(call, lambda: found.append(own(call, partial, overlap)))
        return found[0]

    def all_reduce_host(
        self,
        call: Call,
        partial: Partial[Floats],
        out: Floats,
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """See zmoe.exchange.base.Reducer."""
        if not self.guests:
            super().all_reduce_host(call, partial, out, overlap)
            return
        own = super().all_reduce_host
        self._with_guests(call, lambda: own(call, partial, out, overlap))

    def _with_guests(self, call: Call, own: Callable[[], None]) -> None:
        """Run this rank's part of an exchange while threads run the guests' parts."""
        assert self._routed is not None and self._threads is not None
        under_way: list[Future[None]] = []
        try:
            for guest in self.guests:
                guest.exchange.step, guest.exchange.plan = self.step, self.plan
                with self.spans.span("experts"):
                    partial = guest.partial(call, *self._routed)
                under_way.append(self._threads.submit(guest.reduce, call, partial))
            own()
            while wait(under_way, _SLICE_S).not_done:
                self.tick()
        except BaseException:
            for guest in self.guests:
                guest.exchange.cancel()
            wait(under_way)
            raise
        for each in under_way:
            each.result()


class HostingCentral(Hosting, CentralExchange):
    """The centralised schedule, of a node that serves the leader's rows as its guests, too."""

    def _exchange_of(self, rank: int, options: dict[str, Any]) -> Exchange:
        exchange = CentralExchange(rank, self.nodes, **options)
        assert self.placement is not None
        exchange.place(self.placement)
        return exchange

    def dispatch(self, call: Call, x: Any, x_dtype: mx.Dtype, ids: Ints, weights: Floats) -> None:
        """See CentralExchange; the leader's own guests have served it then."""
        super().dispatch(call, x, x_dtype, ids, weights)
        self._serve_as_guests(call.layer)

    def serve(self, layers: Sequence[Held]) -> None:
        """A worker's share of one step, whose own experts are `layers`.

        Raises PeerError and DivergenceError.
        """
        for layer, held in enumerate(layers):
            serve_layer(self, layer, held, self.spans)
            self._serve_as_guests(layer)

    def _serve_as_guests(self, layer: int) -> None:
        for guest in self.guests:
            exchange = guest.exchange
            assert isinstance(exchange, CentralExchange)
            exchange.step, exchange.plan = self.step, self.plan
            serve_layer(exchange, layer, guest.layers[layer], self.spans)
