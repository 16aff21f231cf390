"""`python -m bench`: measure, print, keep; or print and draw what was kept."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from bench import rows as catalogue
from bench import tables
from bench.image import BUILD, BuildError
from bench.packages import PackageError
from bench.plots import PlotError, draw
from bench.profiles import profile
from bench.report import render
from bench.results import Results, ResultsError
from bench.runner import Plan, run
from bench.systems import BY_NAME, SYSTEMS, Absent, System

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "evaluation.md"

QUICK_ROUNDS, QUICK_BUDGET, QUICK_SECONDS = 3, 0.25, 600.0
FULL_ROUNDS, FULL_BUDGET = 3, 0.5
MACRO_BUDGET = 2


class Names(click.ParamType[list[str]]):
    """Names separated by commas."""

    name = "name,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return value if isinstance(value, list) else [part for part in str(value).split(",") if part]


@click.command(epilog="With no option, the full set is measured. Files go to bench/results unless named.")
@click.option("--list", "listing", is_flag=True, help="Show rows and systems, and whether each system can run here.")
@click.option("--quick", is_flag=True, help="A smaller set of rows, which ends within ten minutes.")
@click.option("--rows", type=Names(), help="Only these rows or groups of rows.")
@click.option("--systems", "system_names", type=Names(), help="Only these systems.")
@click.option("--rounds", type=click.IntRange(min=1), help=f"Rounds over all systems (default {FULL_ROUNDS}).")
@click.option("--budget", type=click.FloatRange(min=0.05), help=f"Seconds for a row (default {FULL_BUDGET}).")
@click.option("--profile", "profiling", is_flag=True, help="Count traps too: one more domain of ours for each row.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the raw results.")
@click.option(
    "--show", "shown", type=click.Path(path_type=Path), help="Measure nothing: print the table of raw results."
)
@click.option(
    "--report",
    "reported",
    type=click.Path(path_type=Path),
    help="Measure nothing: write docs/evaluation.md from raw results.",
)
@click.option("--again", type=click.Path(path_type=Path), help="With --report: raw results of a second run.")
def main(
    listing: bool,
    quick: bool,
    rows: list[str] | None,
    system_names: list[str] | None,
    rounds: int | None,
    budget: float | None,
    profiling: bool,
    json_path: Path | None,
    shown: Path | None,
    reported: Path | None,
    again: Path | None,
) -> None:
    """Compare Xenolith with native Linux and with what one would use instead."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that systems under test are stopped too
    try:
        systems = _systems(system_names)
        if listing:
            _list(console, systems)
        elif shown:
            console.print(tables.terminal(Results.read(shown)))
        elif reported:
            _report(console, Results.read(reported), Results.read(again) if again else None)
        else:
            default = catalogue.quick_rows() if quick else catalogue.ROWS
            plan = Plan(
                rows=catalogue.select(rows) if rows else default,
                systems=systems,
                rounds=rounds or (QUICK_ROUNDS if quick else FULL_ROUNDS),
                budget=budget or (QUICK_BUDGET if quick else FULL_BUDGET),
                macro_budget=MACRO_BUDGET // 2 if quick else MACRO_BUDGET,
                seconds=QUICK_SECONDS if quick else None,
            )
            _measure(console, plan, profiling, json_path)
    except (BuildError, PackageError, PlotError, ResultsError, catalogue.UnknownRow) as error:
        raise click.ClickException(str(error)) from error


def _systems(names: list[str] | None) -> tuple[System, ...]:
    for name in names or []:
        if name not in BY_NAME:
            raise click.BadParameter(
                f"no system is called '{name}'; there are {', '.join(BY_NAME)}", param_hint="--systems"
            )
    return tuple(system for system in SYSTEMS if not names or system.name in names)


def _list(console: Console, systems: tuple[System, ...]) -> None:
    console.print("[bold]rows[/bold] (* in the quick set)")
    for row in catalogue.ROWS:
        console.print(f"  {'*' if row.quick else ' '} {row.name:18}{row.title} ({row.unit})", highlight=False)
    console.print("[bold]systems[/bold]")
    for system in systems:
        try:
            state = system.prepare()
        except Absent as error:
            state = f"absent: {error}"
        console.print(f"    {system.name:18}{system.title}: {state}", highlight=False)


def _measure(console: Console, plan: Plan, profiling: bool, json_path: Path | None) -> None:
    def say(text: str) -> None:
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False)

    results = run(plan, say)
    if profiling:
        profile(plan, results, BUILD / "full.cpio", say)
    path = json_path or HERE / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    results.write(path)
    console.print(tables.terminal(results))
    say(f"raw results: {path}")
    if not results.samples:
        raise click.ClickException("nothing could be measured; the reasons are above")


def _report(console: Console, results: Results, again: Results | None) -> None:
    plots = draw(results, DOCUMENT.parent / "evaluation")
    DOCUMENT.write_text(render(results, plots, DOCUMENT, again))
    console.print(f"written: {DOCUMENT}" + "".join(f"\n         {plot}" for plot in plots), highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench")
