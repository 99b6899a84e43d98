"""zmoe_exchange of csrc/exchange/exchange.h as typed Python: thin, one method a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.exchange.base import Call
from zmoe.exchange.dispatched import DispatchBatch
from zmoe.native import MAX_NODES, Algorithm, Dtype, Header, Status, ffi, header_of, lib
from zmoe.placement.pairs import Floats, Ints

if TYPE_CHECKING:
    from zmoe.native import CData


@dataclass(frozen=True)
class Fault:
    """Why an exchange ended early; ranks are ascending."""

    missing: tuple[int, ...]
    lost: tuple[int, ...]
    diverged: tuple[int, ...]
    zmq_errno: int
    step: int
    layer: int
    theirs: Header


Source = tuple[Any | None, Dtype]  # a buffer (None: zeros) and the dtype of its elements
_ROUTED = ("uint8_t[]", "int32_t[]", "float[]", "uint64_t[]")


def ranks_in(mask: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(MAX_NODES) if mask >> rank & 1)


def _counters(raw: CData) -> dict[str, int]:
    return {name: int(getattr(raw, name)) for name, _ in ffi.typeof(raw).item.fields}


def fault_of(raw: CData) -> Fault:
    """A zmoe_fault as Python."""
    return Fault(
        ranks_in(raw.missing),
        ranks_in(raw.lost),
        ranks_in(raw.diverged),
        int(raw.zmq_errno),
        int(raw.step),
        int(raw.layer),
        header_of(raw.theirs),
    )


def microseconds(seconds: float) -> int:
    """`seconds` as C takes a deadline."""
    return max(0, min(int(seconds * 1e6), 2**63))


class OutBuffer:
    """A pinned pointer into a writable buffer that `collect` fills."""

    def __init__(self, buffer: Any) -> None:
        self.pointer = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)


class NativeExchange:
    """zmoe_exchange of csrc/exchange/exchange.h over sockets that the caller owns.

    `xpub`, `sub`, `router`, `dealers`, `monitors` are `socket.underlying`
    addresses; dealers and monitors are 0 at `rank`. Used by one thread at a
    time. Raises ValueError for arguments that are out of range.
    """

    def __init__(
        self,
        *,
        rank: int,
        nodes: int,
        session: int,
        max_payload_bytes: int,
        small_payload_bytes: int,
        scatter: bool,
        xpub: int,
        sub: int,
        router: int,
        dealers: Sequence[int],
        monitors: Sequence[int],
        spin_us: int,
        resend_ms: int,
        grace_ms: int,
        max_rows: int = 0,
        batch_payload_bytes: int = 0,
        payload_checksum: bool = True,
    ) -> None:
        dealer_array = ffi.new("void *[]", [ffi.cast("void *", address) for address in dealers])
        monitor_array = ffi.new("void *[]", [ffi.cast("void *", address) for address in monitors])
        config = ffi.new("zmoe_exchange_config *")
        config.rank, config.nodes, config.session = rank, nodes, session
        config.max_payload_bytes = max_payload_bytes
        config.small_payload_bytes, config.scatter = small_payload_bytes, scatter
        config.batch_payload_bytes = batch_payload_bytes
        config.xpub = ffi.cast("void *", xpub)
        config.sub = ffi.cast("void *", sub)
        config.router = ffi.cast("void *", router)
        config.dealers, config.monitors = dealer_array, monitor_array
        config.spin_us, config.resend_ms, config.grace_ms = spin_us, resend_ms, grace_ms
        config.dispatch_rows, config.no_payload_checksum = max_rows, not payload_checksum
        out = ffi.new("zmoe_exchange **")
        status = Status(lib.zmoe_exchange_create(config, out))
        if status is not Status.OK:
            raise ValueError(f"cannot create the exchange: {status.name}")
        self._exchange: CData | None = out[0]
        self._call = ffi.new("zmoe_call *")
        self._fault = ffi.new("zmoe_fault *")
        self._routed = ffi.new("zmoe_routed *")
        self._null = ffi.NULL

    def close(self) -> None:
        """Free it; idempotent. The caller closes the sockets; other calls raise TypeError."""
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            lib.zmoe_exchange_destroy(exchange)

    @property
    def pointer(self) -> CData | None:
        """The zmoe_exchange itself, for what in C rests on it."""
        return self._exchange

    def subscribers(self) -> tuple[int, ...]:
        """Ranks that our frames reach."""
        return ranks_in(lib.zmoe_exchange_subscribers(self._exchange))

    def links(self) -> tuple[int, ...]:
        """Ranks to which our control link stands."""
        return ranks_in(lib.zmoe_exchange_links(self._exchange))

    def publish(
        self,
        step: int,
        call: Call,
        wire_dtype: Dtype,
        source: Source,
        deadline_s: float,
        algorithm: Algorithm = Algorithm.DIRECT,
        micro_batch: int = 0,
        plan: int = 0,
    ) -> int:
        """Encode this rank's partial in `wire_dtype` and send it; returns a Status.

        `source` is a C-contiguous buffer of call.rows * call.width elements and
        their dtype (F32, F16 or BF16); a buffer of None adds nothing. The bytes
        are copied before this returns. `micro_batch` counts a call's micro-batches
        from 0, `plan` is the digest of the step's plan. OK; INTERRUPTED after 100 ms
        without a free send buffer or after a signal, with nothing sent (call again
        to go on waiting); POOL when `deadline_s` seconds have passed so; INVALID
        when the payload is too large or the call does not come after the last one;
        PEER, ZMQ, FORK: see `fault`.
        """
        data, data_dtype = source
        raw = self._call_of(step, call, wire_dtype, algorithm, micro_batch, plan)
        pointer = self._null if data is None else ffi.from_buffer("uint8_t[]", data)
        return lib.zmoe_exchange_publish(
            self._exchange, raw, pointer, data_dtype, microseconds(deadline_s), self._fault
        )

    def _call_of(
        self,
        step: int,
        call: Call,
        wire_dtype: Dtype,
        algorithm: Algorithm = Algorithm.DIRECT,
        micro_batch: int = 0,
        plan: int = 0,
    ) -> CData:
        raw = self._call
        raw.step, raw.micro_batch, raw.plan = step, micro_batch, plan
        raw.layer, raw.rows, raw.width, _, raw.digest = call
        raw.wire_dtype, raw.algorithm = wire_dtype, algorithm
        return raw

    def dispatch(
        self,
        step: int,
        call: Call,
        wire_dtype: Dtype,
        x: Any,
        x_dtype: Dtype,
        ids: Ints,
        weights: Floats,
        ranks: npt.NDArray[np.uint64],
        busiest: int,
        deadline_s: float,
        plan: int = 0,
    ) -> int:
        """Send every worker its rows of x; `publish` and `collect` then end the call.

        `x` is (rows, width) of `x_dtype`; `ids` int32, `weights` float32 and
        `ranks` uint64 are (rows, k), all C-contiguous and copied before this
        returns. Bit r of `ranks` is set where rank r computes the pair. `busiest`
        is the number of experts that the rank with most of them computes.
        Returns a Status, like `publish`.
        """
        routed = self._routed
        keep = [
            ffi.from_buffer(kind, data) for kind, data in zip(_ROUTED, (x, ids, weights, ranks))
        ]
        routed.x, routed.ids, routed.weights, routed.ranks = keep
        routed.top_k, routed.x_dtype, routed.busiest = ids.shape[1], x_dtype, busiest
        raw = self._call_of(step, call, wire_dtype, plan=plan)
        return lib.zmoe_exchange_dispatch(
            self._exchange, raw, routed, microseconds(deadline_s), self._fault
        )

    def receive(
        self, out: DispatchBatch, step: int, layer: int, width: int, local: Ints, deadline_s: float
    ) -> int:
        """Wait for the leader's rows of `width` elements, and write them into `out`.

        `local` int32 (experts,) is the number of each expert on this rank, -1 for
        another rank's. What came is valid until the next call. Returns a Status,
        like `collect`.
        """
        numbers = ffi.from_buffer("int32_t[]", local)
        out.raw.local, out.raw.experts = numbers, len(numbers)
        out.raw.width = width
        return lib.zmoe_exchange_receive(
            self._exchange, out.raw, step, layer, microseconds(deadline_s), self._fault
        )

    def collect(self, out: OutBuffer, out_dtype: Dtype, deadline_s: float, at: int = 0) -> int:
        """Wait for every peer's partial of the oldest open call, and write the sum into `out`.

        The sum is rows * width elements of `out_dtype`, from byte `at` on; `out`
        must have room, which is not checked. Returns a Status: OK; INTERRUPTED
        after 100 ms or a signal (call again to go on waiting); TIMEOUT after
        `deadline_s` seconds; PEER, DIVERGED, ZMQ, FORK: see `fault`; INVALID when
        no call is open.
        """
        pointer = out.pointer + at if at else out.pointer
        return lib.zmoe_exchange_collect(
            self._exchange, pointer, out_dtype, microseconds(deadline_s), self._fault
        )

    def service(self) -> int:
        """Answer resend requests and watch the links; never blocks. Returns a Status."""
        return lib.zmoe_exchange_service(self._exchange, self._fault)

    def fault(self) -> Fault:
        """What the last call that failed had to say."""
        return fault_of(self._fault)

    def stats(self) -> dict[str, int]:
        """Counters of zmoe_exchange_stats."""
        raw = ffi.new("zmoe_exchange_stats *")
        lib.zmoe_exchange_stats_get(self._exchange, raw)
        return _counters(raw)

    def pool_stats(self) -> dict[str, int]:
        """Counters of zmoe_pool_stats."""
        raw = ffi.new("zmoe_pool_stats *")
        lib.zmoe_exchange_pool_stats(self._exchange, raw)
        return _counters(raw)

    def time_exchanges(
        self, elements: int, wire_dtype: Dtype, algorithm: Algorithm, count: int
    ) -> npt.NDArray[np.float64]:
        """Microseconds of each of `count` exchanges of f32, run and timed in C."""
        call = self._call_of(0, Call(0, 1, elements, mx.float32, 0), wire_dtype, algorithm)
        source = np.ones(elements, np.float32)
        out, elapsed = np.empty_like(source), np.zeros(count)
        status = lib.zmoe_bench_exchanges(
            self._exchange,
            call,
            ffi.from_buffer("uint8_t[]", source),
            ffi.from_buffer("uint8_t[]", out, require_writable=True),
            Dtype.F32,
            count,
            30_000_000,
            ffi.from_buffer("double[]", elapsed, require_writable=True),
            self._fault,
        )
        if status != Status.OK:
            raise RuntimeError(f"{Status(status).name} while timing exchanges: {self.fault()}")
        return elapsed
