"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn


class Bars:
    """A bar of bytes for each of `labels` while it lasts; silent without a terminal."""

    def __init__(self, labels: Sequence[str]) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._bars = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._tasks: list[TaskID] = [self._bars.add_task(label, total=None) for label in labels]

    def __call__(self, index: int, done: int, total: int) -> None:
        self._bars.update(self._tasks[index], completed=done, total=total)

    def print(self, text: str) -> None:
        """Lines above the bars."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
