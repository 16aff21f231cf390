"""The adaptive engine's policy, on programs that are given as numbers: how much code, how many traps."""

from __future__ import annotations

import itertools

import pytest

from xenolith.machine.engines.adaptive.placement import (
    HANDLER_NS,
    LEAST_PATIENCE,
    MOST_PATIENCE,
    MOVES_NS,
    WARM_UP,
    Placement,
)

EXIT_NS = 45_000
SECOND = 1_000_000_000
WINDOW_TRAPS = 64
WINDOW_NS = 2_000_000


class Simulated:
    """A vCPU that the policy moves about, with what it has spent."""

    def __init__(self, exit_ns: int = EXIT_NS, slowdown: float = 8) -> None:
        self.placement = Placement(EXIT_NS)
        self.exit_ns = exit_ns  # really
        self.slowdown = slowdown
        self.engine = "unicorn"
        self.spent = 0.0
        self.moves = 0

    def trap_ns(self, code_ns: float, engine: str) -> float:
        """What a trap and the code before it take; `code_ns` is the code's time on a processor."""
        return HANDLER_NS + (code_ns + self.exit_ns if engine == "kvm" else code_ns * self.slowdown)

    def phase(self, code_ns: float, duration_ns: float = 2 * SECOND) -> float:
        """A phase that would take so long on the better engine. How many times as long it took."""
        best = min(self.trap_ns(code_ns, engine) for engine in ("kvm", "unicorn"))
        traps = int(duration_ns / best)
        before = self.spent
        while traps > 0:
            each = self.trap_ns(code_ns, self.engine)
            count = max(1, min(WINDOW_TRAPS, round(WINDOW_NS / each)))
            self.spent += count * each
            traps -= count
            if self.placement.spent(self.engine, count, int(count * each)):
                self.placement.left(self.engine)
                self.engine = "unicorn" if self.engine == "kvm" else "kvm"
                self.spent += MOVES_NS / 2
                self.moves += 1
        return (self.spent - before) / duration_ns


DENSITIES = (0, 2_000, 20_000, 100_000, 1_000_000)


@pytest.mark.parametrize("exit_ns", [45_000, 70_000])
@pytest.mark.parametrize("slowdown", [5, 8, 12])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(DENSITIES, 2)))
def test_two_seconds_of_anything_take_no_more_than_an_eighth_longer_than_on_the_better_engine(
    before: int, after: int, slowdown: int, exit_ns: int
) -> None:
    vcpu = Simulated(exit_ns, slowdown)
    assert vcpu.phase(before) < 1.125
    assert vcpu.phase(after) < 1.125


def test_a_computing_vcpu_leaves_unicorn_before_it_has_lost_much() -> None:
    vcpu = Simulated()
    vcpu.phase(4_000_000, 40_000_000)
    assert (vcpu.engine, vcpu.moves) == ("kvm", 1)
    assert vcpu.spent < 40_000_000 + 3 * LEAST_PATIENCE + 4_000_000 * vcpu.slowdown


def test_short_bursts_of_code_between_traps_soon_drive_nobody_to_kvm_any_more() -> None:
    """Each fork and exec has some milliseconds of code."""
    vcpu = Simulated()
    for number in range(200):
        vcpu.phase(150_000, 600_000)
        vcpu.phase(1_000, 14_000_000)
        if number == 20:
            vcpu.moves = 0
    assert vcpu.engine == "unicorn"
    assert vcpu.moves <= 4


def test_patience_doubles_with_every_mistake_to_a_limit_and_is_short_again_after_a_success() -> None:
    placement = Placement(EXIT_NS)
    dense = EXIT_NS + HANDLER_NS
    for _ in range(12):
        assert placement.spent("kvm", 2000, 2000 * dense)
        placement.left("kvm")
    assert placement.patience["unicorn"] == MOST_PATIENCE
    placement.spent("kvm", 1, SECOND)
    for _ in range(20):
        placement.spent("kvm", 2000, 2000 * dense)
    placement.left("kvm")
    assert placement.patience["unicorn"] == LEAST_PATIENCE


def test_translation_is_an_investment() -> None:
    """Time that Unicorn translates for is held against it for a part only."""
    placement = Placement(EXIT_NS)
    assert not placement.spent("unicorn", 1, 3 * LEAST_PATIENCE, translation_ns=3 * LEAST_PATIENCE)
    assert placement.spent("unicorn", 1, 3 * LEAST_PATIENCE, translation_ns=3 * LEAST_PATIENCE)
    assert Placement(EXIT_NS).spent("unicorn", 1, 3 * LEAST_PATIENCE)


def test_who_is_patient_with_kvm_gives_unicorn_the_time_to_warm_up() -> None:
    placement = Placement(EXIT_NS)
    for _ in range(12):
        placement.spent("unicorn", 0, SECOND)
        placement.left("unicorn")
    assert placement.patience == {"kvm": MOST_PATIENCE, "unicorn": MOST_PATIENCE // WARM_UP}


def test_nothing_is_learned_from_a_move_that_the_policy_did_not_ask_for() -> None:
    placement = Placement(EXIT_NS)
    placement.spent("unicorn", 1, LEAST_PATIENCE // 2)
    placement.left("unicorn")
    assert set(placement.patience.values()) == {LEAST_PATIENCE}
    assert not placement.spent("unicorn", 1, LEAST_PATIENCE // 2)
