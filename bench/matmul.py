"""Products of one linear layer: GB/s against the memory's, GFLOP/s against the cores' peak, and
numpy's and MLX's.
"""

from __future__ import annotations

import argparse
import itertools
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
    check_table_flags,
    compile_c,
    environment,
    finish,
    kept,
    list_of,
    main,
    markdown_table,
    measured_with,
    one_of,
    parser,
    positive,
    table_flags,
)
from peers.products import BLOCK, MODES

from zmoe.native import Isa, best_isa
from zmoe.topology.cores import usable_cores

FORMATS = [name for name in MODES if name not in ("affine-4-g32", "affine-4-g128")]
KEYS = ("isa", "cores", "rows", "format", "by")
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
    made.add_argument("--outs", type=positive, help="rows of every weight, a multiple of 128")
    sets = [isa.name for isa in Isa if isa.supported]
    isa = list_of(one_of(sets))
    made.add_argument("--isa", type=isa, default=[best_isa().name], help=f"of {', '.join(sets)}")
    made.add_argument(
        "--peers", type=list_of(str), default=["mlx", "numpy"], help="mlx, numpy, none"
    )
    made.add_argument("--rounds", type=positive, default=3, help="over all of it")
    made.add_argument("--budget", type=float, default=0.4, help="seconds for one figure")
    made.add_argument("--deadline", type=positive, default=1800, help="seconds for one round")
    table_flags(made)
    options = made.parse_args()
    check_table_flags(made, options)
    if options.outs is not None and options.outs % BLOCK:
        made.error(f"--outs {options.outs} is no multiple of {BLOCK}")
    if unknown := [name for name in options.formats if name not in MODES]:
        made.error(f"unknown format {unknown[0]}: expected {', '.join(MODES)}")
    if unknown := [name for name in options.peers if name not in ("mlx", "numpy", "none")]:
        made.error(f"unknown peer {unknown[0]}: expected mlx, numpy, none")
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


def one_round(options: argparse.Namespace, isa: str, cores: int) -> Iterator[dict[str, Any]]:
    """The rows of one process on the first `cores` cores."""
    given = {
        "cores": usable_cores()[:cores],
        "rows": options.rows,
        "formats": options.formats,
        "ins": options.ins,
        "outs": options.outs,
        "one_row_bytes": options.megabytes << 20,
        "many_row_bytes": 8 << 20,
        "peers": options.peers,
        "isa": isa,
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
    """Medians over the rounds, which alternate between instruction sets and numbers of cores.

    A ratio is the median of the rounds' ratios: both of its figures are of one moment.
    """
    found: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for turn in range(options.rounds):
        for isa, cores in itertools.product(options.isa, options.cores):
            print(f"round {turn + 1}, {isa}, {cores} cores", file=sys.stderr)
            peak = peak_of(isa)
            for row in one_round(options, isa, cores):
                row["isa"] = isa
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

    titles = (*KEYS, "us", "GB/s", "read GB/s", "of it", "GFLOP/s")
    table = Table(*titles, "of peak", "of numpy")
    numpy = {
        tuple(row[key] for key in KEYS[:4]): row["gflop_per_s"]
        for row in report["results"]
        if row["by"] == "numpy-f32"
    }
    for row in report["results"]:
        rate = numpy.get(tuple(row[key] for key in KEYS[:4]))
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


def markdown(report: Mapping[str, Any]) -> None:
    """Of one row, shares of the bandwidth: formats by instruction sets. Of several, for each
    instruction set and format, times as multiples of one row's, and shares of the peak.
    """
    rows = [row for row in report["results"] if row["by"] == "zmoe"]
    found = {tuple(row[key] for key in KEYS[:4]): row for row in rows}
    isas, cores, counts, formats = (list(dict.fromkeys(row[k] for row in rows)) for k in KEYS[:4])
    if counts == [1]:
        titles = [f"{isa}, {n} core{'s' * (n > 1)}" for isa in isas for n in cores]
        lines = [
            [name, *(_share(found.get((isa, n, 1, name))) for isa in isas for n in cores)]
            for name in formats
        ]
        markdown_table(["format", *titles], lines)
        print("\nShares of a plain read's speed right before and after.", end=" ")
    else:
        every = itertools.product(isas, cores, formats)
        lines = [
            [isa, str(n), name, *(_multiple(found, (isa, n, count, name)) for count in counts)]
            for isa, n, name in every
        ]
        markdown_table(["instructions", "cores", "format", *map(str, counts)], lines)
        print("\nBy rows: times as multiples of one row's; shares of the peak.", end=" ")
    print(measured_with(report))


def _share(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else f"{row['of_read_bandwidth']:.0%}"


def _multiple(found: Mapping[tuple[Any, ...], Mapping[str, Any]], key: tuple[Any, ...]) -> str:
    """Of a row, against one row of a weight as large."""
    isa, cores, _, name = key
    row, one = found.get(key), found.get((isa, cores, 1, name))
    if row is None:
        return "-"
    share = f"{row['of_peak']:.0%}" if "of_peak" in row else "-"
    if one is None or one["outs"] != row["outs"]:
        return share
    return f"{row['us'] / one['us']:.2f}; {share}"


def benchmark() -> int:
    options = arguments()
    of = "one row" if options.rows == [1] else "rows"
    if options.kept:
        report = kept(of)
    else:
        report = {"environment": environment(), "results": measure(options)}
    finish(options, report, markdown if options.markdown else show, of=of)
    return 0


if __name__ == "__main__":
    main(benchmark)
