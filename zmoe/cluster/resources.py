"""What this machine offers a run: its identity, its memory, and its speed of reading memory."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from zmoe.config import EngineConfig
from zmoe.kernels.threads import ThreadPool, is_native
from zmoe.placement.estimate import NodeResources
from zmoe.topology.cgroups import memory_limit
from zmoe.topology.cores import pool_cores

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MEMORY = Path("/proc/meminfo")
_READ_BYTES = 64 << 20  # more than most caches hold
_READ_S = 0.02
_STEP = 1.1  # speeds are rounded to powers of it, so that like machines are equal


def resources_of(config: EngineConfig, limit: int | None, measure: bool = True) -> NodeResources:
    """The resources of this node, of which it may take `limit` bytes (None: no limit).

    Its speed is 0 unless it shall `measure` it, which takes some 50 ms.
    """
    speed = read_speed(config) if measure else 0
    return NodeResources(machine_id(), machine_memory(is_native(config)), limit, speed)


def machine_id() -> str:
    """An identifier that all processes of this machine share, and those of no other machine."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"{uuid.getnode():012x}"


def machine_memory(mapped: bool) -> int:
    """Bytes that all nodes of this machine may take together.

    `mapped`: all of its memory, since mapped weights leave it when others need
    it; else what is available now, or what Metal recommends.
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended is not None:
        return int(recommended)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not mapped:
        memory = min(memory, _available() or memory)
    return min(memory, memory_limit() or memory)


def _available() -> int | None:
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kilobytes = fields.get("MemAvailable", "").split()
    return int(kilobytes[0]) << 10 if kilobytes else None


def read_speed(config: EngineConfig) -> int:
    """GB/s at which this process's cores, or its GPU, read memory; rounded to steps of 10%."""
    best = max(_speeds(config))
    return max(1, round(_STEP ** round(math.log(best, _STEP))))


def _speeds(config: EngineConfig) -> list[float]:
    """GB/s of a few passes over memory."""
    if is_native(config):
        data = np.empty(_READ_BYTES, np.uint8)
        data.fill(1)  # memory that nobody has written is not there
        pool = ThreadPool(pool_cores())
        try:
            return _passes(lambda: pool.read(data))
        finally:
            pool.close()
    array = mx.ones(_READ_BYTES // 4, mx.float32)
    mx.eval(array)
    return _passes(lambda: mx.eval(mx.sum(array)))


def _passes(read: Callable[[], None]) -> list[float]:
    read()
    speeds: list[float] = []
    end = time.perf_counter() + _READ_S
    while not speeds or time.perf_counter() < end:
        start = time.perf_counter()
        read()
        speeds.append(_READ_BYTES / (time.perf_counter() - start) / 1e9)
    return speeds


def peak_memory() -> int:
    """This process's peak resident memory in bytes, MLX's peak where that is not resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = peak if sys.platform == "darwin" else peak * 1024
    return max(resident, mx.get_peak_memory())
