"""Following a system's console, and going on when a system breaks. The systems here are shell scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench.rows import select
from bench.runner import Plan, run
from bench.session import Session, observe
from bench.systems.base import Absent, Boot, Form, System

from bench import image

PATIENCE = 30.0


def test_a_session_is_followed_to_its_end() -> None:
    script = "echo noise; echo @shell; echo @begin stat; echo @row stat 2.5 us 10 0.1; echo @end stat 0; echo @done"
    with Session(["sh", "-c", script]) as session:
        seen = observe(session, PATIENCE)
    assert seen.broken is None
    assert seen.values["stat"].value == 2.5
    assert list(seen.markers) == ["shell", "done"]
    assert list(seen.host_seconds) == ["stat"]


def test_a_row_whose_program_fails_or_says_nothing_is_a_failure() -> None:
    script = "echo @shell; echo @begin stat; echo @end stat 1; echo @begin pipe; echo @end pipe 0; echo @done"
    with Session(["sh", "-c", script]) as session:
        seen = observe(session, PATIENCE)
    assert seen.failures == {"stat": "its program ended with status 1", "pipe": "its program gave no value"}


def test_a_system_that_dies_is_explained_with_its_last_words() -> None:
    with Session(["sh", "-c", "echo @shell; echo @begin stat; echo panic; echo why >&2; exit 3"]) as session:
        seen = observe(session, PATIENCE)
    assert seen.unfinished == "stat"
    assert seen.broken and "panic" in seen.broken and "why" in seen.broken


def test_a_silent_system_is_given_up() -> None:
    with Session(["sh", "-c", "echo last words; sleep 1000"]) as session:
        seen = observe(session, 0.2)
    assert seen.broken and "nothing was heard" in seen.broken and "last words" in seen.broken


class Scripted(System):
    """A system whose behaviour is a shell script, made from the rows that it is asked for."""

    counts_traps = False
    forms = (Form.ELF,)

    def __init__(self, name: str, script: Callable[[Boot], str]) -> None:
        self.name = self.title = name
        self.script = script
        self.boots: list[Boot] = []

    def prepare(self) -> str:
        return "1"

    @contextmanager
    def start(self, boot: Boot) -> Iterator[Session]:
        self.boots.append(boot)
        with Session(["sh", "-c", self.script(boot)]) as session:
            yield session


def obedient(boot: Boot) -> str:
    rows = [f"echo @begin {row}; echo @row {row} 1 us 1 0; echo @end {row} 0" for row in boot.rows]
    return "; ".join(["echo @shell", *rows, "echo @done"])


def crashes_in_stat(boot: Boot) -> str:
    return obedient(boot).replace("echo @row stat 1 us 1 0", "exit 1")


class Missing(Scripted):
    """A system that is not installed."""

    def prepare(self) -> str:
        raise Absent("it is not installed")


@pytest.fixture(autouse=True)
def _no_image_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "write_images", lambda: (Path("boot"), Path("full")))


def plan_for(*systems: System, rows: str = "boot_elf,null_syscall,stat,pipe", rounds: int = 2) -> Plan:
    return Plan(select(rows.split(",")), systems, rounds, budget=0.1, macro_budget=1)


def test_every_system_has_its_turn_in_every_round() -> None:
    results = run(plan_for(Scripted("one", obedient), Scripted("two", obedient)), lambda text: None)
    measured = [(sample.round, sample.system) for sample in results.samples if sample.row == "stat"]
    assert measured == [(1, "one"), (1, "two"), (2, "two"), (2, "one")]
    assert {sample.row for sample in results.samples} == {"boot_elf", "null_syscall", "stat", "pipe"}


def test_the_rows_after_a_crash_are_measured_in_a_fresh_session() -> None:
    system = Scripted("fragile", crashes_in_stat)
    results = run(plan_for(system, rounds=1, rows="null_syscall,stat,pipe"), lambda text: None)
    assert [sample.row for sample in results.samples] == ["null_syscall", "pipe"]
    assert [failure.row for failure in results.failures] == ["stat"]
    assert list(system.boots[-1].rows) == ["pipe"]


def test_a_system_that_cannot_run_is_absent_with_its_reason_and_the_others_go_on() -> None:
    dead = Scripted("dead", lambda boot: "echo it hurts; exit 1")
    missing = Missing("missing", obedient)
    results = run(plan_for(dead, missing, Scripted("well", obedient), rounds=1), lambda text: None)
    assert results.absent["missing"] == "it is not installed"
    assert "it hurts" in results.absent["dead"]
    assert results.systems() == ["well"]


def test_no_round_is_begun_that_would_end_too_late() -> None:
    plan = Plan(select(["stat"]), [Scripted("one", obedient)], 1000, 0.1, 1, seconds=1e-9)
    results = run(plan, lambda text: None)
    assert {sample.round for sample in results.samples} == {1}
