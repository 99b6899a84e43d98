"""This machine as the planner's tables describe one, by measurement."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from zmoe import __version__
from zmoe.calibration.crossing import measure_crossing
from zmoe.calibration.matmuls import MOST_NODES, Matmuls, Progress
from zmoe.calibration.scratch import scratch
from zmoe.calibration.steps import Steps
from zmoe.config import POLICIES, EngineConfig
from zmoe.errors import ZmoeError
from zmoe.kernels.threads import is_native
from zmoe.perf.hardware import Machine
from zmoe.perf.measured import MatmulRate
from zmoe.topology.cores import usable_cores

REPEATS = 9  # of a matmul; the fastest counts, as noise only slows
EVALS = 300  # of a small graph, likewise
WIDTH = 8192  # of the matrix that a GPU reads: beyond its caches
MATMUL = 2048  # rows, columns and depth of the matmul whose rate is taken
OPERATIONS = 25  # of one layer's graph, roughly
SCRATCH_BYTES = 2_000_000_000  # more than what Matmuls and Steps write
REFERENCE = "bf16"  # whose rates stand for formats that are not measured


def measure_machine(progress: Progress) -> Machine:
    """All of it: cores and their kernels where these compute, else what MLX computes on."""
    made = Machine(
        name=f"{platform.system()}-{platform.machine()}-{os.cpu_count()}".lower(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=1.0,
        rate=1.0,
        source=f"measured by zmoe-plan --calibrate: zmoe {__version__}, mlx {version('mlx')}",
        bandwidth_efficiency=1.0,
        rate_efficiency=1.0,
    )
    return _of_kernels(made, progress) if is_native(EngineConfig()) else _of_mlx(made, progress)


def _of_kernels(made: Machine, progress: Progress) -> Machine:
    progress(f"this takes some minutes, and up to {SCRATCH_BYTES / 1e9:.0f} GB of temporary space")
    with scratch(SCRATCH_BYTES) as folder, Matmuls(folder) as matmuls:
        steps = Steps(folder)
        for nodes in range(1, MOST_NODES + 1):
            progress(f"matmuls, round {nodes} of {MOST_NODES}")
            matmuls.measure()
            steps.measure(nodes, progress)
        for nodes in range(1, MOST_NODES + 1):
            steps.measure(nodes, progress, POLICIES[:1])  # the others take their step_s from it
        rates = matmuls.rates()
        whole, cores = _whole(rates), len(usable_cores())
        made = replace(made, bandwidth=whole.dense, rate=whole.many, cores=cores, rates=rates)
        return steps.add_to(made)


def _whole(rates: tuple[MatmulRate, ...]) -> MatmulRate:
    """Of one process on all cores."""
    known = [rate for rate in rates if rate.format == REFERENCE and rate.nodes == 1]
    return max(known, key=lambda rate: rate.threads)


def _of_mlx(made: Machine, progress: Progress) -> Machine:
    progress("matmuls and graphs of MLX")
    sync_s = fastest_seconds(lambda: mx.eval(mx.array(1.0) + 1), EVALS)
    return replace(
        made,
        bandwidth=WIDTH * WIDTH * 2 / fastest_seconds(_matmul(WIDTH, 1)),
        rate=2 * MATMUL**3 / fastest_seconds(_matmul(MATMUL, MATMUL)),
        sync_s=sync_s,
        crossing_s=_crossing_s(progress),
        layer_s=max(0.0, fastest_seconds(_layer_graph, EVALS) - sync_s),
    )


def _crossing_s(progress: Progress) -> float | None:
    """Seconds of a crossing; None where runs, too, evaluate their layers one by one."""
    progress("the crossing from MLX's graph to the CPU")
    try:
        return measure_crossing().crossing_us * 1e-6
    except ZmoeError as error:
        progress(f"no exchange in MLX's graph: {error}")
        return None


def fastest_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The least time of `work` over so many calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _matmul(width: int, rows: int) -> Callable[[], object]:
    """A (width, width) matrix times (width, rows) in float16."""
    left, right = (mx.ones((width, n), mx.float16) for n in (width, rows))
    mx.eval(left, right)
    return lambda: mx.eval(left @ right)


def _layer_graph() -> None:
    value = mx.array(1.0)
    for _ in range(OPERATIONS):
        value = value * 0.5
    mx.eval(value)
