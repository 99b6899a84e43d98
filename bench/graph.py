"""What the exchange in MLX's graph costs: decoding on MLX by mlx-lm, and in each form by zmoe.

On a CPU a tiny, deep model stands in for a GPU's host: what it takes is the host's work. The
rows take turns; a ratio is the median over the rounds of each round's ratio.

Nodes of one machine share its cores, so that one node on all of them is no measure for what
several have to compute. That is the row "a slice": the graph of a node of these, on the cores
that zmoe gives such a node, without the exchanges.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from common import BENCH, environment, finish, main, parser, positive, run_json, short_name

from zmoe.topology.cores import divide_cores

DEADLINE_S = 600.0
ALONE, ONE, SLICE, ZMQ = "mlx-lm", "one node", "a slice", "zmq"


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
    cores = divide_cores(options.nodes)
    pinned = ("--cores", ",".join(map(str, cores[0]))) if cores is not None else ()
    return alone | {
        SLICE: ("--slice-of", str(options.nodes), *pinned),
        "evaluated": (*several, "--placement", "experts"),
        ZMQ: (*several, "--placement", "slices", "--backend", "zmq"),
        "ring": (*several, "--placement", "slices", "--backend", "ring"),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row each: milliseconds a token, how much of mlx-lm's and the ring's that is, and
    microseconds a layer: `beyond_us_per_layer` what several take longer than a slice; in zmoe's
    collectives, where a node waits for the others, too, `exchange_us_per_layer`; and what
    remains of the former without these, `host_us_per_layer`, which is negative where a node
    builds the next step's graph while a collective waits.
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
    several = found.keys() - {ALONE, ONE, SLICE}
    return [
        {
            "row": name,
            "ms": round(statistics.median(runs), 3),
            "runs": [round(each, 3) for each in runs],
            "to_mlx_lm": _ratio(runs, found[ALONE]),
            "to_ring": _ratio(runs, found["ring"]) if "ring" in found else None,
            "speed_to_mlx_lm": _ratio(found[ALONE], runs),
            **(_per_layer(runs, found[SLICE], within[name], layers) if name in several else {}),
        }
        for name, runs in found.items()
    ]


def _per_layer(
    runs: list[float], alone: list[float], within: list[float], layers: int
) -> dict[str, float]:
    beyond = [a - b for a, b in zip(runs, alone)]
    return {
        "beyond_us_per_layer": _us_per_layer(beyond, layers),
        "exchange_us_per_layer": _us_per_layer(within, layers),
        "host_us_per_layer": _us_per_layer([a - b for a, b in zip(beyond, within)], layers),
    }


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
    if ZMQ in rows:
        zmq = rows[ZMQ]
        print(
            f"several: {zmq['beyond_us_per_layer']:.0f} us a layer beyond a slice, "
            f"{zmq['host_us_per_layer']:.0f} us beyond that and the collectives' "
            f"{zmq['exchange_us_per_layer']:.0f} us; {zmq['to_ring']:.2f} x the time of the same "
            "graph over MLX's ring"
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
