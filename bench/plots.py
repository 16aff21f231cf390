"""Bars in the style of the paper's figure 3: performance in relation to native Linux, the value on each bar."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.published import FIGURE_3, SYSTEMS
from bench.results import Results, cells, relative
from bench.rows import Group, Row
from bench.tables import NATIVE, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Figure 3 shows application benchmarks; the second picture has everything smaller.
MACRO = (Group.MACRO, Group.COMPUTE)
MOST_GROUPS, LABEL_WIDTH = 8, 22  # of bars next to each other; of the text below them, in letters
MICRO = (Group.SYSTEM_CALL, Group.PROCESS, Group.CONTEXT_SWITCH, Group.FILE_AND_MEMORY, Group.NETWORK)


class PlotError(Exception):
    """The plots cannot be drawn."""


def draw(results: Results, directory: Path) -> list[Path]:
    """Write the plots; returns the files."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("matplotlib is not installed: `pip install -e .[evaluation]`") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "xenolith"  # the same results give the same file
    directory.mkdir(parents=True, exist_ok=True)
    if not any(sample.system == NATIVE for sample in results.samples):
        raise PlotError(
            "the plots are in relation to native Linux, which these results lack: measure the system 'native' too"
        )
    drawn = [_published(directory / "figure-3-published.svg")]
    if any(row.group in MACRO for row in results.rows()):
        drawn.append(_measured(results, MACRO, directory / "figure-3.svg", logarithmic=False))
    if any(row.group in MICRO for row in results.rows()):
        drawn.append(_measured(results, MICRO, directory / "latencies.svg", logarithmic=True))
    return drawn


def _published(path: Path) -> Path:
    groups = [group.title for group in FIGURE_3]
    series = [(name, [group.relative()[place] for group in FIGURE_3]) for place, name in enumerate(SYSTEMS)]
    labels = [[number(group.values[place]) for group in FIGURE_3] for place in range(len(SYSTEMS))]
    return _bars(path, "published, SOSP 2003, figure 3", groups, series, labels, logarithmic=False)


def _measured(results: Results, wanted: Sequence[Group], path: Path, *, logarithmic: bool) -> Path:
    table = cells(results)
    rows = [row for row in results.rows() if row.group in wanted and _comparable(table.get((NATIVE, row.name)))]
    systems = results.systems()
    series: list[tuple[str, list[float]]] = []
    labels: list[list[str]] = []
    for system in systems:
        found = [table.get((system, row.name)) for row in rows]
        heights = [
            relative(row, mine.median, table[NATIVE, row.name].median) if mine and mine.median > 0 else 0.0
            for row, mine in zip(rows, found, strict=True)
        ]
        series.append((results.titles[system], heights))
        labels.append([number(mine.median) if mine else "" for mine in found])
    return _bars(path, "measured", [_label(row) for row in rows], series, labels, logarithmic=logarithmic)


def _comparable(summary: object) -> bool:
    return summary is not None and getattr(summary, "median", 0) > 0


def _label(row: Row) -> str:
    return textwrap.fill(f"{row.title} ({row.unit})", LABEL_WIDTH)


def _bars(
    path: Path,
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    labels: Sequence[Sequence[str]],
    *,
    logarithmic: bool,
) -> Path:
    """Groups of bars next to each other, several lines of groups when there are many."""
    from matplotlib import pyplot

    per_line = math.ceil(len(groups) / math.ceil(len(groups) / MOST_GROUPS))
    lines = [range(start, min(start + per_line, len(groups))) for start in range(0, len(groups), per_line)]
    figure, axes = pyplot.subplots(len(lines), 1, figsize=(14, 3.6 * len(lines)), squeeze=False, layout="constrained")
    for line, (axis,) in zip(lines, axes, strict=True):
        for place, (name, heights) in enumerate(series):
            width = 0.86 / len(series)
            x = [group + (place - (len(series) - 1) / 2) * width for group in range(len(line))]
            bars = axis.bar(x, [heights[group] for group in line], width, label=name, edgecolor="black", linewidth=0.4)
            axis.bar_label(bars, [labels[place][group] for group in line], rotation=90, fontsize=7, padding=2)
        _decorate(axis, [groups[group] for group in line], per_line, logarithmic=logarithmic)
    axes[0][0].legend(ncols=len(series), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f"Relative performance, native Linux = 1 ({title})", fontsize=11)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _decorate(axis: Axes, groups: Sequence[str], per_line: int, *, logarithmic: bool) -> None:
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set_xlim(-0.6, per_line - 0.4)
    axis.set_ylabel("relative to native")
    axis.axhline(1, color="grey", linewidth=0.5)
    if logarithmic:
        axis.set_yscale("log")
        axis.margins(y=0.35)
    else:
        axis.set_ylim(0, 1.35)
