"""What the system under test says on its console.

The guest's /init and the programs in workloads/ print lines that begin with `@`; everything else on the
console is the kernel's, or noise.  Nothing here trusts the line: a damaged record is no record, and the
row that it belonged to is then reported as missing.

    @dom0, @create                        (Xen only) domain 0 has a shell; it begins `xl create`
    @shell                                /init runs: the boot is over
    @begin NAME                           a row begins
    @row NAME VALUE UNIT OPERATIONS SECONDS
    @end NAME STATUS                      it ended, with its program's exit status
    @done                                 nothing more will come
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MARKERS = ("dom0", "create", "shell", "done")


@dataclass(frozen=True)
class Marker:
    """A moment of the boot or the end of the run."""

    name: str


@dataclass(frozen=True)
class Begin:
    """A row begins."""

    row: str


@dataclass(frozen=True)
class Value:
    """A measured value; `seconds` is how long the measuring took by the guest's own clock."""

    row: str
    value: float
    unit: str
    operations: int
    seconds: float


@dataclass(frozen=True)
class End:
    """A row's program ended."""

    row: str
    status: int


Record = Marker | Begin | Value | End


def parse(line: str) -> Record | None:
    """The record on a console line, or None when there is none or it is damaged."""
    words = line.strip().split()
    if not words or not words[0].startswith("@"):
        return None
    try:
        match words[0][1:], words[1:]:
            case marker, [] if marker in MARKERS:
                return Marker(marker)
            case "begin", [row]:
                return Begin(row)
            case "row", [row, value, unit, operations, seconds]:
                record = Value(row, float(value), unit, int(operations), float(seconds))
                return record if _is_sound(record) else None
            case "end", [row, status]:
                return End(row, int(status))
    except ValueError:
        return None
    return None


def _is_sound(record: Value) -> bool:
    """A value of nothing comes from a clock too coarse; a difference of two times may be negative by noise."""
    return math.isfinite(record.value) and record.value != 0 and record.operations > 0 and record.seconds >= 0
