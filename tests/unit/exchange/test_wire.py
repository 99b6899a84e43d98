"""The frame header through Python; tests/c/test_wire.c goes into detail."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from zmoe import native
from zmoe.native import Header

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
MOST = 4096


@given(
    st.builds(
        Header,
        kind=st.just(1),
        dtype=st.integers(0, 3),
        source=st.integers(0, 63),
        session=U64,
        epoch=U32,
        step=U32,
        layer=U32,
        rows=st.integers(0, 8),
        width=st.integers(0, 100),
        part=st.integers(0, 255),
        digest=U64,
    )
)
def test_any_header_survives(header: Header) -> None:
    size = native.Dtype(header.dtype).payload_bytes(header.rows, header.width)
    header = replace(header, payload_bytes=size, payload_checksum=native.crc32c(bytes(size)))
    assert native.decode_frame(native.encode_header(header) + bytes(size), MOST) == header


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(frame: bytes) -> None:
    assert isinstance(native.decode_frame(frame, MOST), int)


def test_python_knows_every_field() -> None:
    raw = native.ffi.typeof("zmoe_header")
    assert {name for name, _ in raw.fields} == {field.name for field in fields(Header)}


def test_presence_names_session_and_rank() -> None:
    names = {native.presence(session, rank) for session in (1, 2) for rank in range(64)}
    assert len(names) == 128
    assert all(name.startswith(b"ZMOE") for name in names)
