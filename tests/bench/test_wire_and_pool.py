"""What a frame costs: its header, its payload's checksum, and the slot it is written into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmoe import native
from zmoe.native import Header, ffi, lib

PAYLOAD = 12 * 1024
HEADER = Header(source=1, session=7, step=3, layer=2, rows=1, width=3072, payload_bytes=PAYLOAD)


def frame_of(header: Header) -> bytearray:
    """A frame with a payload of zeros."""
    frame = bytearray(native.HEADER_BYTES + PAYLOAD)
    raw = ffi.new("zmoe_header *", vars(header))
    lib.zmoe_wire_encode(raw, ffi.from_buffer("uint8_t[]", frame))
    return frame


def test_encode(benchmark: BenchmarkFixture) -> None:
    raw = ffi.new("zmoe_header *", vars(HEADER))
    out = ffi.new("uint8_t[]", native.HEADER_BYTES)
    benchmark(lib.zmoe_wire_encode, raw, out)
    assert bytes(ffi.buffer(out)) == frame_of(HEADER)[: native.HEADER_BYTES]


def test_decode(benchmark: BenchmarkFixture) -> None:
    frame = frame_of(HEADER)
    view, raw = ffi.from_buffer("uint8_t[]", frame), ffi.new("zmoe_header *")
    assert benchmark(lib.zmoe_wire_decode, view, len(frame), PAYLOAD, raw) == 0
    assert raw.session == HEADER.session


def test_refuse(benchmark: BenchmarkFixture) -> None:
    """A frame with one flipped bit in its header costs no more than a good one."""
    frame = frame_of(HEADER)
    frame[20] ^= 1
    view, raw = ffi.from_buffer("uint8_t[]", frame), ffi.new("zmoe_header *")
    assert benchmark(lib.zmoe_wire_decode, view, len(frame), PAYLOAD, raw) != 0


@pytest.mark.parametrize("isa", [isa for isa in native.Isa if isa.supported])
@pytest.mark.parametrize("size", [PAYLOAD, 128 * PAYLOAD], ids=["decode", "prefill"])
def test_checksum(benchmark: BenchmarkFixture, isa: native.Isa, size: int) -> None:
    data = bytes(range(256)) * (size // 256)
    view = ffi.from_buffer("uint8_t[]", data)
    expected = lib.zmoe_crc32c(view, size, native.Isa.GENERIC)
    assert benchmark(lib.zmoe_crc32c, view, size, isa) == expected


@pytest.fixture
def pool() -> Iterator[Any]:
    """A pool with slots for decode and for prefill."""
    classes = ffi.new("zmoe_pool_class[]", [(PAYLOAD, 8), (128 * PAYLOAD, 4)])
    out = ffi.new("zmoe_pool **")
    assert lib.zmoe_pool_create(classes, 2, 64, out) == 0
    yield out[0]
    lib.zmoe_pool_destroy(out[0])


@pytest.mark.parametrize("size", [PAYLOAD, 128 * PAYLOAD], ids=["decode", "prefill"])
def test_acquire_and_release(benchmark: BenchmarkFixture, pool: Any, size: int) -> None:
    slot = ffi.new("zmoe_slot **")

    def turn() -> Any:
        status = lib.zmoe_pool_acquire(pool, size, 0, slot)
        lib.zmoe_slot_release(slot[0])
        return status

    assert benchmark(turn) == 0
    stats = ffi.new("zmoe_pool_stats *")
    lib.zmoe_pool_stats_get(pool, stats)
    assert stats.acquired == stats.released > 0
    assert stats.exhausted == 0
