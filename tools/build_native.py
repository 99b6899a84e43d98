"""Builds `zmoe._native`, the C hot path, with cffi in API mode.

`builder` is what setup.py names. The declarations come from the public headers
of csrc/ themselves, so that header and binding cannot drift apart.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADERS = (
    "common/status.h",
    "common/dtype.h",
    "common/isa.h",
    "common/checksum.h",
    "common/reduce.h",
    "exchange/exchange.h",
    "exchange/assign.h",
    "door/door.h",
    "kernels/compute.h",
    "kernels/decoder.h",
    "exchange/bench_loop.h",
)


def declarations(header: str) -> str:
    """The part of a C header that cffi's cdef() understands."""
    text = re.sub(r"/\*.*?\*/|\\\n", "", header, flags=re.DOTALL)
    lines = [
        line
        for line in text.splitlines()
        if not line.startswith("#") or re.fullmatch(r"#define \w+ \d+ *", line)
    ]
    return "\n".join(lines)


def make_builder() -> FFI:
    """The FFI whose extension holds every C file of csrc/."""
    ffi = FFI()
    for name in HEADERS:
        ffi.cdef(declarations((ROOT / "csrc" / name).read_text(encoding="utf-8")))
    ffi.set_source(
        "zmoe._native",
        "".join(f'#include "{name}"\n' for name in HEADERS),
        sources=_files("*.c"),
        depends=_files("*.h"),
        include_dirs=["csrc"],
        # Python's own flags are kept; contraction is off so that every CPU
        # rounds alike, and asserts stay on: they guard memory, and cost nothing.
        extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"],
        undef_macros=["NDEBUG"],
        libraries=["dl", "pthread"] if _is_linux() else [],
    )
    return ffi


def _files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def _is_linux() -> bool:
    import sys

    return sys.platform.startswith("linux")


builder = make_builder()
