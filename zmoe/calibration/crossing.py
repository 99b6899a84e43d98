"""What an exchange costs in MLX's graph beside itself: the way to the CPU and back.

Two processes of this machine evaluate the same graph, with an exchange in each of its layers and
without. Both run with the environment of the caller, such as MLX_METAL_FAST_SYNCH.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx

from zmoe.calibration.link import DEADLINE_S, end_with_input, others
from zmoe.cluster.hosts import Host
from zmoe.cluster.spec import RemoteOptions
from zmoe.errors import ZmoeError
from zmoe.exchange.allreduce import Exchange
from zmoe.exchange.groups import Door
from zmoe.exchange.local import join

LAYERS = 48
WIDTH = 2048  # of the one row that is exchanged, in float32
STEPS, WARM_UP = 30, 3
HERE = (Host("localhost", "127.0.0.1"),) * 2


@dataclass(frozen=True)
class Crossing:
    """Microseconds a layer, medians of the steps. exchange_us: in the exchange, where it waits for
    the other process, too. crossing_us: what else the layer takes longer than without it.
    """

    crossing_us: float
    exchange_us: float


def measure_crossing() -> Crossing:
    """As rank 0 of two. Raises LaunchError, PeerError, and ZmoeError where MLX cannot."""
    with others(HERE, RemoteOptions(), __name__) as (addresses, _, check):
        return _take_part(0, addresses, check)


def _take_part(rank: int, addresses: Sequence[str], tick: Callable[[], None]) -> Crossing:
    with join(rank, addresses, deadline_s=DEADLINE_S, tick=tick) as exchange:
        door = Door(exchange)
        try:
            return _measure(exchange, door)
        finally:
            door.close()


def _measure(exchange: Exchange, door: Door) -> Crossing:
    spans = exchange.spans.seconds
    alone, together, inside = [], [], []
    for step in range(1, WARM_UP + STEPS + 1):
        begin = time.perf_counter()
        mx.eval(_graph(None))
        alone.append(time.perf_counter() - begin)
        before, begin = spans["exchange"], time.perf_counter()
        door.begin(step, 0, True)
        with door.waiting():
            mx.eval(_graph(door))
        door.check()
        together.append(time.perf_counter() - begin)
        inside.append(spans["exchange"] - before)
    base, whole, part = (statistics.median(t[WARM_UP:]) for t in (alone, together, inside))
    return Crossing(*(1e6 * s / LAYERS for s in (max(0.0, whole - part - base), part)))


def _graph(door: Door | None) -> mx.array:
    row = mx.zeros((1, WIDTH))
    for layer in range(LAYERS):
        row = row * 0.5 + 1
        if door is not None:
            row = mx.distributed.all_sum(row, group=door.of(layer, WIDTH))
    return row


def main() -> int:
    """Rank 1, with its number and all addresses as arguments; without any, what starts it and
    prints a Crossing as JSON. Returns the exit code.
    """
    try:
        if len(sys.argv) > 1:
            end_with_input()
            _take_part(int(sys.argv[1]), sys.argv[2:], lambda: None)
        else:
            print(json.dumps(asdict(measure_crossing())))
    except ZmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
