"""The C hot path as typed Python; the only importer of the compiled module.

Buffers are anything with the buffer protocol, C-contiguous. Every call into C
releases the GIL. Functions that can fail return a `Status`, or raise
`ValueError` where only the caller can be at fault.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from zmoe import _native
from zmoe._native import ffi as ffi
from zmoe._native import lib as lib

if TYPE_CHECKING:
    from zmoe._native import CData as CData

LIBRARY = str(_native.__file__)  # which MLX can load as its MPI library
MAX_NODES = lib.ZMOE_MAX_NODES
HEADER_BYTES = lib.ZMOE_HEADER_BYTES
PAIR_BYTES = lib.ZMOE_PAIR_BYTES
WINDOW = lib.ZMOE_WINDOW


class Status(IntEnum):
    """Return codes of csrc/common/status.h."""

    OK = 0
    INVALID = -1
    TIMEOUT = -2
    PEER = -3
    INTERRUPTED = -4
    DIVERGED = -5
    POOL = -6
    ZMQ = -7
    MEMORY = -8
    FORK = -9


class Dtype(IntEnum):
    """Element types, and the blocks of 8-bit integers that only the wire knows."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for Q8, which has none."""
        return (4, 2, 2, 0)[self]

    def payload_bytes(self, rows: int, width: int) -> int:
        """Bytes of (rows, width) elements on the wire."""
        return lib.zmoe_payload_bytes(self, rows, width)

    def most_elements(self, payload_bytes: int) -> int:
        """How many elements a payload may hold, whatever its shape."""
        if self is Dtype.Q8:
            return payload_bytes // lib.ZMOE_Q8_BLOCK_BYTES * lib.ZMOE_Q8_BLOCK
        return payload_bytes // self.itemsize


class Algorithm(IntEnum):
    """How an all-reduce runs; zmoe_algorithm of csrc/exchange/exchange.h."""

    DIRECT = 0
    SCATTER = 1


class Isa(IntEnum):
    """Instruction sets that the C code comes in."""

    GENERIC = 0
    AVX2 = 1
    AVX512 = 2
    NEON = 3
    AVX512_BF16 = 4
    NEON_DOT = 5
    NEON_BF16 = 6
    AVX_VNNI = 7
    AVX512_VNNI = 8

    @property
    def supported(self) -> bool:
        """Whether this CPU can run it."""
        return bool(lib.zmoe_isa_supported(self))


class Format(IntEnum):
    """How a weight is stored; zmoe_format of csrc/kernels/compute.h."""

    F32 = 0
    F16 = 1
    BF16 = 2
    AFFINE = 3
    MXFP4 = 4
    NVFP4 = 5
    MXFP8 = 6


class RouteKind(IntEnum):
    """How experts are chosen and weighted; zmoe_route_kind of csrc/kernels/decoder.h."""

    SOFTMAX_TOP_K = 0
    TOP_K_SOFTMAX = 1
    SIGMOID_TOP_K = 2


class Extent(IntEnum):
    """How far a chain computes its last routed experts; zmoe_extent of csrc/kernels/decoder.h."""

    ROUTE = 0
    PAIRS = 1
    SUM = 2
    ALL = 3


class Precision(IntEnum):
    """What becomes of x in quantised matmuls; zmoe_precision of csrc/kernels/compute.h."""

    EXACT = 0
    INT8 = 1


class Activation(IntEnum):
    """Between an expert's matmuls; zmoe_activation of csrc/kernels/compute.h."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    CLAMPED_SWIGLU = 3
    RELU2 = 4
    GELU_ONLY = 5
    GELU_TANH_ONLY = 6


@dataclass(frozen=True)
class Header:
    """The frame header; see zmoe_header in csrc/exchange/exchange.h."""

    kind: int = 1
    dtype: int = 0
    source: int = 0
    session: int = 0
    step: int = 0
    layer: int = 0
    rows: int = 0
    width: int = 0
    payload_bytes: int = 0
    micro_batch: int = 0
    chunks: int = 0
    chunk: int = 0
    busiest: int = 0
    digest: int = 0
    payload_checksum: int = 0


def header_of(raw: CData) -> Header:
    """A zmoe_header as Python."""
    return Header(**{name: int(getattr(raw, name)) for name in Header.__dataclass_fields__})


def _load_zmq() -> None:
    """Points the C code at the libzmq that pyzmq has loaded."""
    problems = []
    for name in ("zmq.backend.cython._zmq", "zmq.backend.cffi._cffi"):
        try:
            path = importlib.import_module(name).__file__
        except ImportError as problem:
            problems.append(str(problem))
            continue
        error = ffi.new("char[]", 512)
        if lib.zmoe_zmq_load(str(path).encode(), error, 512) == Status.OK:
            return
        problems.append(ffi.string(error).decode(errors="replace"))
    raise ImportError(f"no usable libzmq in pyzmq: {'; '.join(problems)}")


_load_zmq()


# ---- isa, digest, wire --------------------------------------------------------


def best_isa() -> Isa:
    """The fastest variant that this CPU can run."""
    return Isa(lib.zmoe_isa_best())


def digest(data: Any) -> int:
    """64-bit digest, not cryptographic, of a buffer's bytes."""
    view = ffi.from_buffer("uint8_t[]", data)
    return lib.zmoe_digest(view, len(memoryview(data).cast("B")))


