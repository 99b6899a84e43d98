"""A program that knows nothing of zmoe, for test_launch_command.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import mlx.core as mx


def exchange(group: mx.distributed.Group) -> None:
    """What the exchange does, over the world and over groups like it."""
    rank, size = group.rank(), group.size()
    words = mx.array([rank, 0x7F800001], mx.uint32)
    for where in (group, group.split(0), group.split(7).split(3)):
        for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.int32):
            total = mx.distributed.all_sum(mx.arange(5).astype(dtype) + rank, group=where)
            assert total.tolist() == [size * i + size * (size - 1) // 2 for i in range(5)]
        gathered = mx.distributed.all_gather(words, group=where)
        assert gathered.tolist() == [word for r in range(size) for word in (r, 0x7F800001)]
    for kind in (mx.uint8, mx.int16, mx.int64, mx.float32):
        mine = mx.array([rank + 1, 250, 3 - rank]).astype(kind)
        top, bottom = mx.distributed.all_max(mine), mx.distributed.all_min(mine)
        assert top.tolist() == [size, 250, 3] and bottom.tolist() == [1, 250, 4 - size]
        total = mx.distributed.all_sum(mine)
        assert total.dtype == kind and total[0].item() == size * (size + 1) // 2
    halves = mx.array([rank, 2], mx.uint8)
    assert mx.distributed.all_gather(halves).tolist() == [b for r in range(size) for b in (r, 2)]
    large = mx.arange(3 << 20, dtype=mx.float32)  # 12 MiB
    assert mx.array_equal(mx.distributed.all_sum(large), size * large)


def generate(folder: str, prompt: list[int], tokens: int) -> list[int]:
    """mlx-lm's own tensor parallelism."""
    from mlx_lm.generate import generate_step, generation_stream
    from mlx_lm.utils import sharded_load

    model, _ = sharded_load(folder, tensor_group=mx.distributed.init())
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    found = [int(token) for token, _ in steps]
    mx.synchronize(generation_stream)  # which computes one token more, beside other streams
    return found


def main() -> None:
    group = mx.distributed.init()
    scenario, *given = sys.argv[1:]
    rank = group.rank()
    if scenario == "generate":
        exchange(group)
        folder, prompt, count = given
        tokens = generate(folder, json.loads(prompt), int(count))
        print(json.dumps({"tokens": tokens, "size": group.size(), "input": sys.stdin.read()}))
    elif scenario == "refused":
        mx.eval(mx.distributed.send(mx.ones(3), 1 - rank))
    elif scenario == "apart":
        mx.eval(mx.distributed.all_sum(mx.ones(3), group=group.split(rank)))
    elif rank == 1 and scenario == "exit":
        sys.exit(3)
    elif rank == int(given[0] if given else 2) and scenario == "early":
        return
    elif rank == 1 and scenario == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif rank == 1 and scenario == "waits":
        print("waiting", flush=True)
        time.sleep(3600)
    elif rank == 0 and scenario == "raises":
        raise ValueError("of the program's own")
    try:
        print(mx.distributed.all_sum(mx.ones(3)).tolist())
    except KeyboardInterrupt:
        print("interrupted", flush=True)


if __name__ == "__main__":
    main()
