"""The catalogue of rows, and its agreement with the programs."""

from __future__ import annotations

import re

import pytest
from bench.image import SOURCES
from bench.published import LMBENCH
from bench.rows import BY_NAME, ROWS, Group, UnknownRow, quick_rows, select


def rows_in_the_programs() -> dict[str, str]:
    """Names and units in the tables of the C sources."""
    found: dict[str, str] = {}
    for source in SOURCES.glob("*.c"):
        text = source.read_text()
        found.update(re.findall(r'^    \{"(\w+)", "([^"]+)", (?:LATENCY|RATE)', text, re.MULTILINE))
        for processes, kilobytes in re.findall(r"^    CONTEXT_SWITCH\((\d+), (\d+)\)", text, re.MULTILINE):
            found[f"ctx_{processes}p_{kilobytes}k"] = "us"
    return found


def test_every_row_has_a_program_that_prints_its_unit() -> None:
    programs = rows_in_the_programs()
    for row in ROWS:
        if row.group is Group.MACRO:
            assert (SOURCES / "guest/bench/macro" / row.name).is_file(), row.name
        elif row.group is not Group.BOOT:
            assert programs.get(row.name) == row.unit, row.name
    assert set(programs) <= set(BY_NAME)


def test_every_published_row_is_one_of_ours() -> None:
    assert set(LMBENCH) <= set(BY_NAME)


def test_rows_are_selected_by_name_or_group_in_the_order_of_the_table() -> None:
    assert [row.name for row in select(["sieve", "stat"])] == ["stat", "sieve"]
    assert {row.group for row in select(["macro"])} == {Group.MACRO}


def test_a_name_that_is_no_row_is_refused_with_what_there_is() -> None:
    with pytest.raises(UnknownRow, match=r"no row or group is called 'sive'.*system_call"):
        select(["sive"])


def test_the_quick_set_has_rows_of_every_group() -> None:
    assert {row.group for row in quick_rows()} == set(Group)


def test_times_are_better_lower_and_rates_higher() -> None:
    assert not BY_NAME["stat"].higher_is_better
    assert not BY_NAME["boot_elf"].higher_is_better
    assert all(BY_NAME[name].higher_is_better for name in ["sha256", "matmul", "tcp_bandwidth", "http", "dbench"])
