"""Tables and the generated document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench.report import render
from bench.results import Failure, Profile, Results, Sample, Summary
from bench.tables import cell, markdown, number, terminal
from rich.console import Console


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.08812, "0.0881"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (43.14, "43.1"),
        (999.6, "1,000"),
        (18740, "18,700"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_cell_shows_its_range_only_when_there_was_more_than_one_round() -> None:
    assert cell(Summary(1.5, 1.0, 2.0, 3)) == "1.50 (1.00-2.00)"
    assert cell(Summary(1.5, 1.5, 1.5, 1)) == "1.50"
    assert cell(None) == "-"


@pytest.fixture
def results() -> Results:
    titles = {
        "native": "native Linux",
        "xenolith-kvm": "Xenolith, kvm",
        "uml": "User-Mode Linux",
        "qemu-tcg": "QEMU TCG microvm",
    }
    return Results(
        started="2026-01-01",
        command="python -m bench --quick",
        machine={"cpu": "one"},
        settings={"rounds": 1},
        versions={"native": "Linux 6"},
        titles=titles,
        absent={"qemu-tcg": "it does not boot; last lines:\n  usage\n  no such option"},
        samples=[
            Sample("native", "null_syscall", 1, 0.1),
            Sample("xenolith-kvm", "null_syscall", 1, 4.0),
            Sample("uml", "null_syscall", 1, 12.0),
            Sample("native", "sha256", 1, 200.0),
            Sample("uml", "sha256", 1, 100.0),
            Sample("uml", "pipe", 1, 40.0, guest_seconds=1.0, host_seconds=9.0),
        ],
        failures=[Failure("uml", "dbench", 1, "its program ended with status 1")],
        profiles=[Profile("xenolith-kvm", "null_syscall", 100, {"traps.syscall": 200.0, "boot.ns": 5.0})],
    )


def test_the_markdown_has_a_column_for_each_measured_system_and_a_dash_for_what_is_missing(results: Results) -> None:
    text = markdown(results)
    assert "|  | unit | native Linux | Xenolith, kvm | User-Mode Linux |" in text
    assert "| null system call | us | 0.100 | 4.00 | 12.0 |" in text
    assert "| pipe round trip | us | - | - | 40.0 |" in text


def test_the_terminal_table_shows_speed_in_relation_to_native(results: Results) -> None:
    console = Console(width=140, record=True)
    console.print(terminal(results))
    text = console.export_text()
    assert "0.0250x" in text  # 0.1 us against 4 us
    assert "0.500x" in text  # 100 MB/s against 200


def test_the_document_tells_wins_absences_failures_and_wrong_clocks(results: Results) -> None:
    text = render(results, [Path("/x/docs/evaluation/figure-3.svg")], Path("/x/docs/evaluation.md"))
    assert "| null system call | Xenolith, kvm | 3.00 |" in text  # against User-Mode Linux
    assert "QEMU TCG microvm is absent: it does not boot; last lines: no such option\n" in text
    assert "User-Mode Linux, dbench, 1 client, round 1 failed: its program ended with status 1" in text
    assert "pipe round trip, round 1: the guest's clock says 1.0 s, the host's 9.0 s" in text
    assert "![figure-3](evaluation/figure-3.svg)" in text
    assert "Xenolith, kvm: syscall 2.00" in text
    # The paper has 0.46 us in Xen against 0.45 natively; ours is 40 times native here.
    assert "| null system call | ratio | 1.02 | 1.62 | 54.9 | 40.0 | 120 |" in text


def test_the_document_tells_which_medians_a_second_run_did_not_confirm(results: Results) -> None:
    samples = [
        replace(sample, value=sample.value * factor)
        for sample, factor in zip(results.samples, (1.0, 1.09, 1.2, 0.95, 0.5, 1.25), strict=True)
    ]
    again = replace(results, started="2026-01-02", samples=samples)
    text = render(results, [], Path("/x/docs/evaluation.md"), again)
    assert "Measured 2026-01-02" in text
    assert "Of 6 medians 3 are within a factor of 1.1 of those above, 5 within 1.25, all but these:" in text
    assert "- SHA-256, User-Mode Linux: 100 and 50.0 MB/s" in text
    assert text.endswith("MB/s\n")
    assert "A second run" not in render(results, [], Path("/x/docs/evaluation.md"))
