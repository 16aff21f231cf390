"""`xenolith demo`: several Debian domains at once, and the proof that one's crash is not another's.

What is shown is `toolstack.demonstration`. On a terminal the consoles are side by side under a live table; elsewhere
their lines are printed with the domain's name in front, and what goes on whenever nothing was for two seconds. The exit
status is 0 if everything came out as it must.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import click
from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from xenolith.toolstack.demonstration import Actor, DemonstrationFailed, cast, perform
from xenolith.toolstack.host import ENGINES

LINES_SHOWN: Final = 14
PLAIN_WIDTH: Final = 110  # columns, where the output is no terminal
SILENCE_SECONDS: Final = 2.0


class Show:
    """How the demo is watched: its actors' output and state, as they come."""

    def __init__(self, actors: list[Actor]) -> None:
        self.actors = actors
        self.started = time.monotonic()
        self._stage = ""
        self._lines = {actor.role: deque[str](maxlen=LINES_SHOWN) for actor in actors}

    def stage(self, text: str) -> None:
        self._stage = text

    def line(self, role: str, line: str) -> None:
        self._lines[role].append(line)

    def crash_noticed(self) -> None:
        """It is to be seen."""

    def refresh(self) -> None:
        """It is drawn anew by itself."""

    def table(self) -> Table:
        table = Table(title=f"{self._stage}, {time.monotonic() - self.started:.1f} s", title_justify="left")
        for column in ("Domain", "ID", "State", "MiB", "vCPUs", "CPU (s)", "Traps/s", "Result"):
            table.add_column(column, justify="left" if column in ("Domain", "State", "Result") else "right")
        for actor in self.actors:
            info = actor.info
            if info is None:
                table.add_row(actor.role, "", "not yet made")
                continue
            table.add_row(
                actor.role,
                str(info.domid),
                actor.state,
                str(info.total_pages >> 8),
                str(info.online_vcpus),
                f"{info.cpu_time / 1e9:.1f}",
                f"{actor.traps_per_second:,.0f}",
                actor.verdict,
            )
        return table

    def screen(self) -> Group:
        consoles = Table.grid(expand=True)
        for _ in self.actors:
            consoles.add_column(ratio=1)
        consoles.add_row(
            *(
                Panel(
                    Text("\n".join(self._lines[actor.role]), no_wrap=True, overflow="ellipsis"),
                    title=actor.role,
                    height=LINES_SHOWN + 2,
                )
                for actor in self.actors
            )
        )
        return Group(self.table(), consoles)


class PlainShow(Show):
    """The demo where the output is no terminal: line by line."""

    def __init__(self, actors: list[Actor], terminal: Terminal, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(actors)
        self._terminal = terminal
        self._now = now
        self._last_line = now()
        self._lock = threading.Lock()

    def _print(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)
            self._last_line = self._now()

    def stage(self, text: str) -> None:
        super().stage(text)
        self._print(f"{text[0].upper()}{text[1:]}.")

    def line(self, role: str, line: str) -> None:
        self._print(f"{role:>8} | {line}")

    def crash_noticed(self) -> None:
        self._terminal.print(self.table())

    def refresh(self) -> None:
        if self._now() - self._last_line >= SILENCE_SECONDS:
            doing = ", ".join(f"{actor.role} {actor.state}" for actor in self.actors)
            self._print(f"         ({time.monotonic() - self.started:.0f} s: {doing})")


@click.command()
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    envvar="XENOLITH_ENGINE",
    show_default=True,
    help="What executes guest code. Environment: XENOLITH_ENGINE.",
)
def demo(engine: str) -> None:
    """Boot several Debian domains side by side and show that they are isolated."""
    actors = cast()
    logging.getLogger("xenolith").setLevel(logging.ERROR)
    terminal = Terminal() if sys.stdout.isatty() else Terminal(width=PLAIN_WIDTH)
    try:
        if terminal.is_terminal:
            show = Show(actors)
            with Live(get_renderable=show.screen, console=terminal, refresh_per_second=4):
                failures = perform(actors, engine, show)
        else:
            show = PlainShow(actors, terminal)
            failures = perform(actors, engine, show)
            terminal.print(show.table())
    except DemonstrationFailed as error:
        raise click.ClickException(str(error)) from error
    for failure in failures:
        terminal.print(f"FAILED: {failure}", markup=False)
    if failures:
        sys.exit(1)
    terminal.print(
        "Every domain has memory of its own, and ring 0 keeps it so: the crasher's kernel panicked, the others never "
        "noticed, and what the worker computed beside the dead domain is what the host computes."
    )