def presence(session: int, rank: int) -> bytes:
    """How a rank of a session names itself: subscription and routing id."""
    out = ffi.new("uint8_t[]", lib.ZMOE_PRESENCE_BYTES)
    lib.zmoe_wire_presence(session, rank, out)
    return bytes(ffi.buffer(out))


# ---- assignment ---------------------------------------------------------------


class Owners:
    """Who holds the experts of a layer, and so who computes which; see csrc/exchange/assign.h.

    `slices[rank]` names the slice that a rank holds of each of its experts: 0 to
    the number of distinct ones. `speeds[rank]`: relative, positive.
    """

    def __init__(
        self,
        experts: int,
        owned: Sequence[Sequence[int]],
        slices: Sequence[int] = (),
        speeds: Sequence[int] = (),
    ) -> None:
        """`owned[rank]` are the ids of its experts."""
        nodes = len(owned)
        numbers = list(slices) or [0] * nodes
        masks = [0] * experts
        for rank, ids in enumerate(owned):
            for expert in ids:
                masks[expert] |= 1 << rank
        of_slice = [0] * (1 + max(numbers))
        for rank, number in enumerate(numbers):
            of_slice[number] |= 1 << rank
        self._keep = (
            ffi.new("uint64_t[]", masks),
            ffi.new("uint64_t[]", of_slice),
            ffi.new("uint32_t[]", list(speeds) or [1] * nodes),
        )
        self._raw = ffi.new("zmoe_owners *", (nodes, experts, len(of_slice), *self._keep))
        self.counts = np.zeros(nodes, np.uint32)
        self._counts = ffi.from_buffer("uint32_t[]", self.counts, require_writable=True)
        self._reserve(1, 1)

    def _reserve(self, rows: int, top_k: int) -> None:
        """Have memory for an assignment of so many rows."""
        size = lib.zmoe_assign_scratch(self._raw, top_k)
        self._room = (rows, top_k)
        self._scratch = ffi.new("uint64_t[]", size // 8 + 1)
        self._ranks = np.empty(rows * top_k, np.uint64)
        self.pointer = ffi.from_buffer("uint64_t[]", self._ranks, require_writable=True)

    def assign(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
        """Share out the experts `ids` (rows, k) that the rows have chosen, row by row.

        Returns uint64 (rows, k), also at `pointer`: bit r where rank r computes the pair. Then
        `counts` (nodes,) is how many experts each rank computes. All until the next call.
        """
        rows, top_k = ids.shape
        if rows > self._room[0] or top_k != self._room[1]:
            self._reserve(rows, top_k)
        view = ffi.from_buffer("int32_t[]", ids)
        out = self.pointer, self._counts
        lib.zmoe_assign(self._raw, view, rows, top_k, self._scratch, *out)
        return self._ranks[: rows * top_k].reshape(rows, top_k)


# ---- benchmarks ---------------------------------------------------------------


class _Timed(Protocol):
    def time_exchanges(
        self, elements: int, wire_dtype: Dtype, algorithm: Algorithm, count: int
    ) -> npt.NDArray[np.float64]: ...


class HasNative(Protocol):
    """What rests on an exchange in C: zmoe.exchange.local.Exchange."""

    @property
    def native(self) -> _Timed:
        """The exchange in C."""
        ...


def time_exchanges(
    exchange: HasNative,
    elements: int,
    wire_dtype: Dtype,
    algorithm: Algorithm,
    iterations: int,
    warmup: int,
) -> npt.NDArray[np.float64]:
    """Microseconds (iterations,) of exchanges from f32 in C to f32 in C; all ranks call it."""
    exchange.native.time_exchanges(elements, wire_dtype, algorithm, warmup)
    return exchange.native.time_exchanges(elements, wire_dtype, algorithm, iterations)
