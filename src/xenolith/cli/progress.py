"""A bar for what takes longer than a moment, where a person is watching."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from xenolith.toolstack.client import OnProgress, Progress, no_progress

PATIENCE_S: Final = 1.0  # what is done sooner needs no bar


def tell_of_downloads(*others: str) -> None:
    """Say on standard error what is being fetched, and what the loggers of these names tell."""
    logging.basicConfig(stream=sys.stderr, format="xenolith: %(message)s")
    for name in ("xenolith.debian.packages", *others):
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def progress_bar(now: Callable[[], float] = time.monotonic) -> Iterator[OnProgress]:
    """A function to report progress to; it draws on stderr if that is a terminal and says nothing otherwise."""
    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=terminal, transient=True)
    task = bar.add_task("", total=None)
    patient_until = now() + PATIENCE_S

    def report(progress: Progress) -> None:
        if now() >= patient_until:
            bar.start()
        bar.update(task, description=progress.stage, completed=progress.done, total=progress.total or None)

    try:
        yield report
    finally:
        bar.stop()
