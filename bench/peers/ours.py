"""zmoe-c and zmoe: our exchange timed in C, and from MLX array to MLX array.

usage: ours.py CONTROL RANK NODES LARGEST c|mlx
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from worker import RUN_DEADLINE_S, Worker, timed

from zmoe.moe.exchange import Endpoint, Exchange
from zmoe.native import Algorithm, Dtype, time_exchanges

SMALL = 64 * 1024  # payloads that come every token

worker = Worker()
largest, mode = int(sys.argv[4]), sys.argv[5]
exchange = Exchange(
    worker.rank,
    worker.nodes,
    session=worker.nodes,
    max_payload_bytes=largest,
    small_payload_bytes=min(SMALL, largest),
)
mine = exchange.endpoint
addresses = worker.meet(f"{mine.host}:{mine.data_port}:{mine.control_port}")
parts = [address.split(":") for address in addresses]
exchange.connect(
    [Endpoint(host, int(data), int(control)) for host, data, control in parts], RUN_DEADLINE_S
)


def run_c(size: int, iterations: int, warmup: int) -> list[int]:
    """Nanoseconds of each exchange, from C buffer to C buffer."""
    elapsed_us = time_exchanges(
        exchange, size // 4, Dtype.F32, Algorithm.DIRECT, iterations, warmup
    )
    return [int(each) for each in np.rint(elapsed_us * 1000)]


def make_step(size: int) -> Callable[[], Any]:
    partial = mx.array(worker.payload(size))
    mx.eval(partial)
    shape = (1, size // 4)

    def step() -> Any:
        exchange.step += 1
        total = exchange.all_reduce(0, partial, shape, mx.float32, 0)
        mx.eval(total)
        return total

    return step


worker.serve(run_c if mode == "c" else timed(worker, make_step))
