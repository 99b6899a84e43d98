"""How long one all-reduce takes between processes on loopback: ours, raw TCP and the peers.

A step is over for a rank when it has sent its payload to all and holds all of
theirs (summed, but for raw TCP); the next step starts at once. The figures are
those of rank 0. All transports of one node count are up at the same time, idle
ones asleep, and take turns in several rounds, so that what else the machine
does hits them alike; a figure is the median over the rounds of that round's
percentile. Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import (
    Absent,
    BenchError,
    check_table_flags,
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
from group import Group
from transports import TRANSPORTS, Transport, ours

from zmoe.config import WIRE_DTYPES
from zmoe.exchange.algorithm import ALGORITHMS

TRIAL = 20  # steps that tell how many fit the budget
ROUND_SECONDS = 0.5  # most that one transport's turn may take
FEWEST = 10  # steps of a turn, however slow

Samples = dict[tuple[str, int, int], list[list[int]]]  # (transport, nodes, bytes): rounds


def payload(text: str) -> int:
    """An argparse type: a payload in bytes, whole float32 elements."""
    value: int = positive(text)
    if value % 4:
        raise argparse.ArgumentTypeError(f"{text} bytes are no whole float32 elements")
    return value


def several(text: str) -> int:
    """An argparse type: a node count, 2 to 64."""
    value = positive(text)
    if not 2 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text} nodes: between 2 and 64 exchange anything")
    return value


def known(text: str) -> Transport:
    """An argparse type: a transport's name."""
    if text not in TRANSPORTS:
        raise argparse.ArgumentTypeError(f"unknown transport {text!r} ({', '.join(TRANSPORTS)})")
    return TRANSPORTS[text]


def arguments() -> argparse.Namespace:
    made = parser("Time one all-reduce between processes on loopback, over several transports.")
    made.add_argument("--nodes", type=list_of(several), default=[2, 3, 4], help="default 2,3,4")
    made.add_argument(
        "--bytes",
        type=list_of(payload),
        default=[64, 12 * 1024, 64 * 1024, 1536 * 1024],
        help="payload of each rank; default 64,12288,65536,1572864",
    )
    made.add_argument("--iterations", type=positive, default=1000, help="most steps in a round")
    made.add_argument("--rounds", type=positive, default=7)
    made.add_argument(
        "--transports",
        type=list_of(known),
        default=list(TRANSPORTS.values()),
        help=f"default {','.join(TRANSPORTS)}",
    )
    made.add_argument(
        "--algorithm",
        type=list_of(one_of(ALGORITHMS)),
        default=["auto"],
        help=f"of zmoe and zmoe-c, a row each: {','.join(ALGORITHMS)}; default auto",
    )
    made.add_argument(
        "--wire-dtype",
        type=list_of(one_of(WIRE_DTYPES[1:])),
        default=["f32"],
        help=f"of zmoe and zmoe-c, a row each: {','.join(WIRE_DTYPES[1:])}; default f32",
    )
    made.add_argument(
        "--checksum",
        type=list_of(one_of(("on", "off"))),
        default=["on"],
        help="of the payloads of zmoe and zmoe-c, a row each: on,off; default on",
    )
    made.add_argument(
        "--links",
        type=list_of(one_of(("plain", "curve"))),
        default=["plain"],
        help="of zmoe and zmoe-c, a row each: plain, or encrypted with curve; default plain",
    )
    table_flags(made)
    options = made.parse_args()
    check_table_flags(made, options)
    return options


def spread(options: argparse.Namespace) -> list[Transport]:
    """The transports to time; ours in every way that was asked for."""
    found: list[Transport] = []
    for transport in options.transports:
        mode = {"zmoe-c": "c", "zmoe": "mlx"}.get(transport.name)
        if mode is None:
            found.append(transport)
            continue
        ways = itertools.product(
            options.algorithm, options.wire_dtype, options.checksum, options.links
        )
        found += [ours(mode, *way) for way in ways]
    return found


def available(
    transports: Sequence[Transport], workdir: Path, absent: dict[str, str]
) -> list[Transport]:
    """Those of `transports` that can run here; why not goes to `absent`."""
    usable = []
    for transport in transports:
        try:
            transport.build(workdir)
            usable.append(transport)
        except Absent as reason:
            absent[transport.name] = str(reason)
    return usable


