"""Counters of a run, turned into traps per operation."""

from __future__ import annotations

from bench.profiles import counters_in, difference, traps_per_operation
from bench.results import Profile


def test_the_last_json_object_among_warnings_is_taken_and_flattened() -> None:
    text = (
        'warning: {not json}\n{"old": 1}\nwarning\n{"traps": {"syscall": 3, "page fault": 2}, "fast": true, "s": 0.5}\n'
    )
    assert counters_in(text) == {"traps.syscall": 3, "traps.page fault": 2, "s": 0.5}


def test_json_over_several_lines_is_read_whole() -> None:
    assert counters_in('{\n "traps": {\n  "a": 1\n }\n}\n') == {"traps.a": 1}


def test_no_json_is_no_counters() -> None:
    assert counters_in("Traceback: {oops\n") is None


def test_what_the_boot_alone_counts_is_taken_off() -> None:
    assert difference({"a": 5, "b": 2, "c": 1}, {"a": 3, "b": 2}) == {"a": 2, "c": 1}


def test_traps_are_told_per_operation_the_commonest_first() -> None:
    counters = {"traps.syscall": 20.0, "hypercalls.mmu_update": 405.0, "traps.rare": 0.01, "seconds": 99.0}
    assert traps_per_operation(Profile("x", "stat", 10, counters)) == [("mmu_update", 40.5), ("syscall", 2.0)]
