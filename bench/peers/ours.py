"""zmoe-c and zmoe: our exchange timed in C, and from MLX array to MLX array.

usage: ours.py CONTROL RANK NODES LARGEST c|mlx ALGORITHM WIRE_DTYPE CHECKSUM LINKS

CHECKSUM is on or off, LINKS plain or curve.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from worker import RUN_DEADLINE_S, Worker, timed

from zmoe.exchange.base import Call
from zmoe.exchange.keys import KeyPair
from zmoe.exchange.local import Endpoint, Exchange
from zmoe.native import Dtype, time_exchanges

SMALL = 64 * 1024  # payloads that come every token

worker = Worker()
largest = int(sys.argv[4])
mode, algorithm, wire_dtype, checksum, links = sys.argv[5:10]
wire = Dtype[wire_dtype.upper()]
worker.tolerance = 0.02 if wire is Dtype.Q8 else 0.0
exchange = Exchange(
    worker.rank,
    worker.nodes,
    session=worker.nodes,
    max_payload_bytes=wire.payload_bytes(1, largest // 4),
    small_payload_bytes=min(SMALL, largest),
    wire_dtype=wire_dtype,
    algorithm=algorithm,
    payload_checksum=checksum == "on",
    keys=KeyPair.fresh() if links == "curve" else None,
)
mine = exchange.endpoint
addresses = worker.meet(f"{mine.host}:{mine.data_port}:{mine.control_port}:{mine.key}")
parts = [address.split(":", 3) for address in addresses]  # keys may hold colons
exchange.connect(
    [Endpoint(host, int(data), int(control), key) for host, data, control, key in parts],
    RUN_DEADLINE_S,
)

exchange.calibrate()


def run_c(size: int, iterations: int, warmup: int) -> list[int]:
    """Nanoseconds of each exchange, from C buffer to C buffer."""
    chosen = exchange.choice.algorithm(wire.payload_bytes(1, size // 4))
    elapsed_us = time_exchanges(exchange, size // 4, wire, chosen, iterations, warmup)
    return [int(each) for each in np.rint(elapsed_us * 1000)]


def make_step(size: int) -> Callable[[], Any]:
    partial = mx.array(worker.payload(size))
    mx.eval(partial)
    call = Call(0, 1, size // 4, mx.float32, 0)

    def step() -> Any:
        exchange.step += 1
        total = exchange.all_reduce(call, partial)
        mx.eval(total)
        return total

    return step


worker.serve(run_c if mode == "c" else timed(worker, make_step))
