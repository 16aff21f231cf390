"""Locked operations change what they should and say what was there before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenolith.machine.atomic import clear_bit, compare_exchange_16, compare_exchange_32, set_bit
from xenolith.machine.memory import MachineMemory

MEMORY = MachineMemory(2)
BITS = 4096


@given(st.lists(st.tuples(st.booleans(), st.integers(0, BITS - 1)), max_size=50))
def test_bits_of_a_long_string_are_set_and_cleared_as_by_an_integer(steps: list[tuple[bool, int]]) -> None:
    MEMORY.b[: BITS // 8] = bytes(BITS // 8)
    model = 0
    for on, bit in steps:
        before = (set_bit if on else clear_bit)(MEMORY.address, bit)
        assert before == model >> bit & 1
        model = model | 1 << bit if on else model & ~(1 << bit)
    assert int.from_bytes(MEMORY.b[: BITS // 8], "little") == model


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_compare_exchange_stores_only_where_the_expected_value_was(old: int, expected: int, new: int) -> None:
    MEMORY.q[0] = old | 0xA5A5A5A5 << 32
    assert compare_exchange_32(MEMORY.address, expected, new) == old
    assert MEMORY.q[0] == (new if old == expected else old) | 0xA5A5A5A5 << 32
    MEMORY.d[0] = old
    assert compare_exchange_16(MEMORY.address, old & 0xFFFF, new & 0xFFFF) == old & 0xFFFF
    assert MEMORY.d[0] == old & 0xFFFF0000 | new & 0xFFFF
