"""How bench/ladder.py's report is shown: a table, the tables of docs/ladder.md, a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import BenchError, markdown_table

PARTS = {"experts": "#4878a8", "exchange": "#d1605e", "other": "#b8b0ac"}
# What arXiv 2506.23635 measured with DBRX in bfloat16 on Mac Studios: tokens/s, exchange's share.
PAPER_TPS = {("naive", 2): 1.2, ("P+L_R+D", 2): 6.1, ("P+L_R+D", 4): 7.0}
PAPER_SHARE = {("P+L_R+D", 2): 0.23, ("P+L_R+D", 4): 0.33}
# The schedules compared with all else equal: centralised, decentralised.
PAIRS = (("P", "D"), ("P+L_R", "P+L_R+D"))
COLUMNS = (
    "",
    "experts",
    "exchange",
    "other",
    "exchange's share",
    "the paper's",
    "messages",
    "experts executed",
    "GB read",
)
SHARED_MACHINE = (
    "All nodes are processes of one machine and share its cores and memory: more nodes read more "
    "bytes in all, and cannot be faster for it."
)

Row = Mapping[str, Any]


def _number(row: Row, name: str, digits: int) -> str:
    value = row.get(name)
    return "-" if value is None else f"{value:.{digits}f}"


def _gigabytes(row: Row, name: str) -> str:
    value = row.get(name)
    return "-" if value is None else f"{value / 1e9:.3g}"


def exchange_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Exchange time of a layer, centralised over decentralised, where both were measured."""
    by_name = {(row["rung"], row["nodes"]): row for row in rows}
    found = []
    for central, other in PAIRS:
        for nodes in sorted({row["nodes"] for row in rows}):
            one, two = by_name.get((central, nodes)), by_name.get((other, nodes))
            if one is None or two is None:
                continue
            ratios = {
                f"{name}_ratio": round(one[f"layer_{name}_ms"] / two[f"layer_{name}_ms"], 2)
                for name in ("exchange", "exchange_p50")
            }
            found.append({"centralized": central, "decentralized": other, "nodes": nodes, **ratios})
    return found


def show(report: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows, console = report["results"], Console()
    speeds = ["rung", "n", f"tg{rows[0]['generation_tokens']}", "x", "limit"]
    speeds += [f"pp{rows[0]['prompt_tokens']}", "x", "executed", "GB", "messages"]
    layers = ["rung", "n", "layer", "experts", "exchange", "p50", "other", "share"]
    for titles, cells in ((speeds, _speed_cells), (layers, _layer_cells)):
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for title in titles:
            table.add_column(title, justify="left" if title == "rung" else "right", no_wrap=True)
        for row in rows:
            table.add_row(row["rung"], str(row["nodes"]), *cells(row))
        console.print(table)
    for line in (*_pair_lines(report), *_limit_lines(report)):
        console.print(line, highlight=False)
    console.print(
        "tg, pp: tokens/s of decode and prefill; x: as a multiple of the rung before; limit: if "
        "memory were read at full speed. executed: experts that the busiest node computes in a "
        "layer; GB: read by all nodes for a token. Of a layer of a decode step, in ms: experts of "
        "the busiest node; exchange beyond them, mean and median; other. share: exchange's. "
        + SHARED_MACHINE,
        highlight=False,
    )


def _speed_cells(row: Row) -> list[str]:
    return [
        _number(row, "generation_tps", 2),
        _number(row, "generation_ratio", 2),
        _number(row, "limit_tps", 1),
        _number(row, "prompt_tps", 1),
        _number(row, "prompt_ratio", 2),
        _number(row, "executed_experts", 2),
        _gigabytes(row, "all_nodes_bytes"),
        _number(row, "messages_per_layer", 1),
    ]


def _layer_cells(row: Row) -> list[str]:
    names = ("layer_ms", "layer_experts_ms", "layer_exchange_ms", "layer_exchange_p50_ms")
    cells = [_number(row, name, 3) for name in (*names, "layer_other_ms")]
    return [*cells, f"{row['exchange_share']:.1%}"]


def _pair_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"exchange of a layer on {pair['nodes']} nodes: {pair['centralized']}'s takes "
        f"{pair['exchange_ratio']:.2f} times {pair['decentralized']}'s, "
        f"{pair['exchange_p50_ratio']:.2f} by medians"
        for pair in report["exchange_ratios"]
    ]


