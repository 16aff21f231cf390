"""The order of measurement: warm-up, then rounds in which every system has its turn.

A round visits all systems before the next begins, and each round begins with another system, so that a
change of the machine's mood meets all of them alike.  A system that breaks in a row loses that row; the
rows after it are measured in a fresh session.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import host, image
from bench.results import Failure, Results, Sample
from bench.rows import BOOT_BZIMAGE, BOOT_ELF, Row
from bench.session import Observation, observe
from bench.systems import Absent, Boot, Form, System

BOOT_ROWS = {BOOT_BZIMAGE.name: Form.BZIMAGE, BOOT_ELF.name: Form.ELF}
PATIENCE = 90.0  # seconds of silence after which a system counts as hung
ATTEMPTS = 2  # at booting: now and then a guest hangs while it calibrates its clocks

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long."""

    rows: Sequence[Row]
    systems: Sequence[System]
    rounds: int
    budget: float  # seconds for a row
    macro_budget: int  # seconds for a macro workload
    seconds: float | None = None  # begin no round that would end later than this


def run(plan: Plan, say: Say) -> Results:
    """Measure."""
    began = time.monotonic()
    results = Results(
        started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        command=" ".join(["python -m bench", *sys.argv[1:]]),
        machine=host.describe(),
        settings={"rounds": plan.rounds, "budget": plan.budget, "macro_budget": plan.macro_budget},
        titles={system.name: system.title for system in plan.systems},
    )
    say("building the programs and the initramfs")
    boot_image, full_image = image.write_images()
    turn = Turn(plan, results, boot_image, full_image, say)
    systems = [system for system in plan.systems if turn.warm_up(system)]
    longest_round = 0.0
    for number in range(1, plan.rounds + 1):
        round_began = time.monotonic()
        if plan.seconds and number > 1 and round_began - began + longest_round > plan.seconds:
            say(f"stopping after {number - 1} rounds: another would take longer than {plan.seconds / 60:.0f} minutes")
            break
        first = (number - 1) % max(1, len(systems))
        for system in [*systems[first:], *systems[:first]]:
            say(f"round {number} of {plan.rounds}: {system.title}")
            turn.measure(system, number)
        longest_round = max(longest_round, time.monotonic() - round_began)
    results.seconds = time.monotonic() - began
    return results


class Turn:
    """One system's turn in a round."""

    def __init__(self, plan: Plan, results: Results, boot_image: Path, full_image: Path, say: Say) -> None:
        self.plan, self.results, self.say = plan, results, say
        self.boot_image, self.full_image = boot_image, full_image

    def warm_up(self, system: System) -> bool:
        """Find out whether the system runs here, with its files in the page cache afterwards."""
        say, results = self.say, self.results
        say(f"warm-up: {system.title}")
        try:
            results.versions[system.name] = system.prepare()
        except Absent as error:
            results.absent[system.name] = str(error)
        else:
            seen = self._boot(system, system.preferred_form)
            if seen.broken:
                results.absent[system.name] = f"it does not boot: {seen.broken}"
                del results.versions[system.name]
        if system.name in results.absent:
            say(f"  absent: {results.absent[system.name]}")
        return system.name not in results.absent

    def measure(self, system: System, round_number: int) -> None:
        """All rows of the plan."""
        for row in self.plan.rows:
            form = BOOT_ROWS.get(row.name)
            if form in system.forms:
                self._boot_row(system, row, form, round_number)
        inside = [row.name for row in self.plan.rows if row.name not in BOOT_ROWS]
        while inside:
            inside = self._session(system, inside, round_number)

    def _boot_row(self, system: System, row: Row, form: Form, round_number: int) -> None:
        load, before = host.load(), host.CpuTimes.read()
        seen = self._boot(system, form)
        if seen.broken:
            self._fail(system, row.name, round_number, seen.broken)
            return
        start = seen.markers[system.boot_starts_at] if system.boot_starts_at else 0.0
        seconds = seen.markers["shell"] - start
        steal = host.CpuTimes.read().steal_percent_since(before)
        self.results.samples.append(
            Sample(system.name, row.name, round_number, seconds, steal_percent=steal, load=load)
        )

    def _boot(self, system: System, form: Form) -> Observation:
        for _ in range(ATTEMPTS):
            with system.start(Boot(self.boot_image, form)) as session:
                seen = observe(session, PATIENCE)
            if not seen.broken:
                break
            self.say(f"  a boot of {system.title} failed: {seen.broken}")
        return seen

    def _session(self, system: System, rows: list[str], round_number: int) -> list[str]:
        """Measure rows in one session; returns those that another session must take up."""
        boot = Boot(
            self.full_image,
            system.preferred_form,
            rows=rows,
            budget=self.plan.budget,
            macro_budget=self.plan.macro_budget,
        )
        load, before = host.load(), host.CpuTimes.read()
        for _ in range(ATTEMPTS):
            with system.start(boot) as session:
                seen = observe(session, PATIENCE)
            if "shell" in seen.markers:
                break
        steal = host.CpuTimes.read().steal_percent_since(before)
        for name, value in seen.values.items():
            if name not in seen.failures:
                self.results.samples.append(
                    Sample(
                        system.name, name, round_number, value.value, value.operations, value.seconds,
                        seen.host_seconds.get(name), steal, load,
                    )
                )  # fmt: skip
        for name, reason in seen.failures.items():
            self._fail(system, name, round_number, reason)
        if not seen.broken:
            return []
        if seen.unfinished not in rows:
            for name in rows:
                if name not in seen.host_seconds:
                    self._fail(system, name, round_number, seen.broken)
            return []
        self._fail(system, seen.unfinished, round_number, seen.broken)
        return rows[rows.index(seen.unfinished) + 1 :]

    def _fail(self, system: System, row: str, round_number: int, reason: str) -> None:
        self.results.failures.append(Failure(system.name, row, round_number, reason))
        self.say(f"  {system.title}, {row}: {reason}")
