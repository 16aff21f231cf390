"""Raw results, as they go into the JSON file, and what follows from them: medians over rounds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.rows import BY_NAME, Row

SCHEMA = 1
CLOCK_TOLERANCE = 0.1  # a guest's clock may differ from the host's by this share


class ResultsError(Exception):
    """A file does not hold results that this program understands."""


@dataclass
class Sample:
    """One value of one row in one round."""

    system: str
    row: str
    round: int
    value: float
    operations: int = 1
    guest_seconds: float | None = None  # how long measuring took by the guest's clock, and by the host's
    host_seconds: float | None = None
    steal_percent: float = 0.0  # of the host's CPU time, during the session
    load: float = 0.0  # the host's load average when the session began


@dataclass
class Failure:
    """A row that gave no value, or a session that broke."""

    system: str
    row: str
    round: int
    reason: str


@dataclass
class Profile:
    """A system's counters for one row: the difference that the row made to a boot without it."""

    system: str
    row: str
    operations: int
    counters: dict[str, float]


@dataclass
class Results:
    """All that a run of the evaluation brought."""

    started: str
    command: str
    machine: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)  # by system
    titles: dict[str, str] = field(default_factory=dict)  # by system, of all that were asked for
    absent: dict[str, str] = field(default_factory=dict)  # reasons, by system
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a JSON file that `write` wrote."""
        try:
            data = json.loads(path.read_text())
            if data.pop("schema") != SCHEMA:
                raise ResultsError(f"{path} has another schema than {SCHEMA}; measure again")
            data["samples"] = [Sample(**sample) for sample in data["samples"]]
            data["failures"] = [Failure(**failure) for failure in data["failures"]]
            data["profiles"] = [Profile(**profile) for profile in data["profiles"]]
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{path} holds no results of the evaluation: {error}") from error

    def systems(self) -> list[str]:
        """The systems with at least one sample, in the order of the titles."""
        present = {sample.system for sample in self.samples}
        return [name for name in self.titles if name in present]

    def rows(self) -> list[Row]:
        """The rows with at least one sample, in the table's order."""
        present = {sample.row for sample in self.samples}
        return [row for row in BY_NAME.values() if row.name in present]


@dataclass(frozen=True)
class Summary:
    """One cell of the table."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """Half the range, as a share of the median: the noise that this cell shows."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(values: Sequence[float]) -> Summary:
    """Median and range over rounds."""
    return Summary(statistics.median(values), min(values), max(values), len(values))


Cells = Mapping[tuple[str, str], Summary]
"""Summaries by (system, row)."""


def cells(results: Results) -> dict[tuple[str, str], Summary]:
    """The table's cells."""
    values: dict[tuple[str, str], list[float]] = {}
    for sample in results.samples:
        values.setdefault((sample.system, sample.row), []).append(sample.value)
    return {key: summarize(found) for key, found in values.items()}


def relative(row: Row, value: float, reference: float) -> float:
    """Performance in relation to a reference: 1 is as fast, below 1 is slower."""
    if row.higher_is_better:
        return value / reference if reference else 0.0
    return reference / value if value else 0.0


def wrong_clocks(results: Results) -> list[Sample]:
    """Samples whose guest's clock ran at another rate than the host's, so that their times mean nothing.

    The host's interval begins earlier and ends later (a program is started, the console is read), so a short
    measurement is allowed a fixed difference too.
    """
    return [
        sample
        for sample in results.samples
        if sample.guest_seconds is not None
        and sample.host_seconds is not None
        and abs(sample.host_seconds - sample.guest_seconds) > CLOCK_TOLERANCE * sample.host_seconds + 0.5
    ]
