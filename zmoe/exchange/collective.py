"""Exchanges on the C side: under a deadline, in micro-batches, with errors that name the peer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from zmoe.errors import InputError, ZmoeError
from zmoe.exchange.algorithm import Choice, Line, measure
from zmoe.exchange.base import Call, nothing
from zmoe.exchange.buffers import DTYPES
from zmoe.exchange.faults import error_of
from zmoe.exchange.native import NativeExchange, OutBuffer, Source
from zmoe.native import WINDOW, Algorithm, Dtype, Status
from zmoe.obs import Spans
from zmoe.placement.pairs import Floats

if TYPE_CHECKING:
    from zmoe.exchange.groups import Door


_TOLD_LAYER = 1 << 16  # of step 0, behind those that calibrate() uses


class Collective:
    """What an exchange does once it is connected; `native` is set by then.

    Frames carry the number of the `step` and, folded into the routing's digest, `plan`: the
    digest of the step's plan, 64 bits. A rank with another one is a DivergenceError.
    While `door` is open, exchanges are MLX's collectives instead (zmoe.exchange.groups).
    `wire`: how all partials travel; None: as each call says. `tick` is called
    every 0.1 s of a wait for peers, and may raise to give up.
    """

    def __init__(
        self, rank: int, max_bytes: int, deadline_s: float, spans: Spans, choice: Choice
    ) -> None:
        self.rank, self.step, self.plan, self.choice = rank, 0, 0, choice
        self.wire: Dtype | None = None
        self.tick: Callable[[], None] = nothing
        self.max_bytes, self.deadline_s, self.spans = max_bytes, deadline_s, spans
        self.door: Door | None = None
        self._native: NativeExchange | None = None
        self._cancelled = False
        self._told = 0

    @property
    def native(self) -> NativeExchange:
        """The exchange in C. Raises ZmoeError before `connect` and after `close`."""
        if self._native is None:
            raise ZmoeError("the exchange is not connected")
        return self._native

    def begin_anew(self, nodes: int) -> None:
        """Forget the run so far, and what was learnt of its links: another one follows, among so
        many nodes that have none behind them.
        """
        self.step = self.plan = self._told = 0
        self.choice = self.choice.among(nodes)

    def cancel(self) -> None:
        """From any thread: waits for a peer, also those to come, end with a ZmoeError."""
        self._cancelled = True
        if self.door is not None:
            self.door.cancel()

    def service(self) -> None:
        """Answer peers and look at the links, without waiting. Raises PeerError."""
        if self.door is not None:
            self.door.service()
            return
        status = self.native.service()
        if status != Status.OK:
            self._fail(status, None)

    def calibrate(self) -> None:
        """Time both algorithms, and choose by rank 0's figures from now on.

        All ranks call it at the same time, before their first step, which is
        then 1. It times float32 exchanges of 16 KiB and of up to 1 MiB, each
        under the exchange's deadline, and runs none where `max_payload_bytes` is
        below 32 KiB. Raises PeerError and DivergenceError.
        """
        out = np.empty(max(4, self.max_bytes // 4), np.float32)
        layers = iter(range(1 << 16))

        def run(data: npt.NDArray[np.float32], kind: Algorithm, silent: bool = False) -> None:
            call = Call(next(layers), 1, data.size, mx.float32, 0)
            self._publish(call, Dtype.F32, (None if silent else data, Dtype.F32), kind)
            self._collect(OutBuffer(out), Dtype.F32, call.layer)

        def exchange_us(size: int, kind: Algorithm) -> float:
            data = np.ones(size // 4, np.float32)
            start = time.perf_counter()
            run(data, kind)
            return 1e6 * (time.perf_counter() - start)

        lines = measure(exchange_us, self.max_bytes, self.choice.may_scatter)
        if lines is not None:
            mine = np.array([[line.start, line.per_byte] for line in lines], np.float32)
            run(mine.ravel(), Algorithm.DIRECT, silent=self.rank != 0)
            agreed = out[:4].tolist()
            self.choice.learn(Line(*agreed[:2]), Line(*agreed[2:]))
        self.step = 1

    def tell(self, numbers: Sequence[float]) -> Floats:
        """Every rank's `numbers`, by rank: (nodes, numbers) float32.

        All ranks call it at the same time, before their first step. Raises PeerError and
        DivergenceError.
        """
        nodes = self.choice.nodes
        mine = np.zeros((nodes, len(numbers)), np.float32)
        mine[self.rank] = numbers
        out, first = np.empty_like(mine), self.step
        call = Call(_TOLD_LAYER + self._told, 1, mine.size, mx.float32, 0)
        self.step, self._told = 0, self._told + 1
        self._publish(call, Dtype.F32, (mine, Dtype.F32))
        self._collect(OutBuffer(out), Dtype.F32, call.layer)
        self.step = first
        return out

    def _reduce(
        self,
        call: Call,
        source: Callable[[int, int], Source],
        out: OutBuffer,
        out_dtype: Dtype,
        overlap: Callable[[], None] = nothing,
        in_parts: bool = False,
    ) -> None:
        """Sum the ranks' partials into `out`, (rows, width) of `out_dtype`.

        `source(start, stop)` gives this rank's partial of those rows.
        `in_parts`: it may be called for some rows while earlier ones are
        under way, which splits the call into micro-batches.
        """
        layer, rows, wire = call.layer, call.rows, self._wire_dtype(call)
        algorithm = self.choice.algorithm(wire.payload_bytes(rows, call.width))
        bounds = self._bounds(call) if in_parts else ()
        if len(bounds) < 2:
            data = source(0, rows)
            with self.spans.span("exchange"):
                self._publish(call, wire, data, algorithm)
                overlap()
                self._collect(out, out_dtype, layer)
            return
        at = [start * call.width * out_dtype.itemsize for start, _ in bounds]
        for part, (start, stop) in enumerate(bounds):
            some = Call(layer, stop - start, call.width, call.dtype, call.digest)
            data = source(start, stop)
            with self.spans.span("exchange"):
                if part >= WINDOW:
                    self._collect(out, out_dtype, layer, at[part - WINDOW])
                self._publish(some, wire, data, algorithm, part)
        with self.spans.span("exchange"):
            overlap()
            for offset in at[-WINDOW:]:
                self._collect(out, out_dtype, layer, offset)

    def _bounds(self, call: Call) -> Sequence[tuple[int, int]]:
        """The rows of each micro-batch, where `call` may be split."""
        if call.rows == 1:
            return ()
        return self.choice.bounds(
            call.rows, self._wire_dtype(call).payload_bytes(call.rows, call.width)
        )

    def _wire_dtype(self, call: Call) -> Dtype:
        return DTYPES[call.dtype] if self.wire is None else self.wire

    def _publish(
        self,
        call: Call,
        wire: Dtype,
        source: Source,
        algorithm: Algorithm = Algorithm.DIRECT,
        part: int = 0,
    ) -> None:
        native, step, plan = self.native, self.step, self.plan
        status = self._again(
            lambda s: native.publish(step, call, wire, source, s, algorithm, part, plan)
        )
        if status == Status.OK:
            return
        if wire.payload_bytes(call.rows, call.width) > self.max_bytes:
            raise InputError(
                f"a partial output of {call.rows} x {call.width} {wire.name} exceeds the "
                f"exchange's {self.max_bytes} bytes"
            )
        if status == Status.INVALID:
            raise ZmoeError(f"layer {call.layer}, step {step} does not come after the last one")
        self._fail(status, call.layer)

    def _collect(self, out: OutBuffer, dtype: Dtype, layer: int, at: int = 0) -> None:
        self._wait(lambda deadline_s: self.native.collect(out, dtype, deadline_s, at), layer)

    def _wait(self, call: Callable[[float], int], layer: int) -> None:
        status = self._again(call)
        if status != Status.OK:
            self._fail(status, layer)

    def _again(self, call: Callable[[float], int]) -> int:
        """Returns to Python now and then (INTERRUPTED), for Ctrl-C, cancel() and `tick`."""
        status = call(self.deadline_s)
        if status == Status.INTERRUPTED:
            until = time.monotonic() + self.deadline_s
            while status == Status.INTERRUPTED:
                if self._cancelled:
                    raise ZmoeError(f"step {self.step} was given up: the exchange is being closed")
                self.tick()
                status = call(until - time.monotonic())
        return status

    def _fail(self, status: int, layer: int | None) -> NoReturn:
        raise error_of(status, self.native.fault(), self.rank, self.step, layer, self.deadline_s)
