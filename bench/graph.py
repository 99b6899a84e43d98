"""What the exchange in MLX's graph costs: decoding on MLX by mlx-lm, and in each form by zmoe.

On a CPU a tiny, deep model stands in for a GPU's host: what it takes is the host's work. The
rows take turns; a ratio is the median over the rounds of each round's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from common import BENCH, environment, finish, main, parser, positive, run_json, short_name

DEADLINE_S = 600.0
ALONE = "mlx-lm"


def arguments() -> argparse.Namespace:
    made = parser((__doc__ or "").splitlines()[0])
    made.add_argument("model", help="folder; bench/make_model.py writes one")
    made.add_argument("--nodes", type=positive, default=2, help="default 2")
    made.add_argument("--runs", type=positive, default=5, help="rounds; default 5")
    made.add_argument("-p", "--prompt-tokens", type=positive, default=16, help="default 16")
    made.add_argument("-m", "--max-tokens", type=positive, default=32, help="default 32")
    return made.parse_args()


def rows_of(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The flags of bench/peers/greedy.py for each row, by its name."""
    several = ("--nodes", str(options.nodes))
    return {
        ALONE: (),
        "one node": ("--nodes", "1"),
        "evaluated": (*several, "--placement", "experts"),
        "zmq": (*several, "--placement", "slices", "--backend", "zmq"),
        "ring": (*several, "--placement", "slices", "--backend", "ring"),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row each: milliseconds a token, and how much of mlx-lm's and the ring's that is."""
    rows = rows_of(options)
    counts = ("-p", str(options.prompt_tokens), "-n", str(options.max_tokens), "-r", "3")
    program, found = str(BENCH / "peers" / "greedy.py"), {name: list[float]() for name in rows}
    for turn in range(options.runs):
        for name, flags in rows.items():
            print(f"run {turn + 1}, {name}", file=sys.stderr)
            command = [sys.executable, program, options.model, *counts, *flags]
            found[name].append(run_json(command, DEADLINE_S)["ms"])
    return [
        {
            "row": name,
            "ms": round(statistics.median(runs), 3),
            "runs": [round(each, 3) for each in runs],
            "to_mlx_lm": _ratio(runs, found[ALONE]),
            "to_ring": _ratio(runs, found["ring"]),
        }
        for name, runs in found.items()
    ]


def _ratio(runs: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(runs, others)), 3)


def show(report: Mapping[str, Any]) -> None:
    print(f"{'':12}{'ms/token':>10}{'x mlx-lm':>10}{'x ring':>10}   least, most")
    for row in report["results"]:
        spread = f"{min(row['runs']):.2f}, {max(row['runs']):.2f}"
        ratios = f"{row['to_mlx_lm']:>10.2f}{row['to_ring']:>10.2f}"
        print(f"{row['row']:12}{row['ms']:>10.2f}{ratios}   {spread}")


def benchmark() -> int:
    options = arguments()
    block = environment()
    report = {"environment": block, "results": measure(options)}
    block["load_average_after"] = environment()["load_average"]
    finish(options, report, show, of=short_name(options.model))
    return 0


if __name__ == "__main__":
    main(benchmark)
