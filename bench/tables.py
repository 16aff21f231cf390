"""Tables for people: in the terminal (rich) and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import groupby

from rich.table import Table

from bench.results import Cells, Results, Summary, cells, relative
from bench.rows import Row

NATIVE = "native"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return "0" if value == 0 else f"{Decimal(f'{value:.2e}'):,f}"


def cell(summary: Summary | None) -> str:
    """The median, with the range when there was more than one round."""
    if summary is None:
        return "-"
    if summary.rounds == 1:
        return number(summary.median)
    return f"{number(summary.median)} ({number(summary.low)}-{number(summary.high)})"


def ratio(row: Row, system: str, table: Cells) -> str:
    """Performance in relation to native, where there is a native value."""
    mine, native = table.get((system, row.name)), table.get((NATIVE, row.name))
    if mine is None or native is None or system == NATIVE or native.median <= 0 or mine.median <= 0:
        return ""
    return f"{number(relative(row, mine.median, native.median))}x"


def terminal(results: Results) -> Table:
    """One table of all rows: medians, and performance in relation to native below."""
    systems, table = results.systems(), cells(results)
    drawn = Table(title="medians (lowest-highest round); below: speed in relation to native", show_lines=False)
    drawn.add_column("row", no_wrap=True)
    drawn.add_column("unit")
    for system in systems:
        drawn.add_column(results.titles[system], justify="right")
    for group, rows in groupby(results.rows(), key=lambda row: row.group):
        drawn.add_section()
        drawn.add_row(f"[bold]{group.value}")
        for row in rows:
            drawn.add_row(row.title, row.unit, *(_terminal_cell(row, system, table) for system in systems))
    return drawn


def _terminal_cell(row: Row, system: str, table: Cells) -> str:
    text, against = cell(table.get((system, row.name))), ratio(row, system, table)
    return f"{text}\n[dim]{against}[/dim]" if against else text


def markdown(results: Results) -> str:
    """One Markdown table for each group of rows."""
    systems, table = results.systems(), cells(results)
    parts: list[str] = []
    for group, rows in groupby(results.rows(), key=lambda row: row.group):
        heading = group.value[0].upper() + group.value[1:]
        header = ["", "unit", *(results.titles[system] for system in systems)]
        body = [[row.title, row.unit, *(cell(table.get((system, row.name))) for system in systems)] for row in rows]
        parts.append(f"### {heading}\n\n" + "\n".join(markdown_rows(header, body)) + "\n")
    return "\n".join(parts)


def markdown_rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, numbers to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|---" + "|---:" * (len(header) - 2) + "|"
    for line in body:
        yield "| " + " | ".join(line) + " |"
