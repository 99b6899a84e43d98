"""The binding: one libzmq, honest constants, errors in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from zmoe import native
from zmoe.native import Algorithm, Dtype, Isa, Status, ffi, lib


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_process_holds_one_libzmq() -> None:
    maps = Path("/proc/self/maps").read_text().split()
    assert len({path for path in maps if "libzmq" in path}) == 1


def test_enums_match_the_header() -> None:
    csrc = Path(__file__).parents[2] / "csrc"
    names = ("common/status.h", "common/dtype.h", "common/isa.h", "exchange/exchange.h")
    header = "".join((csrc / name).read_text() for name in names)
    for status in Status:
        name = {"INVALID": "EINVAL", "INTERRUPTED": "EINTR", "MEMORY": "ENOMEM"}.get(
            status.name, f"E{status.name}" if status else "OK"
        )
        assert f"ZMOE_{name} = {status.value}," in header
    for dtype in Dtype:
        assert re.search(rf"ZMOE_{dtype.name}( =)? {dtype.value}\b", header)
        assert lib.zmoe_dtype_bytes(dtype) == dtype.itemsize
    for algorithm in Algorithm:
        assert f"ZMOE_{algorithm.name} = {algorithm.value}," in header
    for isa in Isa:
        assert f"ZMOE_ISA_{isa.name} = {isa.value}" in header
        assert ffi.string(lib.zmoe_isa_name(isa)) == isa.name.lower().encode()


def test_the_best_variant_is_supported() -> None:
    assert Isa.GENERIC.supported
    assert native.best_isa().supported


@pytest.mark.parametrize(
    ("library", "message"),
    [("/nowhere/libzmq.so", "cannot open /nowhere/libzmq.so"), (None, "has no function zmq_")],
)
def test_a_library_without_libzmq_is_refused(library: str | None, message: str) -> None:
    code = (
        "import sys; from zmoe._native import ffi, lib\n"
        "error = ffi.new('char[]', 512)\n"
        "status = lib.zmoe_zmq_load(sys.argv[1].encode(), error, 512)\n"
        "print(status, ffi.string(error).decode())"
    )
    path = library or sys.modules["zmoe._native"].__file__
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    status, _, error = done.stdout.strip().partition(" ")
    assert int(status) == Status.INVALID
    assert message in error
    assert "\n" not in error
