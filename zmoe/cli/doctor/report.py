"""The results as a table in Markdown, and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from zmoe import __version__
from zmoe.cli.doctor.check import Result


def report_of(results: Sequence[Result]) -> dict[str, Any]:
    """Return the object of `--json`."""
    failed = sum(not result.ok for result in results)
    environment = {"zmoe": __version__, "failed": failed}
    return {"environment": environment, "results": [asdict(result) for result in results]}


def show(results: Sequence[Result]) -> None:
    """Print a table to paste into an issue: a line for each check, however long it is."""
    table = Table("check", "", "found", "s", box=box.MARKDOWN)
    table.columns[-1].justify = "right"
    for result in results:
        cells = (result.check, "ok" if result.ok else "FAILED", result.value)
        texts = [Text(cell.replace("|", r"\|"), no_wrap=True) for cell in cells]
        table.add_row(*texts, f"{result.seconds:.1f}")
    console = Console()
    wanted = Measurement.get(console, console.options.update(width=1 << 16), table).maximum
    Console(width=max(wanted, console.width)).print(table)
