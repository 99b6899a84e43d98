"""A node's threads, and what its matmuls are to be computed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from zmoe.config import EngineConfig
from zmoe.errors import InputError, ZmoeError
from zmoe.native import Isa, Precision, Status, best_isa, ffi, lib
from zmoe.topology.cores import pool_cores

if TYPE_CHECKING:
    from zmoe.native import CData

SPIN_US = 200  # a thread that waits spins this long before it sleeps


class ThreadPool:
    """The threads that share a node's matmuls, the caller being the first.

    `cores` are where they stay, one thread each, or how many threads there are;
    of more than C's most (ZMOE_MAX_THREADS) the first are taken. The caller
    itself is never pinned. `precision` is that of quantised matmuls. Used by one
    thread at a time; ends its threads with close(), or when it is collected.
    """

    def __init__(
        self,
        cores: Sequence[int] | int = 1,
        precision: Precision = Precision.EXACT,
        isa: Isa | None = None,
    ) -> None:
        threads = min(cores if isinstance(cores, int) else len(cores), lib.ZMOE_MAX_THREADS)
        self.isa = best_isa() if isa is None else isa
        self.precision = precision
        self.threads = threads
        pinned = ffi.NULL if isinstance(cores, int) else ffi.new("int32_t[]", list(cores)[:threads])
        out = ffi.new("zmoe_thread_pool **")
        status = lib.zmoe_thread_pool_create(threads, pinned, SPIN_US, self.isa, out)
        if status != Status.OK:
            raise ZmoeError(f"cannot start {threads} threads for {self.isa.name}")
        self.handle: CData = ffi.gc(out[0], lib.zmoe_thread_pool_destroy)

    def reserve(self, size: int) -> None:
        """Make room for calls that need up to `size` bytes of working memory.

        Called between calls: while loading, and when a cache of keys and values grows.
        Raises ZmoeError if the system does not have that much.
        """
        if lib.zmoe_thread_pool_reserve(self.handle, size) != Status.OK:
            mib = size / 2**20
            raise ZmoeError(f"cannot reserve {mib:.1f} MiB of working memory for the CPU kernels")

    @property
    def matmul_s(self) -> float:
        """Seconds that its matmuls have taken, all told."""
        return lib.zmoe_thread_pool_matmul_ns(self.handle) * 1e-9

    def read(self, buffer: object) -> None:
        """Read `buffer` and do nothing with it: what the memory allows, for benchmarks."""
        data = ffi.from_buffer("uint8_t[]", buffer)
        lib.zmoe_bench_read(self.handle, data, len(data))

    def close(self) -> None:
        """End the threads; idempotent."""
        ffi.release(self.handle)


def is_native(config: EngineConfig) -> bool:
    """Whether the kernels compute the large matmuls; `auto` is yes on a CPU."""
    if config.compute == "auto":
        return bool(mx.default_device() == mx.Device(mx.cpu))
    return config.compute == "native"


def make_thread_pool(config: EngineConfig, isa: str) -> ThreadPool:
    """The pool of this process, on all of its cores. Raises InputError."""
    precision = Precision.INT8 if config.activations == "int8" else Precision.EXACT
    if precision is Precision.INT8 and Isa[isa] is Isa.GENERIC:
        raise InputError("--activations int8 needs AVX2 or NEON on every node")
    return ThreadPool(pool_cores(), precision, Isa[isa])


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
    unknown = [name for name in names if name not in Isa.__members__]
    if unknown:
        raise InputError(f"instruction set {unknown[0]!r} is not known")
    included = [_included(Isa[name]) for name in names]
    return next(isa for isa in included[0] if all(isa in others for others in included)).name


def _included(isa: Isa) -> list[Isa]:
    """What a machine that has `isa` has, best first; the last is GENERIC."""
    found = [isa]
    while found[-1] is not Isa.GENERIC:
        found.append(Isa(lib.zmoe_isa_included(found[-1])))
    return found
