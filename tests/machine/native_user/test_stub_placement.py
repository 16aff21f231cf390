"""Where an address space runs, on a made-up clock."""

from __future__ import annotations

from xenolith.machine.engines.unicorn.user.placement import LEAST_PATIENCE, PATIENCE, SPEED, TRAP_NS, Placement
from xenolith.machine.tsc import frequency

L4 = 7
MS = 1_000_000


def ticks(ns: int) -> int:
    return ns * frequency() // 1_000_000_000


def placement(force: bool = False) -> Placement:
    return Placement(16, force, (ticks(2_000), ticks(5_000)))


def compute(where: Placement, ns: int) -> None:
    for _ in range(ns // MS):
        if not where.wants_stub(L4):
            where.ran_on_unicorn(L4, ticks(MS), 0, MS, ticks(MS))


def test_a_program_that_computes_goes_to_a_stub() -> None:
    where = placement()
    compute(where, LEAST_PATIENCE // 2)
    assert not where.wants_stub(L4)
    compute(where, LEAST_PATIENCE)
    assert where.wants_stub(L4)
    assert not where.wants_stub(L4 + 1)


def test_a_program_that_traps_stays_on_unicorn() -> None:
    where = placement()
    for _ in range(1000):
        where.ran_on_unicorn(L4, ticks(MS), MS // TRAP_NS, MS, ticks(MS))
    assert not where.wants_stub(L4)


def test_a_program_that_begins_to_trap_goes_back_and_needs_more_patience_then() -> None:
    where = placement()
    compute(where, 2 * LEAST_PATIENCE)
    for _ in range(-(-2 * PATIENCE // TRAP_NS)):
        assert where.wants_stub(L4)
        where.ran_in_stub(L4, ticks(2_000), False)  # of which nothing is its own
    assert not where.wants_stub(L4)
    compute(where, LEAST_PATIENCE * SPEED // (SPEED - 1) + MS)
    assert not where.wants_stub(L4)
    compute(where, LEAST_PATIENCE * 5)
    assert where.wants_stub(L4)


def test_a_program_that_computes_from_trap_to_trap_stays_in_its_stub() -> None:
    where = placement()
    compute(where, 2 * LEAST_PATIENCE)
    for _ in range(5000):
        where.ran_in_stub(L4, ticks(40_000), True)
    assert where.wants_stub(L4)


def test_a_program_whose_tables_change_all_the_time_goes_back() -> None:
    where = placement()
    compute(where, 2 * LEAST_PATIENCE)
    for _ in range(2 * PATIENCE // MS):
        assert where.wants_stub(L4)
        where.charge(L4, ticks(MS))
    where.charge(L4, ticks(MS))
    assert not where.wants_stub(L4)


def test_what_was_known_of_an_address_space_ends_with_it() -> None:
    where = placement()
    compute(where, 2 * LEAST_PATIENCE)
    where.forget(L4)
    assert not where.wants_stub(L4)


def test_by_force_all_do() -> None:
    where = placement(force=True)
    for _ in range(5000):
        where.ran_in_stub(L4, 0, True)
    where.forget(L4)
    assert where.wants_stub(L4)


def test_time_in_which_others_had_the_processor_does_not_count() -> None:
    where = placement()
    for _ in range(100):
        where.ran_on_unicorn(L4, ticks(20 * MS), 5, MS // 10, ticks(20 * MS))
    assert not where.wants_stub(L4)
    compute(where, 2 * LEAST_PATIENCE)
    for number in range(2000):
        if where.wants_stub(L4):
            where.ran_in_stub(L4, ticks(2_000 if number % 100 else 20 * MS), False)
    assert not where.wants_stub(L4)
