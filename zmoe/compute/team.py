"""A node's threads, and what its products are to be computed with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from zmoe.config import EngineConfig
from zmoe.errors import InputError, ZmoeError
from zmoe.native import Isa, Precision, Status, best_isa, ffi, lib

if TYPE_CHECKING:
    from zmoe.native import CData

SPIN_US = 200  # a helper looks for work this long before it sleeps
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class Team:
    """The threads that share a node's products, the caller being the first.

    `cores` are where they stay, one thread each; the caller itself is never
    pinned. `precision` is that of quantised products. Used by one thread at a
    time; ends its threads with close(), or when it is collected.
    """

    def __init__(
        self,
        cores: Sequence[int] | int = 1,
        precision: Precision = Precision.EXACT,
        isa: Isa | None = None,
    ) -> None:
        threads = cores if isinstance(cores, int) else len(cores)
        self.isa = best_isa() if isa is None else isa
        self.precision = precision
        self.threads = threads
        pinned = ffi.NULL if isinstance(cores, int) else ffi.new("int32_t[]", list(cores))
        out = ffi.new("zmoe_team **")
        status = lib.zmoe_team_create(threads, pinned, SPIN_US, self.isa, out)
        if status != Status.OK:
            raise ZmoeError(f"cannot start {threads} threads for {self.isa.name}")
        self.handle: CData = ffi.gc(out[0], lib.zmoe_team_destroy)

    def reserve(self, size: int) -> None:
        """Make room for calls that need `size` bytes of working memory; while loading only."""
        if lib.zmoe_team_reserve(self.handle, size) != Status.OK:
            raise MemoryError(f"{size} bytes of working memory")

    @property
    def products_s(self) -> float:
        """Seconds that its products have taken, all told."""
        return lib.zmoe_team_products_ns(self.handle) * 1e-9

    def read(self, buffer: object) -> None:
        """Read `buffer` and do nothing with it: what the memory allows, for benchmarks."""
        data = ffi.from_buffer("uint8_t[]", buffer)
        lib.zmoe_bench_read(self.handle, data, len(data))

    def close(self) -> None:
        """End the threads; idempotent."""
        ffi.release(self.handle)


def is_native(config: EngineConfig) -> bool:
    """Whether the kernels compute the large products; `auto` is yes on a CPU."""
    if config.compute == "auto":
        return bool(mx.default_device() == mx.Device(mx.cpu))
    return config.compute == "native"


def make_team(config: EngineConfig, isa: str) -> Team:
    """The team of this process, on all of its cores."""
    precision = Precision.INT8 if config.activations == "int8" else Precision.EXACT
    return Team(usable_cores(), precision, Isa[isa])


def check_isa(name: str) -> str:
    """`name` if it is an instruction set that this CPU has; InputError if not."""
    if name not in Isa.__members__ or not Isa[name].supported:
        raise InputError(f"instruction set {name!r} is not one that this CPU has")
    return name


def best_isa_name() -> str:
    """The instruction set that this machine's kernels would use."""
    return best_isa().name


def common_isa(names: Sequence[str]) -> str:
    """The best instruction set that all of several machines have; InputError for an unknown one."""
    for order in (
        (Isa.AVX512_BF16, Isa.AVX512, Isa.AVX2),
        (Isa.NEON_BF16, Isa.NEON_DOT, Isa.NEON),
    ):
        if all(name in [isa.name for isa in order] for name in names):
            return max((Isa[name] for name in names), key=order.index).name
    unknown = [name for name in names if name not in Isa.__members__]
    if unknown:
        raise InputError(f"instruction set {unknown[0]!r} is not known")
    return Isa.GENERIC.name


def usable_cores() -> list[int]:
    """The cores that this process may use, one of each that share an execution unit."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    allowed = os.sched_getaffinity(0)
    chosen: list[int] = []
    taken: set[int] = set()
    for core in sorted(allowed):
        if core not in taken:
            chosen.append(core)
            taken |= _siblings(core)
    return chosen


def _siblings(core: int) -> set[int]:
    """The logical cores that share one physical core with `core`, itself included."""
    found = {core}
    with suppress(OSError, ValueError):
        for part in Path(_SIBLINGS.format(core)).read_text().strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found
