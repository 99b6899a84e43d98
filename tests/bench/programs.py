"""How tests call the programs in bench/: as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2] / "bench"
DEADLINE_S = 120
END_S = 30  # for processes whose parent was killed


def run(
    program: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / program), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **(env or {})},
    )


def report_of(program: str, *arguments: str) -> dict[str, Any]:
    done = run(program, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["environment"]["cpu"]
    return report


SMALL = {"layers": 2, "hidden": 128, "heads": 4, "kv-heads": 2, "ffn": 128, "vocab": 1024}


def make_model(folder: Path, *flags: str) -> Path:
    """A tiny checkpoint of make_model.py's, with `flags` added."""
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    done = run("make_model.py", str(folder), *sizes, *flags)
    assert done.returncode == 0, done.stderr
    return folder


def processes(marker: str) -> list[str]:
    """Command lines that contain `marker`."""
    listed = subprocess.run(
        ["ps", "-Aww", "-o", "args"], capture_output=True, text=True, check=True
    )
    return [line for line in listed.stdout.splitlines() if marker in line]