class Run:
    """One run: measures, and keeps what could not be measured."""

    def __init__(self, options: argparse.Namespace, workdir: Path) -> None:
        self.options, self.workdir = options, workdir
        self.samples: Samples = {}
        self.absent: dict[str, str] = {}
        self.failures: list[str] = []

    def measure(self) -> None:
        transports = available(spread(self.options), self.workdir, self.absent)
        for nodes in self.options.nodes:
            with ExitStack() as stack:
                groups = []
                for transport in transports:
                    group = self._start(transport, nodes)
                    if group is not None:
                        groups.append(stack.enter_context(group))
                for size in self.options.bytes:
                    print(f"{nodes} nodes, {size} bytes", file=sys.stderr)
                    self._rounds(groups, size)

    def _start(self, transport: Transport, nodes: int) -> Group | None:
        largest = max(self.options.bytes)
        try:
            return Group(
                transport.name,
                nodes,
                lambda control: transport.start(self.workdir, control, nodes, largest),
            )
        except BenchError as error:
            self._fail(transport.name, error)
            return None

    def _fail(self, name: str, error: BenchError) -> None:
        print(f"exchange.py: {error}", file=sys.stderr)
        self.absent[name] = f"failed: {error}"
        self.failures.append(str(error))

    def _rounds(self, groups: list[Group], size: int) -> None:
        """Let `groups` take turns; one that fails leaves the list."""
        counts: dict[str, int] = {}
        for turn in range(1 + self.options.rounds):
            for group in list(groups):
                try:
                    if turn == 0:
                        counts[group.name] = self._affordable(group, size)
                        continue
                    warmup = max(2, counts[group.name] // 10)
                    taken = group.run(size, counts[group.name], warmup)
                except BenchError as error:
                    self._fail(group.name, error)
                    groups.remove(group)
                    continue
                key = (group.name, group.nodes, size)
                self.samples.setdefault(key, []).append(taken)

    def _affordable(self, group: Group, size: int) -> int:
        """How many steps of `size` bytes fit into ROUND_SECONDS."""
        step_ns = float(statistics.median(group.run(size, TRIAL, TRIAL)))
        fitting = int(ROUND_SECONDS * 1e9 / step_ns)
        most: int = self.options.iterations
        return min(most, max(FEWEST, fitting))


def percentile(samples: Sequence[int], share: float) -> int:
    """The smallest sample that is not exceeded by `share` of them."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def rows(samples: Samples) -> list[dict[str, Any]]:
    """The result rows, in microseconds."""
    made = []
    for (transport, nodes, size), rounds in samples.items():
        row: dict[str, Any] = {"transport": transport, "nodes": nodes, "bytes": size}
        for name, share in (("p50_us", 0.5), ("p99_us", 0.99)):
            middle = statistics.median(percentile(each, share) for each in rounds)
            row[name] = round(middle / 1000, 2)
        made.append(row)
    return made


def show(report: Mapping[str, Any]) -> None:
    """A table with each figure's ratio to raw-tcp's of the same nodes and bytes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("nodes", "bytes", "transport", "p50 µs", "p99 µs", "x raw-tcp")
    for column in (0, 1, 3, 4, 5):
        table.columns[column].justify = "right"
    results = report["results"]
    limit = {(r["nodes"], r["bytes"]): r["p50_us"] for r in results if r["transport"] == "raw-tcp"}
    before = None
    for row in results:
        cell = (row["nodes"], row["bytes"])
        if before not in (None, cell):
            table.add_section()
        ratio = f"{row['p50_us'] / limit[cell]:.2f}" if cell in limit else "-"
        figures = (f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}", ratio)
        table.add_row(str(cell[0]), str(cell[1]), row["transport"], *figures)
        before = cell
    console = Console()
    console.print(table)
    for name, reason in report["absent"].items():
        console.print(f"absent: {name}: {reason}", highlight=False)


def markdown(report: Mapping[str, Any]) -> None:
    """Microseconds of a step: transports and node counts by bytes."""
    rows = report["results"]
    found = {(row["transport"], row["nodes"], row["bytes"]): row["p50_us"] for row in rows}
    sizes = list(dict.fromkeys(row["bytes"] for row in rows))
    lines = [
        [
            name,
            str(nodes),
            *(_microseconds(found.get((name, nodes, size))) for size in sizes),
        ]
        for nodes, name in dict.fromkeys((row["nodes"], row["transport"]) for row in rows)
    ]
    markdown_table(["p50 µs", "nodes", *(f"{size} B" for size in sizes)], lines)
    print(f"\n{measured_with(report)}")


def _microseconds(taken: float | None) -> str:
    return "-" if taken is None else f"{taken:.{1 if taken < 100 else 0}f}"


def benchmark() -> int:
    options = arguments()
    if options.kept:
        finish(options, kept(), markdown if options.markdown else show)
        return 0
    block = environment()
    with tempfile.TemporaryDirectory(prefix="bench") as workdir:
        run = Run(options, Path(workdir))
        run.measure()
    block["load_average_after"] = environment()["load_average"]
    finish(
        options,
        {"environment": block, "results": rows(run.samples), "absent": run.absent},
        markdown if options.markdown else show,
    )
    if run.failures:  # said again at the end, where whoever started this looks for it
        raise BenchError("; ".join(run.failures))
    return 0


if __name__ == "__main__":
    main(benchmark)
