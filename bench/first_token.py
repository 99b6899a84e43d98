"""Seconds from typing zmoe-run to the first text, cold.

Cold means a new command each time: interpreter, imports, processes, load and
warm-up included. The checkpoint may lie in the page cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import select
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from common import (
    BenchError,
    Children,
    environment,
    finish,
    list_of,
    main,
    parser,
    positive,
    short_name,
)

DEADLINE_S = 300.0


def arguments() -> argparse.Namespace:
    made = parser("Time zmoe-run from a cold command to its first text.")
    made.add_argument("--model", default="zmoe-tiny", help="folder or name (default: zmoe-tiny)")
    made.add_argument("--nodes", type=list_of(positive), default=[1, 2], help="default 1,2")
    made.add_argument("--runs", type=positive, default=5, help="default 5")
    made.add_argument("--prompt", default="ROMEO:")
    made.add_argument(
        "--flags",
        action="append",
        help="more flags of zmoe-run; may be repeated, for variants that alternate",
    )
    made.add_argument(
        "--checkout",
        action="append",
        default=[],
        metavar="FOLDER",
        help="another, built checkout of zmoe that is run beside this one; may be repeated",
    )
    return made.parse_args()


def first_token(model: str, nodes: int, prompt: str, flags: str, checkout: str) -> float:
    """Seconds until the command writes anything to its standard output."""
    command = [sys.executable, "-P", "-m", "zmoe.cli.run", "--model", model, "--nodes", str(nodes)]
    command += shlex.split(flags)
    with Children() as children:
        begun = time.monotonic()
        process = children.start(
            [*command, "--temp", "0", "-m", "8", prompt],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONPATH": checkout} if checkout else None,
        )
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        text = os.read(process.stdout.fileno(), 1 << 16) if readable else b""
        taken = time.monotonic() - begun
        if text:
            process.communicate(timeout=DEADLINE_S)
            return taken
        if readable:
            said = process.communicate(timeout=DEADLINE_S)[1].decode(errors="replace")
            last = said.strip().splitlines()[-1:] or ["no message"]
            raise BenchError(f"zmoe-run wrote no text: {last[0]}")
        raise BenchError(f"zmoe-run wrote no text within {DEADLINE_S:g} s")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of nodes, flags and checkout, the runs interleaved."""
    variants = itertools.product(options.nodes, options.flags or [""], ["", *options.checkout])
    runs: dict[tuple[int, str, str], list[float]] = {variant: [] for variant in variants}
    for _ in range(options.runs):
        for (nodes, flags, checkout), taken in runs.items():
            taken.append(first_token(options.model, nodes, options.prompt, flags, checkout))
    return [
        {
            "model": short_name(options.model),
            "nodes": nodes,
            "flags": flags,
            "checkout": short_name(checkout),
            "first_token_s": round(statistics.median(taken), 3),
            "runs_s": [round(each, 3) for each in taken],
        }
        for (nodes, flags, checkout), taken in runs.items()
    ]


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = ("first token, s (median)", "fastest", "slowest")
    table = Table("model", "nodes", "flags", "checkout", *titles)
    for row in report["results"]:
        runs = row["runs_s"]
        figures = (row["first_token_s"], min(runs), max(runs))
        words = (row["model"], str(row["nodes"]), row["flags"], row["checkout"])
        table.add_row(*words, *(f"{each:.2f}" for each in figures))
    Console().print(table)


def benchmark() -> int:
    options = arguments()
    block = environment()
    finish(options, {"environment": block, "results": measure(options)}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
