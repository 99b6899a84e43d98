"""The C tests, under sanitizers, short fuzz and simulated runs; for aarch64 under qemu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "c"
CORES = os.cpu_count() or 1
SIMULATE = ["simulate"] if sys.platform == "linux" else []  # by its waits and coroutines


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "-C", str(FOLDER), f"-j{CORES}", f"PYTHON={sys.executable}", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def missing(*tools: str) -> list[str]:
    return [tool for tool in tools if shutil.which(tool) is None]


@pytest.mark.skipif(bool(missing("make", "cc")), reason="needs make and a C compiler")
@pytest.mark.parametrize(
    "target",
    [["check", "fuzz", *SIMULATE, "FUZZ_SECONDS=2"], ["threads"]],  # each with a folder of its own
    ids=["check", "threads"],
)
def test_c(target: list[str]) -> None:
    make(*target)


@pytest.mark.skipif(bool(missing("cc")), reason="needs a C compiler")
@pytest.mark.parametrize("macro", ["__SIZEOF_POINTER__=4", "__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"])
def test_platforms_that_are_refused(macro: str) -> None:
    header = FOLDER.parents[1] / "csrc" / "common" / "platform.h"
    command = ["cc", "-E", str(header), "-U", macro.partition("=")[0], "-D", macro]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "zmoe needs a little-endian 64-bit platform" in done.stderr


def test_aarch64() -> None:
    """What computes, with NEON, where it can be cross-compiled and emulated."""
    absent = missing("make", "aarch64-linux-gnu-gcc", "qemu-aarch64")
    if absent:
        packages = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
        pytest.skip(f"needs {', '.join(absent)} (on Debian: apt-get install {packages})")
    make("cross")
