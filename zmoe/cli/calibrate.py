"""zmoe-plan --calibrate: measure this machine, and the exchange between its processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from zmoe import __version__
from zmoe.errors import InputError, LaunchError
from zmoe.moe.exchange import join
from zmoe.planner.hardware import Machine
from zmoe.planner.links import Link
from zmoe.planner.profile import Profile, read_profile, write_profile

REPEATS = 9  # of a product; the fastest counts, as noise only slows
EVALS = 300  # of a small graph, likewise
WIDTH = 8192  # of the matrix that is read: 256 MiB of float32, beyond most caches
PRODUCT = 2048  # rows, columns and depth of the product whose rate is taken
OPERATIONS = 25  # of one layer's graph, roughly
EXCHANGES = 300
SMALL_BYTES, LARGE_BYTES = 1 << 10, 1 << 20
DEADLINE_S = 30.0
PORTS = (20_000, 32_000)


def calibrate(path: Path, *, as_json: bool) -> None:
    """Measure, write the profile to `path`, print it.

    Raises InputError naming `path` when it holds something else than a profile,
    or cannot be written.
    """
    if path.exists():
        read_profile(path)  # of what is there only a profile may be replaced
    elif not path.parent.is_dir():
        raise InputError(f"--calibrate {path}: no such folder {path.parent}")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(
            f"zmoe-plan: warning: the machine is busy (load {load:.1f} on {cores} cores): "
            "measure again when it is idle",
            file=sys.stderr,
        )
    profile = Profile(measure_machine(), measure_link())
    write_profile(path, profile)
    machine, link = profile.machine, profile.link
    if as_json:
        results = json.loads(path.read_text(encoding="utf-8"))
        environment = {"zmoe": __version__, "source": machine.source}
        print(json.dumps({"environment": environment, "results": [results]}, indent=1))
        return
    print(f"memory     {machine.memory_bytes / 2**30:.1f} GiB")
    print(f"reading    {machine.bandwidth / 1e9:.1f} GB/s")
    print(f"products   {machine.rate / 1e9:.0f} GFLOP/s")
    print(
        f"mx.eval    {1e6 * machine.sync_s:.0f} us, a layer's graph {1e6 * machine.layer_s:.0f} us"
    )
    print(f"exchange   {1e6 * link.latency_s:.0f} us, {link.bandwidth / 1e9:.2f} GB/s")
    print(f"third peer {1e6 * link.per_peer_s:.0f} us")
    print(f"written to {path}")


# ---- the machine -----------------------------------------------------------------


def measure_machine() -> Machine:
    """This machine, all of its cores (or its GPU) at once."""
    sync_s = fastest_seconds(lambda: mx.eval(mx.array(1.0) + 1), EVALS)
    return Machine(
        name=f"{platform.system()}-{platform.machine()}-{os.cpu_count()}".lower(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=WIDTH * WIDTH * _element_bytes() / fastest_seconds(_product(WIDTH, 1)),
        rate=2 * PRODUCT**3 / fastest_seconds(_product(PRODUCT, PRODUCT)),
        source=(
            f"measured by zmoe-plan --calibrate: zmoe {__version__}, mlx {version('mlx')}, "
            f"numpy {version('numpy')}"
        ),
        bandwidth_efficiency=1.0,
        rate_efficiency=1.0,
        sync_s=sync_s,
        layer_s=max(0.0, fastest_seconds(_layer_graph, EVALS) - sync_s),
    )


def fastest_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The least time of `work` over so many calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _on_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)


def _element_bytes() -> int:
    return 2 if _on_gpu() else 4


def _product(width: int, rows: int) -> Callable[[], object]:
    """A (width, width) matrix times (width, rows): MLX's in float16 on a GPU, numpy's
    in float32 on a CPU, where MLX's own are not what limits.
    """
    if _on_gpu():
        left, right = (mx.ones((width, n), mx.float16) for n in (width, rows))
        mx.eval(left, right)
        return lambda: mx.eval(left @ right)
    matrix, other = (np.ones((width, n), np.float32) for n in (width, rows))
    return lambda: matrix @ other


def _layer_graph() -> None:
    value = mx.array(1.0)
    for _ in range(OPERATIONS):
        value = value * 0.5
    mx.eval(value)


# ---- the exchange ----------------------------------------------------------------


def measure_link() -> Link:
    """The exchange among processes of this machine, over loopback."""
    two_small, two_large = _exchange_seconds(2, (SMALL_BYTES, LARGE_BYTES))
    (three_small,) = _exchange_seconds(3, (SMALL_BYTES,))
    slope = max(two_large - two_small, 1e-9) / (LARGE_BYTES - SMALL_BYTES)
    return Link(
        name="loopback",
        latency_s=two_small,
        bandwidth=1 / slope,
        source="measured by zmoe-plan --calibrate between processes of one machine",
        per_peer_s=max(0.0, three_small - two_small),
    )


def _exchange_seconds(nodes: int, sizes: Sequence[int]) -> list[float]:
    """Median seconds of one all-reduce of each size, as rank 0 sees it."""
    addresses = [f"127.0.0.1:{port}" for port in _free_port_pairs(nodes)]
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=take_part, args=(rank, addresses, sizes), daemon=True)
        for rank in range(1, nodes)
    ]
    for process in others:
        process.start()
    try:
        return take_part(0, addresses, sizes)
    finally:
        for process in others:
            process.join(DEADLINE_S)
            process.kill()


def take_part(rank: int, addresses: Sequence[str], sizes: Sequence[int]) -> list[float]:
    """One rank's part of the measurement. Raises LaunchError, PeerError."""
    medians = []
    with join(rank, addresses, deadline_s=DEADLINE_S) as exchange:
        for size in sizes:
            payload = np.ones((1, size // 4), np.float32)
            taken = []
            for _ in range(EXCHANGES):
                begin = time.perf_counter()
                exchange.all_reduce_numpy(payload)
                taken.append(time.perf_counter() - begin)
            medians.append(statistics.median(taken))
    return medians


def _free_port_pairs(count: int) -> list[int]:
    """Ports that are free, as is the one after each.

    Not from the range that systems give to outgoing connections: one of those
    could take a port before its rank, still starting, has bound it.
    """
    found: list[int] = []
    for port in random.sample(range(*PORTS, 2), (PORTS[1] - PORTS[0]) // 2):
        with socket.socket() as data, socket.socket() as control:
            try:
                data.bind(("127.0.0.1", port))
                control.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise LaunchError(f"no free ports between {PORTS[0]} and {PORTS[1]}")
