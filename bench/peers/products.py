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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zmoe.kernels.linear import Head, make_native
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Isa, Precision

READ_BYTES = 512 << 20
MLX_ROWS = 128  # it takes minutes for more
BLOCK = 128  # rows of a weight that repeat
MODES = {
    "f32": (mx.float32, None),
    "f16": (mx.float16, None),
    "bf16": (mx.bfloat16, None),
    "affine-4-g32": (mx.bfloat16, ("affine", 4, 32)),
    "affine-4-g64": (mx.bfloat16, ("affine", 4, 64)),
    "affine-4-g128": (mx.bfloat16, ("affine", 4, 128)),
    "affine-8-g64": (mx.bfloat16, ("affine", 8, 64)),
    "affine-2-g64": (mx.bfloat16, ("affine", 2, 64)),
    "affine-3-g64": (mx.bfloat16, ("affine", 3, 64)),
    "affine-5-g64": (mx.bfloat16, ("affine", 5, 64)),
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
    layer: Any = nn.Linear(ins, BLOCK, bias=False)
    layer.set_dtype(dtype)
    if mode is not None:
        layer = nn.QuantizedLinear.from_linear(layer, mode[2], mode[1], mode=mode[0])
    for part, array in layer.parameters().items():
        layer[part] = mx.tile(array, (outs // BLOCK, 1))
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


class Bench:
    """Measures on the cores of this process, by the options of bench/matmul.py."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.cores = options, options["cores"]
        self._memory = np.ones(READ_BYTES, np.uint8)
        self._isa = Isa[options["isa"]]
        self._reader = ThreadPool(self.cores)

    def run(self) -> Iterator[dict[str, Any]]:
        """A row for each number of rows, format and way."""
        for rows in self.options["rows"]:
            for name in self.options["formats"]:
                yield from self.format(name, rows)

    def format(self, name: str, rows: int) -> Iterator[dict[str, Any]]:
        """The rows of one format."""
        ins = self.options["ins"]
        wanted = self.options["one_row_bytes" if rows == 1 else "many_row_bytes"]
        fitting = max(1, int(wanted / weight_bytes(made(name, BLOCK, ins)))) * BLOCK
        outs = self.options["outs"] or fitting
        common = {"format": name, "rows": rows, "outs": outs, "ins": ins, "cores": len(self.cores)}
        for way, size, call, budget in self.ways(name, rows, outs, ins):
            # The limit right before and after, since the machine's load changes.
            before = self.read_seconds()
            took = seconds(call, budget)
            limit = 2 * READ_BYTES / (before + self.read_seconds()) / 1e9
            yield {
                **common,
                "by": way,
                "us": round(took * 1e6, 1),
                "gb_per_s": round(size / took / 1e9, 2),
                "read_gb_per_s": round(limit, 2),
                "gflop_per_s": round(2 * rows * outs * ins / took / 1e9, 1),
            }

    def read_seconds(self) -> float:
        return seconds(lambda: self._reader.read(self._memory), self.options["budget_s"] / 4)

    def ways(
        self, name: str, rows: int, outs: int, ins: int
    ) -> Iterator[tuple[str, int, Callable[[], object], float]]:
        """Name, bytes of the weight, the product to time, and seconds to spend on it."""
        _, mode = MODES[name]
        budget, peers = self.options["budget_s"], self.options["peers"]
        x = mx.random.normal((rows, ins)).astype(mx.bfloat16 if name != "f32" else mx.float32)
        mx.eval(x)
        precisions = [("zmoe", Precision.EXACT)]
        if mode is not None and mode[0] in ("affine", "mxfp4") and mode[1] in (4, 8):
            precisions.append(("zmoe-int8", Precision.INT8))
        for way, precision in precisions:
            layer = made(name, outs, ins)
            size = weight_bytes(layer)
            pool = ThreadPool(self.cores, precision, self._isa)
            make_native(Model(layer), pool, {}, Head(mx.float32))
            yield way, size, partial(layer, x), budget
        if "mlx" in peers and rows <= MLX_ROWS:
            plain = made(name, outs, ins)
            yield "mlx", weight_bytes(plain), lambda: mx.eval(plain(x)), 0
        if "numpy" in peers:
            matrix, vectors = np.ones((outs, ins), np.float32), np.ones((rows, ins), np.float32)
            yield "numpy-f32", matrix.nbytes, lambda: vectors @ matrix.T, budget


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, given["cores"])
    for found in Bench(given).run():
        print(json.dumps(found), flush=True)
