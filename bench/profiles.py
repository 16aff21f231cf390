"""Where a row's time goes in our own systems: their counters, per operation.

`xenolith run --stats` prints its counters as JSON on standard error when the domain ends.  So each row gets
a domain of its own, and what a domain counts whose row does nothing is taken off; the rest is divided by the
number of operations that the row's program says it has performed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import Profile, Results
from bench.runner import BOOT_ROWS, PATIENCE, Plan, Say
from bench.session import Observation, observe
from bench.systems import Boot, System

END_SECONDS = 20.0  # for a domain to power off and its statistics to be printed


def profile(plan: Plan, results: Results, full_image: Path, say: Say) -> None:
    """Add a profile of every row for every system that counts."""
    for system in plan.systems:
        if not system.counts_traps or system.name not in results.versions:
            continue
        say(f"profile of {system.title}: a boot and a row that does nothing")
        _, base = _counted(system, plan, full_image, ["none"])
        for row in plan.rows:
            if row.name in BOOT_ROWS or base is None:
                continue
            say(f"profile of {system.title}: {row.title}")
            seen, counters = _counted(system, plan, full_image, [row.name])
            value = seen.values.get(row.name)
            if value and counters is not None:
                results.profiles.append(Profile(system.name, row.name, value.operations, difference(counters, base)))


def _counted(
    system: System, plan: Plan, full_image: Path, rows: Sequence[str]
) -> tuple[Observation, dict[str, float] | None]:
    boot = Boot(full_image, system.preferred_form, rows=rows, budget=plan.budget, macro_budget=plan.macro_budget)
    with system.start(boot) as session:
        seen = observe(session, PATIENCE)
        session.ends_within(END_SECONDS)
        return seen, counters_in(session.standard_error())


def counters_in(text: str) -> dict[str, float] | None:
    """The last JSON object in a text, flattened to names with dots; None when there is none."""
    for start in reversed([place for place, letter in enumerate(text) if letter == "{"]):
        if start and text[start - 1] != "\n":
            continue
        try:
            found, _ = json.JSONDecoder().raw_decode(text[start:])
        except ValueError:
            continue
        return dict(_numbers(found, ""))
    return None


def _numbers(value: Any, name: str) -> list[tuple[str, float]]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [(name, float(value))]
    if isinstance(value, dict):
        return [pair for key, part in value.items() for pair in _numbers(part, f"{name}.{key}" if name else str(key))]
    return []


def difference(counters: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """What a row added to each counter."""
    added = {name: count - base.get(name, 0.0) for name, count in counters.items()}
    return {name: count for name, count in added.items() if count}


def traps_per_operation(profile: Profile, most: int = 6) -> list[tuple[str, float]]:
    """The commonest traps and hypercalls of a row, per operation, the commonest first."""
    per_operation = [
        (name.rpartition(".")[2], count / profile.operations)
        for name, count in profile.counters.items()
        if name.startswith(("traps.", "hypercalls."))
    ]
    worth_telling = [(name, count) for name, count in per_operation if count >= 0.01]
    return sorted(worth_telling, key=lambda pair: -pair[1])[:most]
