"""The C tests, under sanitizers, and a short fuzz run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "c"


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "-C", str(FOLDER), f"PYTHON={sys.executable}", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("cc") is None, reason="needs make and a C compiler"
)
@pytest.mark.parametrize("target", [["check"], ["fuzz", "FUZZ_SECONDS=2"]], ids=["check", "fuzz"])
def test_c(target: list[str]) -> None:
    make(*target)
