"""Products of one linear layer: GB/s against the memory's, GFLOP/s against the cores' peak, and
numpy's and MLX's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import (
    BENCH,
    Absent,
    BenchError,
    Children,
    compile_c,
    environment,
    finish,
    list_of,
    main,
    parser,
    positive,
)
from peers.products import MODES

from zmoe.native import Isa, best_isa
from zmoe.topology.cores import usable_cores

FORMATS = [name for name in MODES if name not in ("affine-4-g32", "affine-4-g128")]
KEYS = ("cores", "rows", "format", "by")
# Settings of the machine's owner that keep numpy from its best kernels.
NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def arguments() -> argparse.Namespace:
    made = parser("Measure the products of a linear layer in every format.")
    formats = list_of(str)
    made.add_argument("--formats", type=formats, default=FORMATS, help=f"of {', '.join(MODES)}")
    made.add_argument("--rows", type=list_of(positive), default=[1, 2, 4, 8, 32, 128, 512])
    made.add_argument("--cores", type=list_of(positive), default=[1, 2], help="how many at a time")
    made.add_argument("--ins", type=positive, default=2048, help="columns of the weight")
    made.add_argument("--megabytes", type=positive, default=256, help="of a one-row weight")
    made.add_argument("--isa", default=best_isa().name, help="the instruction set to use")
    made.add_argument("--peers", type=list_of(str), default=["mlx", "numpy"], help="mlx, numpy")
    made.add_argument("--rounds", type=positive, default=3, help="over all of it")
    made.add_argument("--budget", type=float, default=0.4, help="seconds for one figure")
    made.add_argument("--deadline", type=positive, default=1800, help="seconds for one round")
    options = made.parse_args()
    if unknown := [name for name in options.formats if name not in MODES]:
        made.error(f"unknown format {unknown[0]}: expected {', '.join(MODES)}")
    if unknown := [name for name in options.peers if name not in ("mlx", "numpy")]:
        made.error(f"unknown peer {unknown[0]}: expected mlx, numpy")
    if options.isa not in Isa.__members__ or not Isa[options.isa].supported:
        usable_sets = ", ".join(isa.name for isa in Isa if isa.supported)
        made.error(f"--isa {options.isa}: this CPU has {usable_sets}")
    usable = len(usable_cores())
    if max(options.cores) > usable:
        made.error(f"--cores {max(options.cores)}: only {usable} are usable")
    return options


def peak_of(isa: str) -> float | None:
    """GFLOP/s of multiply-adds in registers on the first core, or None where nothing tells."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            compile_c(os.environ.get("CC", "cc"), "peak.c", Path(folder))
        except Absent:
            return None
        command = [str(Path(folder) / "peak"), isa]
        core = {usable_cores()[0]}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: os.sched_setaffinity(0, core),
        )
    return float(done.stdout) if done.returncode == 0 else None


def one_round(options: argparse.Namespace, cores: int) -> Iterator[dict[str, Any]]:
    """The rows of one process on the first `cores` cores."""
    given = {
        "cores": usable_cores()[:cores],
        "rows": options.rows,
        "formats": options.formats,
        "ins": options.ins,
        "one_row_bytes": options.megabytes << 20,
        "many_row_bytes": 8 << 20,
        "peers": options.peers,
        "isa": options.isa,
        "budget_s": options.budget,
    }
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(cores), "OMP_NUM_THREADS": str(cores)}
    for name in NUMPY_SETTINGS:
        os.environ.pop(name, None)
        env.pop(name, None)
    command = [sys.executable, str(BENCH / "peers" / "products.py"), json.dumps(given)]
    with Children() as children:
        child = children.start(command, stdout=subprocess.PIPE, env=env)
        try:
            out, _ = child.communicate(timeout=options.deadline)
        except subprocess.TimeoutExpired:
            raise BenchError(f"products.py took longer than {options.deadline} s") from None
    if child.returncode != 0:
        raise BenchError(f"products.py ended with status {child.returncode}")
    yield from (json.loads(line) for line in out.decode().splitlines())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, which alternate between the numbers of cores.

    A ratio is the median of the rounds' ratios: both of its figures are of one moment.
    """
    found: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for turn in range(options.rounds):
        for cores in options.cores:
            print(f"round {turn + 1}, {cores} cores", file=sys.stderr)
            peak = peak_of(options.isa)
            for row in one_round(options, cores):
                row["isa"] = options.isa
                row["of_read_bandwidth"] = row["gb_per_s"] / row["read_gb_per_s"]
                if peak is not None:
                    row["of_peak"] = row["gflop_per_s"] / (peak * cores)
                found[tuple(row[key] for key in KEYS)].append(row)
    return [_median(rows) for rows in found.values()]


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = dict(rows[0])
    for name, value in made.items():
        if isinstance(value, float):
            made[name] = round(statistics.median(row[name] for row in rows), 3)
    return made


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = ("cores", "rows", "format", "by", "us", "GB/s", "read GB/s", "of it", "GFLOP/s")
    table = Table(*titles, "of peak", "of numpy")
    numpy = {
        tuple(row[key] for key in KEYS[:3]): row["gflop_per_s"]
        for row in report["results"]
        if row["by"] == "numpy-f32"
    }
    for row in report["results"]:
        rate = numpy.get(tuple(row[key] for key in KEYS[:3]))
        table.add_row(
            *(str(row[key]) for key in KEYS),
            f"{row['us']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['read_gb_per_s']:.1f}",
            f"{row['of_read_bandwidth']:.0%}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['of_peak']:.0%}" if "of_peak" in row else "",
            f"{row['gflop_per_s'] / rate:.2f}" if rate else "",
        )
    Console().print(table)


def benchmark() -> int:
    options = arguments()
    results = measure(options)
    finish(options, {"environment": environment(), "results": results}, show)
    return 0


if __name__ == "__main__":
    main(benchmark)
