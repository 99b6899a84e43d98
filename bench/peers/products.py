"""One linear layer of each format, by our kernels, MLX and numpy, on the cores that it is given.

Reads one JSON object from its arguments and prints one line of JSON a result;
bench/matmul.py starts it once per number of cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zmoe.compute.linear import Head, make_native
from zmoe.compute.team import Team
from zmoe.native import Precision

READ_BYTES = 512 << 20
MODES = {
    "f32": (mx.float32, None),
    "f16": (mx.float16, None),
    "bf16": (mx.bfloat16, None),
    "affine-4-g32": (mx.bfloat16, ("affine", 4, 32)),
    "affine-4-g64": (mx.bfloat16, ("affine", 4, 64)),
    "affine-4-g128": (mx.bfloat16, ("affine", 4, 128)),
    "affine-8-g64": (mx.bfloat16, ("affine", 8, 64)),
    "affine-6-g64": (mx.bfloat16, ("affine", 6, 64)),
    "mxfp4": (mx.bfloat16, ("mxfp4", 4, 32)),
    "mxfp8": (mx.bfloat16, ("mxfp8", 8, 32)),
    "nvfp4": (mx.bfloat16, ("nvfp4", 4, 16)),
}


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def made(name: str, outs: int, ins: int) -> Any:
    """A linear layer of the format `name`, (outs, ins); a block of numbers repeats."""
    dtype, mode = MODES[name]
    layer: Any = nn.Linear(ins, 128, bias=False)
    layer.set_dtype(dtype)
    if mode is not None:
        layer = nn.QuantizedLinear.from_linear(layer, mode[2], mode[1], mode=mode[0])
    for part, array in layer.parameters().items():
        layer[part] = mx.tile(array, (outs // 128, 1))
    mx.eval(layer.parameters())
    return layer


def weight_bytes(layer: Any) -> int:
    return sum(array.nbytes for array in layer.parameters().values())


def seconds(call: Callable[[], object], budget_s: float) -> float:
    """The median time of a call, of at least three and as many as `budget_s` allows."""
    call()
    times: list[float] = []
    until = time.perf_counter() + budget_s
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(options: dict[str, Any]) -> None:
    cores, budget = options["cores"], options["budget_s"]
    memory = np.ones(READ_BYTES, np.uint8)
    reader = Team(cores)

    def report(**row: Any) -> None:
        row["cores"] = len(cores)
        print(json.dumps(row), flush=True)

    for rows in options["rows"]:
        for name in options["formats"]:
            _, mode = MODES[name]
            ins = options["ins"]
            per_row = weight_bytes(made(name, 128, ins)) / 128
            wanted = options["one_row_bytes"] if rows == 1 else options["many_row_bytes"]
            outs = max(1, int(wanted / per_row / 128)) * 128
            common = {"format": name, "rows": rows, "outs": outs, "ins": ins}
            flops = 2 * rows * outs * ins
            x = mx.random.normal((rows, ins)).astype(mx.bfloat16 if name != "f32" else mx.float32)
            mx.eval(x)
            # The limit right before and after, since the machine's load changes.
            limits = [seconds(lambda: reader.read(memory), budget / 4)]
            ways = [("zmoe", Precision.EXACT)]
            if mode is not None and mode[1] in (4, 8):
                ways.append(("zmoe-int8", Precision.INT8))
            results = []
            for way, precision in ways:
                layer = made(name, outs, ins)
                size = weight_bytes(layer)
                make_native(Model(layer), Team(cores, precision), {}, Head(mx.float32))
                results.append((way, seconds(lambda layer=layer: layer(x), budget)))
            if "mlx" in options["peers"]:
                layer = made(name, outs, ins)
                results.append(("mlx", seconds(lambda layer=layer: mx.eval(layer(x)), 0)))
            if "numpy" in options["peers"]:
                matrix = np.ones((outs, ins), np.float32)
                vector = np.ones((rows, ins), np.float32)
                results.append(("numpy-f32", seconds(lambda: vector @ matrix.T, budget)))
            limits.append(seconds(lambda: reader.read(memory), budget / 4))
            limit = READ_BYTES / statistics.mean(limits) / 1e9
            for way, took in results:
                read = size if way != "numpy-f32" else outs * ins * 4
                report(
                    **common,
                    by=way,
                    us=round(took * 1e6, 1),
                    gb_per_s=round(read / took / 1e9, 2),
                    read_gb_per_s=round(limit, 2),
                    gflop_per_s=round(flops / took / 1e9, 1),
                )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, given["cores"])
    measure(given)
