"""mlx-ring: all_sum of mx.distributed's ring backend, one evaluation a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from worker import Worker, timed

worker = Worker()
group = mx.distributed.init(strict=True, backend="ring")
worker.meet("-")  # the ports are in the host file that the parent wrote


def make_step(size: int) -> Callable[[], Any]:
    mine = mx.array(worker.payload(size))

    def step() -> Any:
        total = mx.distributed.all_sum(mine, group=group)
        mx.eval(total)
        return total

    return step


worker.serve(timed(worker, make_step))
