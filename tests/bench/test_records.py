"""What counts as a record on a console that others write to as well."""

from __future__ import annotations

import pytest
from bench.records import Begin, End, Marker, Value, parse
from hypothesis import given
from hypothesis import strategies as st


def test_a_value_has_five_words_after_its_mark() -> None:
    assert parse("@row null_syscall 0.197 us 1572863 0.315\r") == Value("null_syscall", 0.197, "us", 1572863, 0.315)


def test_markers_and_the_frame_of_a_row_are_recognised() -> None:
    assert parse("@shell") == Marker("shell")
    assert parse("@begin stat") == Begin("stat")
    assert parse("@end stat 127") == End("stat", 127)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[    1.2] random: crng init done",
        "@row",
        "@row stat 1.2 us 10",  # a word is missing
        "@row stat 1.2 us 10 0.3 more",
        "@row stat fast us 10 0.3",
        "@row stat nan us 10 0.3",
        "@row stat 0 us 10 0.3",  # a clock too coarse
        "@row stat inf us 10 0.3",
        "@row stat 1.2 us 0 0.3",  # nothing was done
        "@row stat 1.2 us 10 -1",  # a clock that ran backwards
        "@end stat",
        "@shell now",
        "@unknown",
        "noise @shell",
    ],
)
def test_a_damaged_line_is_no_record(line: str) -> None:
    assert parse(line) is None


@given(st.text())
def test_no_line_whatsoever_raises(line: str) -> None:
    parse(line)
    parse("@row " + line)
