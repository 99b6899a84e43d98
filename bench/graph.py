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
ALONE, ONE = "mlx-lm", "one node"


def arguments() -> argparse.Namespace:
    made = parser((__doc__ or "").splitlines()[0])
    made.add_argument("model", help="folder; bench/make_model.py writes one")
    made.add_argument("--nodes", type=positive, default=2, help="default 2; 1: no rows of several")
    made.add_argument("--runs", type=positive, default=5, help="rounds; default 5")
    made.add_argument("-p", "--prompt-tokens", type=positive, default=16, help="default 16")
    made.add_argument("-m", "--max-tokens", type=positive, default=32, help="default 32")
    return made.parse_args()


def rows_of(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The flags of bench/peers/greedy.py for each row, by its name."""
    several = ("--nodes", str(options.nodes))
    alone: dict[str, tuple[str, ...]] = {ALONE: (), ONE: ("--nodes", "1")}
    if options.nodes == 1:
        return alone
    return alone | {
        "evaluated": (*several, "--placement", "experts"),
        "zmq": (*several, "--placement", "slices", "--backend", "zmq"),
        "ring": (*several, "--placement", "slices", "--backend", "ring"),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row each: milliseconds a token, how much of mlx-lm's and the ring's that is, and
    what the host takes beyond one node's time and the collectives, in microseconds a layer.
    """
    rows = rows_of(options)
    counts = ("-p", str(options.prompt_tokens), "-n", str(options.max_tokens), "-r", "3")
    program, found = str(BENCH / "peers" / "greedy.py"), {name: list[float]() for name in rows}
    within, layers = {name: list[float]() for name in rows}, 1
    for turn in range(options.runs):
        for name, flags in rows.items():
            print(f"run {turn + 1}, {name}", file=sys.stderr)
            command = [sys.executable, program, options.model, *counts, *flags]
            told = run_json(command, DEADLINE_S)
            found[name].append(told["ms"])
            within[name].append(told.get("exchange_ms", 0.0))
            layers = told.get("layers", layers)
    return [
        {
            "row": name,
            "ms": round(statistics.median(runs), 3),
            "runs": [round(each, 3) for each in runs],
            "to_mlx_lm": _ratio(runs, found[ALONE]),
            "to_ring": _ratio(runs, found["ring"]) if "ring" in found else None,
            "speed_to_mlx_lm": _ratio(found[ALONE], runs),
            "exchange_us_per_layer": _us_per_layer(within[name], layers),
            "host_us_per_layer": _us_per_layer(
                [a - b - c for a, b, c in zip(runs, within[name], found[ONE])], layers
            ),
        }
        for name, runs in found.items()
    ]


def _us_per_layer(ms: list[float], layers: int) -> float:
    return round(1e3 * statistics.median(ms) / layers, 1)


def _ratio(runs: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(runs, others)), 3)


def show(report: Mapping[str, Any]) -> None:
    print(f"{'':12}{'ms/token':>10}{'x mlx-lm':>10}{'x ring':>10}   least, most")
    rows = {row["row"]: row for row in report["results"]}
    for name, row in rows.items():
        spread = f"{min(row['runs']):.2f}, {max(row['runs']):.2f}"
        to_ring = "" if row["to_ring"] is None else f"{row['to_ring']:.2f}"
        ratios = f"{row['to_mlx_lm']:>10.2f}{to_ring:>10}"
        print(f"{name:12}{row['ms']:>10.2f}{ratios}   {spread}")
    print(f"one node decodes at {rows[ONE]['speed_to_mlx_lm']:.2f} x the speed of mlx-lm")
    if "zmq" in rows:
        zmq = rows["zmq"]
        print(
            f"several: {zmq['exchange_us_per_layer']:.0f} us a layer in collectives, and "
            f"{zmq['host_us_per_layer']:.0f} us beyond these and one node's time; "
            f"{zmq['to_ring']:.2f} x the time of the same graph over MLX's ring"
        )


def benchmark() -> int:
    options = arguments()
    block = environment()
    report = {"environment": block, "results": measure(options)}
    block["load_average_after"] = environment()["load_average"]
    finish(options, report, show, of=short_name(options.model))
    return 0


if __name__ == "__main__":
    main(benchmark)
