"""From raw values to medians, ratios and warnings."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.host import CpuTimes
from bench.results import (
    Failure,
    Profile,
    Results,
    ResultsError,
    Sample,
    cells,
    relative,
    summarize,
    wrong_clocks,
)
from bench.rows import BY_NAME
from hypothesis import given
from hypothesis import strategies as st


def results_with(*samples: Sample) -> Results:
    titles = {"native": "native Linux", "uml": "User-Mode Linux"}
    return Results("now", "python -m bench", {"cpu": "one"}, {"rounds": 3}, titles=titles, samples=list(samples))


def test_a_summary_is_the_median_with_the_lowest_and_the_highest_round() -> None:
    summary = summarize([5.0, 1.0, 3.0])
    assert (summary.median, summary.low, summary.high, summary.rounds) == (3.0, 1.0, 5.0, 3)
    assert summarize([1.0, 2.0]).median == 1.5


@given(st.lists(st.floats(0.001, 1e9), min_size=1))
def test_the_median_lies_within_the_range(values: list[float]) -> None:
    summary = summarize(values)
    assert summary.low <= summary.median <= summary.high
    assert summary.spread >= 0


def test_cells_gather_the_rounds_of_one_row_of_one_system() -> None:
    results = results_with(
        Sample("native", "stat", 1, 1.0), Sample("native", "stat", 2, 3.0), Sample("uml", "stat", 1, 14.0)
    )
    table = cells(results)
    assert table["native", "stat"].median == 2.0
    assert table["uml", "stat"].rounds == 1


def test_relative_performance_is_above_one_for_the_faster_whatever_the_unit() -> None:
    assert relative(BY_NAME["stat"], 1.0, 2.0) == 2.0  # half the time
    assert relative(BY_NAME["sha256"], 2.0, 1.0) == 2.0  # twice the rate
    assert relative(BY_NAME["stat"], 0.0, 2.0) == 0.0  # nothing to divide by


def test_a_guest_whose_clock_disagrees_with_the_hosts_is_named() -> None:
    right = Sample("uml", "stat", 1, 1.0, guest_seconds=2.0, host_seconds=2.1)
    slow = Sample("uml", "sieve", 1, 1.0, guest_seconds=1.0, host_seconds=3.0)
    fast = Sample("uml", "pipe", 1, 1.0, guest_seconds=9.0, host_seconds=3.0)
    assert wrong_clocks(results_with(right, slow, fast)) == [slow, fast]


def test_results_survive_their_file(tmp_path: Path) -> None:
    results = results_with(Sample("native", "stat", 1, 1.25, 1000, 0.5, 0.6, 1.5, 0.25))
    results.failures.append(Failure("uml", "pipe", 1, "hung"))
    results.profiles.append(Profile("uml", "stat", 10, {"traps.syscall": 20.0}))
    results.write(tmp_path / "new" / "r.json")
    assert Results.read(tmp_path / "new" / "r.json") == results


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "samples": [{"x": 1}]}'])
def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"other\.json"):
        Results.read(path)


def test_steal_is_the_share_of_ticks_that_the_host_took() -> None:
    before = CpuTimes.parse("cpu  100 0 100 800 0 0 0 0 50 0\ncpu0 1\n")
    after = CpuTimes.parse("cpu  150 0 150 850 0 0 0 50 90 0\ncpu0 1\n")
    assert after.steal_percent_since(before) == 25.0
    assert before.steal_percent_since(before) == 0.0
