"""One rank of test_door.py: MLX's collectives over the exchange, in one graph per step."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from zmoe.errors import DivergenceError, PeerError, ZmoeError
from zmoe.exchange.base import Call
from zmoe.exchange.groups import Door
from zmoe.exchange.local import Endpoint, Exchange

WIDTH = 96
LAYERS = 2
DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def partial(rank: int, step: int, rows: int, dtype: mx.Dtype) -> mx.array:
    """Something that differs by rank, step and place; exact in no dtype."""
    grid = mx.arange(rows * WIDTH, dtype=mx.float32).reshape(rows, WIDTH)
    return mx.sin(grid * (rank + 1) + step).astype(dtype)


def shape_of(step: int) -> tuple[int, mx.Dtype]:
    """How many rows, and of what: the most take several frames."""
    return (1, 7, 900)[step % 3], DTYPES[step // 3 % 3]


def evaluate(door: Door, step: int, plan: int, *arrays: object) -> None:
    """One step, in one eval."""
    door.begin(step, plan, patient=True)
    with door.waiting():
        mx.eval(*arrays)
    door.check(step)


def sums(exchange: Exchange) -> None:
    """Sums in a graph are those of `all_reduce`, bit for bit."""
    inside: list[np.ndarray] = []
    door = Door(exchange)
    with mock.patch.object(exchange.native, "links", side_effect=AssertionError):
        others = set(range(exchange.nodes)) - {exchange.rank}
        assert set(exchange.links()) == others, "asked past the door"
    steps = range(1, 10)
    for step in steps:
        rows, dtype = shape_of(step)
        mine = partial(exchange.rank, step, rows, dtype)
        found = []
        for layer in range(LAYERS):
            total = mx.distributed.all_sum(mine, group=door.of(layer, WIDTH))
            found.append(total)
            mine = mine + 0.1 * total
        words = mx.array([exchange.rank, 0x7F800001 + step], mx.uint32)
        (words,) = mx.depends([words], [found[-1]])
        told = mx.distributed.all_gather(words, group=door.of(LAYERS, 0))
        evaluate(door, step, step, found, told)
        every = [[rank, 0x7F800001 + step] for rank in range(exchange.nodes)]
        assert told.reshape(-1, 2).tolist() == every
        inside += [np.array(array.astype(mx.float32)) for array in found]
    door.close()
    for step in steps:
        exchange.step = exchange.plan = 100 + step
        rows, dtype = shape_of(step)
        mine = partial(exchange.rank, step, rows, dtype)
        for layer in range(LAYERS):
            parts = []
            for number, part in enumerate(frames(mine), 100 * layer):
                call = Call(number, part.shape[0], WIDTH, dtype, 0)
                parts.append(np.array(exchange.all_reduce(call, part).astype(mx.float32)))
            total = mx.array(np.concatenate(parts)).astype(dtype)
            assert np.array_equal(np.array(total.astype(mx.float32)), inside.pop(0))
            mine = mine + 0.1 * total
    say(done=not inside)


def frames(array: mx.array) -> list[mx.array]:
    """`array` in parts that fit a frame each."""
    most = (1 << 16) // (WIDTH * array.itemsize)
    return [array[start : start + most] for start in range(0, array.shape[0], most)]


def refusals(exchange: Exchange) -> None:
    """Each is said by name after the eval, which comes to its end."""
    for ask in (
        lambda door: mx.distributed.all_max(mx.ones(3), group=door.of(0, 0)),
        lambda door: mx.distributed.all_sum(mx.ones(3, mx.int8), group=door.of(0, 0)),
        lambda door: mx.distributed.all_min(mx.ones(3, mx.bfloat16), group=door.of(0, 0)),
        lambda door: mx.distributed.all_sum(mx.ones(3), group=door.world),
    ):
        door = Door(exchange)
        out = ask(door)
        try:
            evaluate(door, 1, 0, out)
        except ZmoeError as problem:
            say(error=str(problem), zeros=not mx.any(out).item())
        door.close()


def forever(exchange: Exchange, scenario: str) -> None:
    """Steps of two layers, each in one eval, until something ends them."""
    door = Door(exchange)
    step = 0
    while True:
        step += 1
        mine = partial(exchange.rank, step, 1, mx.float32)
        for layer in range(LAYERS):
            mine = mx.distributed.all_sum(mine * 0.1, group=door.of(layer, WIDTH))
        if step == 3 and exchange.rank == 1:
            say(running=True)
            if scenario == "silent":
                sys.stdin.readline()
        plan = step + (scenario == "diverged" and step == 5) * exchange.rank
        evaluate(door, step, plan, mine)
        if step == 2 and exchange.rank != 1:
            say(running=True)


def main() -> None:
    rank, nodes, deadline_s, scenario = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        float(sys.argv[3]),
        sys.argv[4],
    )
    with Exchange(
        rank,
        nodes,
        session=78,
        max_payload_bytes=1 << 16,
        small_payload_bytes=WIDTH * 4,
        deadline_s=deadline_s,
        grace_s=0.2,
        wire_dtype="q8" if scenario == "sums of q8" else "auto",
        algorithm="scatter" if scenario == "scattered sums" else "auto",
    ) as exchange:
        say(data=exchange.endpoint.data_port, control=exchange.endpoint.control_port)
        ports = json.loads(sys.stdin.readline())
        exchange.connect([Endpoint("127.0.0.1", *pair) for pair in ports], 60.0)
        if scenario == "scattered sums":
            exchange.choice.scatter_from = 30_000  # full frames, and not what is left
        try:
            if "sums" in scenario:
                sums(exchange)
            elif scenario == "refusals":
                refusals(exchange)
            else:
                forever(exchange, scenario)
        except PeerError as problem:
            say(error=str(problem), rank=problem.rank, layer=problem.layer, step=problem.step)
            sys.exit(1)
        except DivergenceError as problem:
            say(error=str(problem))
            sys.exit(1)
        except KeyboardInterrupt:
            say(error="interrupted")
            sys.exit(130)


if __name__ == "__main__":
    main()
