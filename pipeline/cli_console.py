"""What the command line shows: bars on a terminal, plain lines elsewhere, tables, and one line an error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

QUIET_S = 2.0
"""Work shorter than this shows nothing."""

LINE_EVERY_S = 15.0
"""Without a terminal, at most one line of progress in this time."""


class TerminalConsole:
    """Progress and notes on standard error; results belong on standard output."""

    def __init__(self) -> None:
        self._rich: RichConsole | None = None
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` of `what`; shown once it has taken longer than a moment."""
        now = time.monotonic()
        started = self._started.setdefault(what, now)
        if sys.stderr.isatty():
            self._bar(what, done, total, detail)
        elif done == total or now - self._told.get(what, started) > LINE_EVERY_S:
            if now - started > QUIET_S:
                self.note(f"{what}: {done} of {total}" + (f", {detail}" if detail else ""))
            self._told[what] = now
        if done == total:
            self._started.pop(what, None)
            self._told.pop(what, None)

    def note(self, message: str) -> None:
        """One line worth reading."""
        if self._bars is not None:
            self._bars.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def _bar(self, what: str, done: int, total: int, detail: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._bars = Progress(*columns, console=RichConsole(stderr=True), transient=True)
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, detail=detail)
        self._bars.update(self._tasks[what], completed=done, total=total, detail=detail)
        if done == total:
            self._bars.remove_task(self._tasks.pop(what))


def show_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows that share their keys, as a table on standard output; on a pipe as wide as it needs to be."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", header_style="bold")
    if not sys.stdout.isatty():
        table.box, table.pad_edge = None, False
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = RichConsole() if sys.stdout.isatty() else RichConsole(width=_width(rows, columns))
    console.print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"
    return escape(str(value))


def _width(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> int:
    sides = [max(len(column), *(len(str(row.get(column))) for row in rows)) for column in columns]
    return sum(sides) + 3 * len(columns) + 4