def _limit_lines(report: Mapping[str, Any]) -> list[str]:
    limits = report["limits"]
    reads = ", ".join(f"{speed:.1f} GB/s on {n}" for n, speed in limits["read_gb_per_s"].items())
    exchanges = [
        f"one exchange of {row['bytes']} bytes among {row['nodes']} processes that do nothing "
        f"else, {row['transport']}: {row['p50_us']:.0f} us"
        for row in limits["exchange_us"]
    ]
    absent = [f"absent: {name}: {reason}" for name, reason in report["absent"].items()]
    return [f"reading memory, by cores: {reads}", *exchanges, *absent]


# ---- docs/ladder.md ----------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> None:
    """Two tables and what they were measured with."""
    rows, where = report["results"], report["environment"]
    counts = sorted({row["nodes"] for row in rows})
    names = list(dict.fromkeys(row["rung"] for row in rows))
    by_name = {(row["rung"], row["nodes"]): row for row in rows}
    print(f"`{' '.join(where['command'])}`, {where['cpu']}, {where['cores']} cores,")
    print(f"{report['layers']} layers, zmoe {(where['commit'] or 'unknown')[:12]}.\n")
    markdown_table(
        ["tokens/s", *(f"{n} nodes" for n in counts), *(f"the paper, {n}" for n in (2, 4))],
        [
            [
                name,
                *(_speed(by_name.get((name, n))) for n in counts),
                *(str(PAPER_TPS.get((name, n), "")) for n in (2, 4)),
            ]
            for name in names
        ],
    )
    for nodes in counts:
        print(f"\nA layer on {nodes} nodes, in ms:\n")
        markdown_table(
            COLUMNS,
            [_cells(by_name[name, nodes]) for name in names if (name, nodes) in by_name],
        )
    print(f"\n{SHARED_MACHINE}\n")
    for line in (*_pair_lines(report), *_limit_lines(report)):
        print(f"- {line}")


def _speed(row: Row | None) -> str:
    if row is None:
        return "-"
    ratio = row.get("generation_ratio")
    return f"{row['generation_tps']:.2f}" + ("" if ratio is None else f" ({ratio:.2f}x)")


def _cells(row: Row) -> list[str]:
    share = PAPER_SHARE.get((row["rung"], row["nodes"]))
    return [
        row["rung"],
        _number(row, "layer_experts_ms", 2),
        _number(row, "layer_exchange_ms", 3),
        _number(row, "layer_other_ms", 2),
        f"{row['exchange_share']:.1%}",
        "" if share is None else f"{share:.0%}",
        _number(row, "messages_per_layer", 1),
        _number(row, "executed_experts", 2),
        _gigabytes(row, "all_nodes_bytes"),
    ]


# ---- plot ----------------------------------------------------------------------------


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of a layer's parts, a group a rung; BenchError for a file that can't be."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = report["results"]
    counts = sorted({row["nodes"] for row in rows})
    names = list(dict.fromkeys(row["rung"] for row in rows))
    figure = Figure(figsize=(2 + 1.3 * len(names), 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(counts)
    for row in rows:
        at = names.index(row["rung"]) - 0.4 + (counts.index(row["nodes"]) + 0.5) * width
        floor = 0.0
        for part, color in PARTS.items():
            height = max(0.0, row[f"layer_{part}_ms"])
            axes.bar(at, height, 0.9 * width, floor, color=color)
            floor += height
        label = f"{row['generation_tps']:.3g}\n({row['nodes']})"
        axes.annotate(label, (at, floor), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("ms of a layer")
    axes.set_title(f"{rows[0]['model']}, decode; above the bars: tokens/s (nodes)", fontsize=10)
    axes.legend(handles=[Patch(color=color, label=part) for part, color in PARTS.items()])
    axes.margins(y=0.12)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write {path}: {error}") from None
