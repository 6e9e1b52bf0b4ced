"""What the commands draw: progress and tables on stderr, data on stdout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from mtu_compile.core.progress import Advance, Progress, ignore


class ConsoleProgress(Progress):
    """Bars on a terminal, one plain line a stage elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        began = time.monotonic()
        if not self._console.is_terminal:
            yield ignore
            self._console.print(f"{title}: {time.monotonic() - began:.1f} s")
            return
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
        )
        if total is None:
            columns = columns[:2]  # type: ignore[assignment]
        with Bars(*columns, TimeElapsedColumn(), console=self._console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda units: bars.advance(task, units)
            bars.update(task, total=total or 1, completed=total or 1)

    def note(self, message: str) -> None:
        self._console.print(f"warning: {message}", markup=False, soft_wrap=True)

    def tell(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, quiet: bool = False) -> None:
    """Print a table on stdout."""
    if quiet:
        return
    drawn = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(drawn)
