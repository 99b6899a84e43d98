"""The all-reduce among all ranks, from MLX array to MLX array (or numpy).

C does the work (csrc/exchange/exchange.c); collective.py calls it, under deadlines and
in micro-batches. This file owns the sockets and the buffers that results land in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import zmq

from zmoe.errors import AbsentError, InputError
from zmoe.exchange.algorithm import Choice
from zmoe.exchange.base import Call, Partial, nothing
from zmoe.exchange.buffers import DTYPES, ResultPool, wire_of
from zmoe.exchange.collective import Collective
from zmoe.exchange.keys import KeyPair
from zmoe.exchange.native import NativeExchange, OutBuffer, Source
from zmoe.exchange.sockets import Context, Endpoint, Ports, Sockets
from zmoe.native import HEADER_BYTES, MAX_NODES, Dtype
from zmoe.obs import Spans

RESEND_MS = 50  # a frame this late is asked for again
SPIN_US = 100  # how long to look for a peer's frame before sleeping
_NUMPY_DTYPES = {
    np.dtype(np.float32): (Dtype.F32, mx.float32),
    np.dtype(np.float16): (Dtype.F16, mx.float16),
}


class Exchange(Collective):
    """All-reduce among `nodes` ranks that move in lock-step; one thread at a time.

    Listens as soon as it is made (`endpoint` says where); `connect` joins the
    others. Ports of 0 are any free ones, of `ports` where given. `session` (64 bits)
    keeps runs apart: what others send is counted and dropped. `deadline_s` bounds each
    wait, `grace_s` is how long a broken link may take to come back. `wire_dtype` is how
    partials travel ("f32", "bf16", "f16", "q8"; "auto": as they are); `max_payload_bytes`
    counts them so. There are
    more slots for payloads of up to `small_payload_bytes` (a row) and `batch_payload_bytes`
    (one of every sequence; 0: there are none).
    `algorithm` "direct" (one-shot) or "scatter" (reduce-scatter + all-gather) and
    `parts` (micro-batches per call) other than 0 fix what `calibrate` otherwise
    finds out. `max_rows` is CentralExchange's. Without `payload_checksum` a payload
    that was damaged on its way is not noticed. All ranks must give the same values.
    With `keys` all links are encrypted, so that damage is noticed without checksums; each rank
    may have keys of its own, which the endpoints tell. Only peers from one of these IPv4
    `addresses` can connect, where they are given.
    Raises InputError for values out of range and for a port in use.
    """

    def __init__(
        self,
        rank: int,
        nodes: int,
        *,
        session: int,
        max_payload_bytes: int,
        small_payload_bytes: int,
        bind_host: str = "127.0.0.1",
        data_port: int = 0,
        control_port: int = 0,
        ports: Ports | None = None,
        deadline_s: float = 30.0,
        grace_s: float = 1.0,
        max_rows: int = 0,
        batch_payload_bytes: int = 0,
        spin_us: int = SPIN_US,
        spans: Spans | None = None,
        wire_dtype: str = "auto",
        algorithm: str = "auto",
        parts: int = 0,
        payload_checksum: bool = True,
        context: Context | None = None,
        keys: KeyPair | None = None,
        addresses: Collection[str] | None = None,
    ) -> None:
        if not 2 <= nodes <= MAX_NODES or not 0 <= rank < nodes:
            raise InputError(f"rank {rank} of {nodes} nodes: expected 2 to {MAX_NODES}")
        choice = Choice(nodes, algorithm, parts)
        super().__init__(rank, max_payload_bytes, deadline_s, spans or Spans(), choice)
        self.nodes, self.wire = nodes, wire_of(wire_dtype)
        self._grace_s, self._spin_us, self._max_rows = grace_s, spin_us, max_rows
        self._payload_checksum = payload_checksum and keys is None
        self.is_encrypted, self.ports = keys is not None, ports
        self._small_bytes = min(small_payload_bytes, max_payload_bytes)
        self._batch_bytes = batch_payload_bytes
        self._counted: dict[str, int] = {}  # by exchanges in C that are closed
        self._pool_counters: dict[str, int] = {}  # of the last of these
        self._results = ResultPool(max_payload_bytes, self.wire)
        self.endpoints: tuple[Endpoint, ...] = ()  # of all ranks, once they are known
        self._own_context = context is None
        self._context = Context() if context is None else context
        self._bind_host, self._keys, self._addresses = bind_host, keys, addresses
        try:
            self._listen(session, data_port, control_port)
        except InputError:
            self.close()
            raise

    # ---- joining ---------------------------------------------------------------

    def _listen(self, session: int, data_port: int = 0, control_port: int = 0) -> None:
        """Make the sockets of `session`, which listen from here on."""
        frame_bytes = HEADER_BYTES + self.max_bytes
        self._session = session
        self._sockets = Sockets(
            self._context, self.rank, self.nodes, session, frame_bytes, self._keys, self._addresses
        )
        self.endpoint = self._sockets.bind(self._bind_host, data_port, control_port, self.ports)

    def renew(self, session: int) -> Endpoint:
        """Leave the peers, and listen for those of another `session`, at other ports.

        `connect` joins them. What was learnt of the links, the counters and the buffers stay;
        nothing of the old session is answered any more. Returns the new endpoint. Raises
        InputError where no port is free.
        """
        self.leave()
        self._listen(session)
        return self.endpoint

    def regroup(self, session: int, rank: int, nodes: int) -> None:
        """As renew(), as `rank` of another number of `nodes`; of one, this listens for nobody.

        `endpoint` says where it listens. Of the links nothing is known then: calibrate() as all
        ranks do. Raises InputError.
        """
        self.leave()
        self.rank, self.nodes = rank, nodes
        self.begin_anew(nodes)
        if nodes > 1:
            self._listen(session)

    def leave(self) -> None:
        """Let go of the peers, and of what C holds. Idempotent."""
        if self.door is not None:
            self.door.close()
        if self._native is not None:
            self._counted, self._pool_counters = self.stats, self._native.pool_stats()
            self._native.close()
            self._native = None
        self._sockets.close()

    def connect(
        self,
        endpoints: Sequence[Endpoint],
        deadline_s: float,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Join the ranks at `endpoints` (one a rank, own included).

        Returns once all of them have subscribed to us and our links to them
        stand; else raises LaunchError naming the ranks that are missing. `tick`
        is called every 0.1 s at least, and may raise to give up.
        """
        self.start_connect(endpoints)
        self.finish_connect(endpoints, deadline_s, tick)

    def start_connect(self, endpoints: Sequence[Endpoint]) -> None:
        """First half of `connect`: returns at once."""
        if len(endpoints) != self.nodes:
            raise InputError(f"{len(endpoints)} endpoints for {self.nodes} nodes")
        self.endpoints = tuple(endpoints)
        self._sockets.connect(endpoints)
        sockets = self._sockets
        self._native = NativeExchange(
            rank=self.rank,
            nodes=self.nodes,
            session=self._session,
            max_payload_bytes=self.max_bytes,
            small_payload_bytes=self._small_bytes,
            batch_payload_bytes=self._batch_bytes,
            scatter=self.choice.may_scatter,
            xpub=sockets.xpub.underlying,
            sub=sockets.sub.underlying,
            router=sockets.router.underlying,
            dealers=[s.underlying if s is not None else 0 for s in sockets.dealers],
            monitors=[s.underlying if s is not None else 0 for s in sockets.monitors],
            max_rows=self._max_rows,
            payload_checksum=self._payload_checksum,
            spin_us=self._spin_us,
            resend_ms=RESEND_MS,
            grace_ms=int(self._grace_s * 1000),
        )

    def finish_connect(
        self,
        endpoints: Sequence[Endpoint],
        deadline_s: float,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Second half of `connect`: waits for every rank."""
        poller = zmq.Poller()
        for socket in self.poll_sockets():
            poller.register(socket, zmq.POLLIN)
        until = time.monotonic() + deadline_s
        everyone = set(range(self.nodes)) - {self.rank}
        while True:
            present = set(self.native.subscribers()) & set(self.native.links())
            if present == everyone:
                return
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            tick()
            poller.poll(int(min(left_s, 0.1) * 1000) + 1)
        ranks = tuple(sorted(everyone - present))
        absent = ", ".join(
            f"rank {r} at {endpoints[r].host}:{endpoints[r].data_port}" for r in ranks
        )
        if self.is_encrypted:
            absent += f"; all need the key of this rank, whose public half is {self.endpoint.key}"
        raise AbsentError(ranks, f"did not join the exchange within {deadline_s:g} s: {absent}")

    def poll_sockets(self) -> list[zmq.Socket[bytes]]:
        """What an idle wait must poll too; when one is readable, call `service`.

        While a broken link's grace runs nothing becomes readable: poll with a
        time-out of at most `grace_s`.
        """
        monitors = [socket for socket in self._sockets.monitors if socket is not None]
        return [self._sockets.router, self._sockets.xpub, *monitors]

    # ---- the all-reduce --------------------------------------------------------

    def dispatch(
        self,
        call: Call,
        x: Any,
        x_dtype: mx.Dtype,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> None:
        """Does nothing: every rank has the rows, and routes them alike."""

    def sum_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """See zmoe.exchange.base.Reducer."""
        return mx.float32 if self.wire is Dtype.F32 else dtype

    def takes_whole(self, call: Call) -> bool:
        """See zmoe.exchange.base.Reducer."""
        return len(self._bounds(call)) < 2

    def all_reduce(
        self, call: Call, partial: Partial[mx.array], overlap: Callable[[], None] = nothing
    ) -> mx.array:
        """See zmoe.exchange.base.Reducer; float32, float16 and bfloat16."""
        results = self._results

        def source(start: int, stop: int) -> Source:
            part = partial(start, stop) if callable(partial) else partial
            elements = (stop - start) * call.width
            if part is None or elements == 0:
                return None, Dtype.F32
            return results.source(part, elements)

        out, out_dtype = results.next(call.dtype), DTYPES[call.dtype]
        self._reduce(call, source, out, out_dtype, overlap, callable(partial))
        return results.view(call.dtype, call.rows, call.width)

    def all_reduce_host(
        self,
        call: Call,
        partial: Partial[npt.NDArray[np.float32]],
        out: npt.NDArray[np.float32],
        overlap: Callable[[], None] = nothing,
    ) -> None:
        """See zmoe.exchange.base.Reducer."""
        if out.shape != (call.rows, call.width):
            raise ValueError(f"a sum of shape {out.shape} for {call}")

        def source(start: int, stop: int) -> Source:
            return partial(start, stop) if callable(partial) else partial, Dtype.F32

        self._reduce(call, source, OutBuffer(out), Dtype.F32, overlap, callable(partial))

    def all_reduce_numpy(self, array: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """The sum of all ranks' arrays, of one shape (1-D or 2-D) and dtype (f32 or f16).

        Returns a new array. It counts its own steps: don't mix it with `all_reduce`
        on one exchange. Raises InputError, PeerError and DivergenceError.
        """
        dtypes = _NUMPY_DTYPES.get(array.dtype)
        if dtypes is None or array.ndim not in (1, 2) or array.size == 0:
            raise InputError(
                f"cannot reduce a {array.dtype} array of shape {array.shape}: expected float32 "
                "or float16, 1-D or 2-D, not empty"
            )
        rows, width = array.shape if array.ndim == 2 else (1, array.shape[0])
        dtype, mlx_dtype = dtypes
        out = np.empty(array.shape, array.dtype)
        source: Source = (np.ascontiguousarray(array), dtype)
        self._reduce(Call(0, rows, width, mlx_dtype, 0), lambda *_: source, OutBuffer(out), dtype)
        self.step += 1
        return out

    # ---- between exchanges ------------------------------------------------------

    def links(self) -> tuple[int, ...]:
        """Ranks to which our control link stands."""
        if self.door is not None:  # MLX's threads may be in the exchange
            return self.door.links()
        return self._native.links() if self._native is not None else ()

    @property
    def stats(self) -> dict[str, int]:
        """Counters: exchanges, frames, bytes, bad frames by kind, resends, links, waits."""
        mine = self._native.stats() if self._native is not None else {}
        return {n: self._counted.get(n, 0) + mine.get(n, 0) for n in {**self._counted, **mine}}

    @property
    def pool_stats(self) -> dict[str, int]:
        """Counters of the slot pool, and how much of it is locked in memory."""
        return self._native.pool_stats() if self._native is not None else self._pool_counters

    def close(self) -> None:
        """Leave; idempotent. What is under way still goes out, for half a second and what the
        frames take at most: this waits for it unless a context was given.
        """
        self.leave()
        if self._own_context:
            self._context.term()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
