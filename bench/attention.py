"""Attention alone at long contexts: of decode steps against the speed at which the cores read
memory, of prefill against their peak of multiply-adds.

Calls take one sequence's keys and values after the other's, more than the CPU's caches hold. The
projections around the heads are so narrow that their time does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from common import environment, finish, list_of, main, parser, positive
from matmul import peak_of
from peers.products import READ_BYTES, seconds

from zmoe.kernels.paged import PagedCache, PagedStep
from zmoe.kernels.threads import ThreadPool
from zmoe.native import Isa, Status, best_isa, ffi, lib
from zmoe.topology.cores import usable_cores

BLOCK, WIDTH = 64, 16  # positions of a block of keys; hidden size
KINDS = ("bf16", "8bit", "latent")


def arguments() -> argparse.Namespace:
    made = parser((__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--contexts", type=list_of(positive), default=[4096, 16384, 32768], help="tokens before")
    add("--rows", type=list_of(positive), default=[1, 128], help="1: a decode step; default 1,128")
    add("--kinds", type=list_of(str), default=list(KINDS), help=f"of {', '.join(KINDS)}")
    add("--heads", type=positive, default=32, help="default 32")
    add("--kv-heads", type=positive, default=4, help="default 4; a latent cache has one")
    add("--head-dim", type=positive, default=128, help="default 128; latent: 512 and 64")
    add("--cores", type=list_of(positive), default=[1, 2], help="how many at a time")
    add("--isa", default=best_isa().name, help="the instruction set to use")
    add("--megabytes", type=positive, default=256, help="of all keys and values, at least")
    add("--rounds", type=positive, default=5, help="over all of it; default 5")
    add("--budget", type=float, default=0.2, help="seconds for one figure of a round")
    options = made.parse_args()
    if unknown := [name for name in options.kinds if name not in KINDS]:
        made.error(f"unknown kind {unknown[0]}: expected {', '.join(KINDS)}")
    if options.isa not in Isa.__members__ or not Isa[options.isa].supported:
        made.error(f"--isa {options.isa}: this CPU does not have it")
    if options.heads % options.kv_heads:
        made.error("--kv-heads must divide --heads")
    if max(options.cores) > len(usable_cores()):
        made.error(f"--cores {max(options.cores)}: only {len(usable_cores())} are usable")
    return options


class Layer:
    """Attention of one kind behind projections from WIDTH, all of whose weights are noise."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        self.kind, self.heads = kind, options.heads
        self._keep: list[Any] = []
        self.is_latent = kind == "latent"
        self.kv_heads = 1 if self.is_latent else options.kv_heads
        self.head_dim = 576 if self.is_latent else options.head_dim
        self.raw = self._latent() if self.is_latent else self._usual()
        self.run = lib.zmoe_latent_attention_step if self.is_latent else lib.zmoe_attention_step

    def scratch(self, threads: int) -> int:
        """Bytes of working memory of a call."""
        of = lib.zmoe_latent_attention_scratch if self.is_latent else lib.zmoe_attention_scratch
        return int(of(self.raw, threads))

    def cache(self, blocks: int) -> PagedCache:
        """An empty cache of so many blocks, of random numbers."""
        made = PagedCache(self.kv_heads, self.head_dim, mx.bfloat16, is_latent=self.is_latent)
        if self.kind == "8bit":
            made.quantize(8)
        made.allocate(blocks)
        draw = np.random.default_rng(1)
        for memory in made.memory.values():
            flat = memory.reshape(-1)
            if self.kind == "8bit":
                flat[:] = draw.integers(0, 256, flat.size, np.uint8)
                scales = memory[..., BLOCK * self.head_dim :]
                scales[:] = np.full(BLOCK, 1 / 127, np.float32).view(np.uint8)
            else:
                flat[:] = draw.integers(0x3D00, 0x3F80, flat.size, np.uint16)  # below 1
        return made

    def flops(self, rows: int, context: int) -> float:
        """Of scores and sums, of what causal rows see."""
        seen = rows * context + rows * (rows + 1) / 2
        dims = self.head_dim + (512 if self.is_latent else self.head_dim)
        return 2.0 * seen * self.heads * dims

    def _weights(self, *shapes: tuple[int, int], count: int = 1) -> Any:
        """`count` times matrices of bf16 (out_features, in_features): a zmoe_weight[]."""
        made = ffi.new("zmoe_weight[]", len(shapes) * count)
        for i, weight in enumerate(made):
            shape = shapes[i % len(shapes)]
            data = (np.random.default_rng(i).normal(size=shape).astype(np.float32) / 4).view("u4")
            bits = (data >> 16).astype(np.uint16)
            self._keep.append(bits)
            weight.data, weight.format = ffi.from_buffer("uint8_t[]", bits), lib.ZMOE_FORMAT_BF16
            weight.out_features, weight.in_features = shape
        self._keep.append(made)
        return made

    def _usual(self) -> Any:
        raw, wide, narrow = ffi.new("zmoe_attention *"), self.heads, self.kv_heads
        raw.heads, raw.kv_heads, raw.head_dim = wide, narrow, self.head_dim
        raw.projections = self._weights(((wide + 2 * narrow) * self.head_dim, WIDTH))
        raw.n_projections, raw.output = 1, self._weights((WIDTH, wide * self.head_dim))
        raw.scale, raw.dtype = self.head_dim**-0.5, lib.ZMOE_BF16
        return raw

    def _latent(self) -> Any:
        raw, heads = ffi.new("zmoe_latent_attention *"), self.heads
        raw.heads, raw.latent_dim, raw.rope_dims = heads, 512, 64
        raw.key_dim, raw.value_dim = 16, 16
        raw.query = self._weights((heads * 80, WIDTH))
        raw.down = self._weights((576, WIDTH))
        raw.key_heads = self._weights((512, 16), count=heads)
        raw.value_heads = self._weights((16, 512), count=heads)
        raw.output = self._weights((WIDTH, heads * 16))
        raw.scale, raw.dtype = 0.1, lib.ZMOE_BF16
        return raw


