"""A bar for what takes longer than a moment, where a person is watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from xenolith.toolstack.client import OnProgress, Progress, no_progress


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A function to report progress to; it draws on stderr if that is a terminal and says nothing otherwise."""
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(progress: Progress) -> None:
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total or None)

        yield report
