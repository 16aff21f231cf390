"""The plots: that they hold what was measured, not how they look."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.plots import PlotError, draw
from bench.results import Results, Sample

pytest.importorskip("matplotlib", reason="the optional extra 'evaluation' is not installed")


def results_with(*samples: Sample) -> Results:
    titles = {"native": "native Linux", "uml": "User-Mode Linux"}
    return Results("now", "python -m bench", {}, {}, titles=titles, samples=list(samples))


def test_each_kind_of_row_gets_its_plot_beside_the_papers(tmp_path: Path) -> None:
    results = results_with(
        Sample("native", "tcc", 1, 100.0), Sample("uml", "tcc", 1, 250.0), Sample("native", "stat", 1, 1.0)
    )
    drawn = draw(results, tmp_path)
    assert [path.name for path in drawn] == ["figure-3-published.svg", "figure-3.svg", "latencies.svg"]
    assert all(path.read_text().rstrip().endswith("</svg>") for path in drawn)


def test_the_same_results_give_the_same_file(tmp_path: Path) -> None:
    results = results_with(Sample("native", "tcc", 1, 100.0), Sample("uml", "tcc", 1, 250.0))
    first, second = draw(results, tmp_path / "a"), draw(results, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_without_native_values_there_is_nothing_to_relate_to(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="native"):
        draw(results_with(Sample("uml", "tcc", 1, 250.0)), tmp_path)