class Case:
    """One figure's calls: `rows` rows after `context` positions, in one layer after the other."""

    def __init__(
        self, layer: Layer, cache: PagedCache, rows: int, context: int, pool: ThreadPool
    ) -> None:
        self.layer, self.cache, self.rows, self.pool = layer, cache, rows, pool
        pool.reserve(layer.scratch(pool.threads))
        each = (context + rows - 1) // BLOCK + 1
        self.sequences = cache.raw.blocks // each
        order = np.random.default_rng(2).permutation(each * self.sequences).astype(np.uint32)
        self.steps = []
        for table in order.reshape(self.sequences, each):
            step = PagedStep(())
            step.begin([(context, rows, table, None, None)])
            self.steps.append((step, table))
        self.angles = np.zeros((context + rows, 32), np.float32)
        self.h = np.zeros((rows, WIDTH), np.float32)
        self.turn = 0
        self.bytes = each * cache.bytes_per_block
        self.flops = layer.flops(rows, context)

    def __call__(self) -> None:
        step, _ = self.steps[self.turn % self.sequences]
        self.turn += 1
        angles = ffi.from_buffer("float[]", self.angles)
        status = self.layer.run(
            self.pool.handle,
            self.layer.raw,
            self.cache.raw,
            step.raw,
            step.count,
            angles,
            angles,
            ffi.from_buffer("float[]", self.h),
            self.pool.precision,
        )
        assert status == Status.OK, Status(status).name


def measure(options: argparse.Namespace, usable: list[int]) -> list[dict[str, Any]]:
    """Medians over the rounds, each of which goes through all cases, on the first of `usable`."""
    found: defaultdict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    about: dict[tuple[Any, ...], tuple[int, float]] = {}
    memory = np.ones(READ_BYTES, np.uint8)
    peak = peak_of(options.isa.replace("512_BF16", "512").replace("512_VNNI", "512"))
    for turn in range(options.rounds):
        for kind in options.kinds:
            layer = Layer(kind, options)
            cache = layer.cache(blocks_for(layer, options))
            for cores in options.cores:
                print(f"round {turn + 1}, {kind}, {cores} cores", file=sys.stderr)
                os.sched_setaffinity(0, usable[:cores])
                pool = ThreadPool(usable[:cores], isa=Isa[options.isa])
                for rows in options.rows:
                    for context in options.contexts:
                        case = Case(layer, cache, rows, context, pool)
                        took = seconds(case, options.budget)
                        limit = seconds(partial(pool.read, memory), options.budget / 2)
                        key = (cores, kind, rows, context)
                        found[key].append((took, READ_BYTES / limit))
                        about[key] = case.bytes, case.flops
                pool.close()
    return [row(key, figures, *about[key], peak) for key, figures in found.items()]


def blocks_for(layer: Layer, options: argparse.Namespace) -> int:
    """Of a cache that holds the longest sequence, and at least --megabytes."""
    longest = (max(options.contexts) + max(options.rows)) // BLOCK + 1
    probe = PagedCache(layer.kv_heads, layer.head_dim, mx.bfloat16, is_latent=layer.is_latent)
    if layer.kind == "8bit":
        probe.quantize(8)
    return max(longest, (options.megabytes << 20) // probe.bytes_per_block)


def row(
    key: tuple[Any, ...],
    figures: list[tuple[float, float]],
    size: int,
    flops: float,
    peak: float | None,
) -> dict[str, Any]:
    made = dict(zip(("cores", "kind", "rows", "context"), key))
    took = statistics.median(each for each, _ in figures)
    spread = max(each for each, _ in figures) - min(each for each, _ in figures)
    made["us"], made["spread"] = round(took * 1e6, 1), round(spread / took, 3)
    made["gb_per_s"] = round(size / took / 1e9, 2)
    made["of_read_bandwidth"] = round(
        statistics.median(size / each / limit for each, limit in figures), 3
    )
    made["gflop_per_s"] = round(flops / took / 1e9, 1)
    if peak is not None:
        made["of_peak"] = round(flops / took / 1e9 / (peak * key[0]), 3)
    return made


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = {
        "cores": "cores",
        "kind": "kind",
        "rows": "rows",
        "context": "context",
        "us": "us",
        "spread": "spread",
        "gb_per_s": "GB/s",
        "of_read_bandwidth": "of memory",
        "gflop_per_s": "GFLOP/s",
        "of_peak": "of peak",
    }
    table = Table(*titles.values())
    for each in report["results"]:
        table.add_row(*(str(each.get(name, "")) for name in titles))
    Console().print(table)


def benchmark() -> int:
    options, usable = arguments(), usable_cores()
    try:
        results = measure(options, usable)
    finally:
        os.sched_setaffinity(0, usable)
    finish(options, {"environment": environment(), "results": results}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
