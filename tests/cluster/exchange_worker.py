"""One rank of test_exchange_processes.py: listen, learn the others' ports, run a scenario."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import mlx.core as mx

from zmoe.errors import PeerError
from zmoe.exchange.base import Call
from zmoe.exchange.local import Endpoint, Exchange

WIDTH = 96


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def partial(rank: int, step: int, rows: int) -> mx.array:
    """Something that differs by rank, step and place; exact in no dtype."""
    grid = mx.arange(rows * WIDTH, dtype=mx.float32).reshape(rows, WIDTH)
    return mx.sin(grid * (rank + 1) + step)


def sums(exchange: Exchange, count: int, deadline_s: float) -> str:
    """Digest of `count` sums, each fed back into the next partial; two layers a step.

    Once all run, rank 0 waits for at most `deadline_s`.
    """
    digest = hashlib.sha256()
    carried = mx.zeros((1, WIDTH), mx.bfloat16)
    for step in range(count):
        exchange.step = step
        rows = 7 if step == 0 else 1
        for layer in range(2):
            mine = partial(exchange.rank, step, rows) + carried[:1]
            nothing = (step + layer + exchange.rank) % 5 == 0
            total = exchange.all_reduce(
                Call(layer, rows, WIDTH, mx.bfloat16, step), None if nothing else mine
            )
            carried = total * 0.1
            mx.eval(carried)
            digest.update(memoryview(total).cast("B"))  # type: ignore[arg-type]
        if step == 0:
            say(running=True)
            if exchange.rank == 0:
                exchange.deadline_s = deadline_s
    return digest.hexdigest()


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
        session=77,
        max_payload_bytes=1 << 16,
        small_payload_bytes=WIDTH * 2,
        deadline_s=3600.0,
        grace_s=0.2,
    ) as exchange:
        say(data=exchange.endpoint.data_port, control=exchange.endpoint.control_port)
        ports = json.loads(sys.stdin.readline())
        exchange.connect([Endpoint("127.0.0.1", *pair) for pair in ports], 60.0)
        try:
            if scenario == "silent" and rank == 1:
                while exchange.stats["frames_received"] == 0:
                    exchange.service()  # until rank 0 has published, and hence waits for us
                say(running=True)
                sys.stdin.readline()
            else:
                count = 50 if scenario == "sums" else 10**9
                say(digest=sums(exchange, count, deadline_s), stats=exchange.stats)
        except PeerError as problem:
            say(error=str(problem), rank=problem.rank, layer=problem.layer, step=problem.step)
            sys.exit(1)
        except KeyboardInterrupt:
            say(error="interrupted")
            sys.exit(130)


if __name__ == "__main__":
    main()
