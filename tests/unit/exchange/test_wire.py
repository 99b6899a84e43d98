"""The frame header through Python; tests/c/test_wire.c goes into detail."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from zmoe import native
from zmoe.native import HEADER_BYTES, Header, Isa, ffi, header_of, lib

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
MOST = 4096


def decoded(frame: bytes) -> Header | int:
    """The header, or a positive zmoe_wire_error."""
    raw = ffi.new("zmoe_header *")
    error = lib.zmoe_wire_decode(ffi.from_buffer("uint8_t[]", frame), len(frame), MOST, raw)
    return error if error else header_of(raw)


@given(
    st.builds(
        Header,
        kind=st.just(1),
        dtype=st.integers(0, 3),
        source=st.integers(0, 63),
        session=U64,
        step=U32,
        layer=U32,
        rows=st.integers(0, 8),
        width=st.integers(0, 100),
        micro_batch=st.integers(0, 255),
        digest=U64,
    )
)
def test_any_header_survives(header: Header) -> None:
    size = native.Dtype(header.dtype).payload_bytes(header.rows, header.width)
    checksum = lib.zmoe_crc32c(bytes(size), size, Isa.GENERIC)
    header = replace(header, payload_bytes=size, payload_checksum=checksum)
    out = ffi.new("uint8_t[]", HEADER_BYTES + size)
    lib.zmoe_wire_encode(ffi.new("zmoe_header *", vars(header)), out)
    assert decoded(bytes(ffi.buffer(out))) == header


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(frame: bytes) -> None:
    assert isinstance(decoded(frame), int)


def test_python_knows_every_field() -> None:
    raw = native.ffi.typeof("zmoe_header")
    assert {name for name, _ in raw.fields} == {field.name for field in fields(Header)}


def test_presence_names_session_and_rank() -> None:
    names = {native.presence(session, rank) for session in (1, 2) for rank in range(64)}
    assert len(names) == 128
    assert all(name.startswith(b"ZMOE") for name in names)
