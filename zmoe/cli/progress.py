"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
)


class _Console(Console):
    """A console that never hides the cursor, so an early or hard end of the command cannot
    leave it hidden.
    """

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Bars:
    """A context manager that shows one progress bar for each of `labels`.

    The bars count bytes or, with `counted`, what the label says. Without a terminal they show
    nothing.
    """

    def __init__(self, labels: Sequence[str], *, counted: bool = False) -> None:
        console = _Console(stderr=True)
        amount = MofNCompleteColumn() if counted else DownloadColumn()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            amount,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: list[TaskID] = [self._bars.add_task(label, total=None) for label in labels]

    def __call__(self, index: int, done: int, total: int) -> None:
        self._bars.update(self._tasks[index], completed=done, total=total)

    def print(self, text: str) -> None:
        """Print `text` above the bars."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()
