"""`xl top`: what the domains do, live.

Every interval the counters of all domains are read and the differences shown: CPU time as a percentage of one pCPU,
traps, hypercalls and device traffic per second. On a terminal the table stays in place and keys change it; elsewhere
each interval prints one table, and `-b -i N` prints N of them, for scripts.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from xenolith.cli.xl_command import Failure, Option, Options, Session, command, shown
from xenolith.cli.xl_list import state_letters
from xenolith.toolstack.client import Client, DomainInfo, DomainStatistics

DEFAULT_INTERVAL_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters of all domains at one moment."""

    time_s: float
    domains: dict[int, DomainInfo]
    statistics: dict[int, DomainStatistics]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; rates are per second, CPU is percent of one pCPU."""

    name: str
    domid: int
    state: str
    cpu_seconds: float
    cpu_percent: float
    vcpu_percent: tuple[float, ...]
    memory_mib: int
    memory_percent: float
    traps: float
    hypercalls: float
    network_received: float
    network_sent: float
    disk_read: float
    disk_written: float


def take_sample(client: Client, time_s: float) -> Sample:
    domains = {domain.domid: domain for domain in client.domains()}
    return Sample(time_s, domains, {counters.domid: counters for counters in client.statistics()})


def rows(before: Sample | None, now: Sample, total_memory_kib: int) -> list[Row]:
    """What happened between two samples; without an earlier one, all rates are zero."""
    return [
        _row(
            domain,
            now.statistics[domid],
            before.statistics.get(domid) if before else None,
            before,
            now,
            total_memory_kib,
        )
        for domid, domain in now.domains.items()
        if domid in now.statistics
    ]


def _row(
    domain: DomainInfo,
    counters: DomainStatistics,
    earlier: DomainStatistics | None,
    before: Sample | None,
    now: Sample,
    total_memory_kib: int,
) -> Row:
    elapsed = now.time_s - before.time_s if before else 0.0

    def rate(current: int, previous: int) -> float:
        """Per second; a counter that went back belongs to another domain that got the same number."""
        return (current - previous) / elapsed if elapsed > 0 and current >= previous else 0.0

    since = earlier or counters
    pairs = zip(counters.vcpu_times_ns, since.vcpu_times_ns, strict=False)
    return Row(
        name=shown(domain.name),
        domid=domain.domid,
        state=state_letters(domain),
        cpu_seconds=counters.cpu_time_ns / 1e9,
        cpu_percent=rate(counters.cpu_time_ns, since.cpu_time_ns) / 1e7,
        vcpu_percent=tuple(rate(current, previous) / 1e7 for current, previous in pairs),
        memory_mib=domain.memory_kib // 1024,
        memory_percent=100 * domain.memory_kib / total_memory_kib if total_memory_kib else 0.0,
        traps=rate(counters.traps, since.traps),
        hypercalls=rate(counters.hypercalls, since.hypercalls),
        network_received=rate(counters.network_received_bytes, since.network_received_bytes),
        network_sent=rate(counters.network_sent_bytes, since.network_sent_bytes),
        disk_read=rate(counters.disk_read_bytes, since.disk_read_bytes),
        disk_written=rate(counters.disk_written_bytes, since.disk_written_bytes),
    )


SORT_KEYS: Final = {"n": "name", "i": "domid", "c": "cpu", "m": "memory", "t": "traps", "r": "network", "d": "disk"}
"""The key that chooses a column to sort by."""


def sort_rows(table: Sequence[Row], column: str) -> list[Row]:
    """Names and domids upwards, amounts from the largest down."""
    if column == "name":
        return sorted(table, key=lambda row: row.name)
    amounts = {
        "domid": lambda row: -row.domid,
        "cpu": lambda row: row.cpu_percent,
        "memory": lambda row: row.memory_mib,
        "traps": lambda row: row.traps,
        "network": lambda row: row.network_received + row.network_sent,
        "disk": lambda row: row.disk_read + row.disk_written,
    }
    return sorted(table, key=amounts[column], reverse=True)


def render_table(table: Sequence[Row], column: str, per_vcpu: bool) -> Table:
    """The table as rich draws it; `per_vcpu` adds a line for each vCPU."""
    view = Table(box=None, header_style="reverse", caption=_CAPTION if per_vcpu is not None else None)
    view.add_column("NAME", no_wrap=True)
    headings = ("ID", "STATE", "CPU(s)", "CPU(%)", "MEM(M)", "MEM(%)", "TRAPS/s", "HCALLS/s")
    for heading in (*headings, "NETRX(k/s)", "NETTX(k/s)", "RD(k/s)", "WR(k/s)"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in sort_rows(table, column):
        view.add_row(
            Text(row.name),
            str(row.domid),
            row.state,
            f"{row.cpu_seconds:.1f}",
            f"{row.cpu_percent:.1f}",
            str(row.memory_mib),
            f"{row.memory_percent:.1f}",
            f"{row.traps:.0f}",
            f"{row.hypercalls:.0f}",
            *(f"{value / 1024:.0f}" for value in (row.network_received, row.network_sent)),
            *(f"{value / 1024:.0f}" for value in (row.disk_read, row.disk_written)),
        )
        for vcpu, percent in enumerate(row.vcpu_percent if per_vcpu else ()):
            view.add_row(f"  vcpu {vcpu}", "", "", "", f"{percent:.1f}")
    return view


_CAPTION: Final = "sort: n name, i id, c cpu, m memory, t traps, r network, d disk    v vCPUs    q quit"


@command(
    "[options]",
    "Watch the domains",
    Option("b", "Print tables instead of keeping one in place", long="batch"),
    Option("d", f"Seconds between two looks, {DEFAULT_INTERVAL_S:g} if not given", long="delay", value="<s>"),
    Option("i", "End after so many looks", long="iterations", value="<n>"),
    Option("s", "Sort by name, domid, cpu, memory, traps, network or disk", long="sort", value="<column>"),
    Option("v", "A line for each vCPU too", long="vcpus"),
    modifies=False,
)
def top(session: Session, options: Options, operands: Sequence[str]) -> int:
    interval = _positive(options.get("d", str(DEFAULT_INTERVAL_S)), "-d")
    count = int(_positive(options["i"], "-i")) if "i" in options else None
    column = options.get("s", "cpu")
    if column not in SORT_KEYS.values():
        raise Failure(f"cannot sort by `{column}': give one of {', '.join(SORT_KEYS.values())}.")
    terminal = Console()
    if terminal.is_terminal and "b" not in options and os.isatty(sys.stdin.fileno()):
        return _live(session.client, terminal, interval, count, column, "v" in options)
    return _batch(session.client, terminal, interval, count or 1, column, "v" in options)


def _positive(text: str, option: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.1 <= number < 1e6:
        raise Failure(f"{option} needs a number of at least 0.1, not `{text}'.")
    return number


def _batch(client: Client, terminal: Console, interval: float, count: int, column: str, per_vcpu: bool) -> int:
    """Print `count` tables. The first covers one interval too, so that it has rates."""
    total = client.host().total_memory_kib
    before = take_sample(client, time.monotonic())
    for _ in range(count):
        time.sleep(interval)
        now = take_sample(client, time.monotonic())
        wide = Console(file=terminal.file, width=160, color_system=None)
        view = render_table(rows(before, now, total), column, per_vcpu)
        view.caption = None
        wide.print(view)
        before = now
    return 0


def _live(client: Client, terminal: Console, interval: float, count: int | None, column: str, per_vcpu: bool) -> int:
    total = client.host().total_memory_kib
    before: Sample | None = None
    with _keys() as descriptor, Live(console=terminal, screen=True, auto_refresh=False) as live:
        while count is None or count > 0:
            now = take_sample(client, time.monotonic())
            table = rows(before, now, total)
            deadline = now.time_s + interval
            while True:
                live.update(render_table(table, column, per_vcpu), refresh=True)
                key = _key_before(descriptor, deadline)
                if key == "q":
                    return 0
                if key is None:
                    break
                column = SORT_KEYS.get(key, column)
                per_vcpu ^= key == "v"
            before = now
            count = None if count is None else count - 1
    return 0


@contextmanager
def _keys() -> Iterator[int]:
    """stdin with every key at once and none echoed."""
    descriptor = sys.stdin.fileno()
    saved = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)


def _key_before(descriptor: int, deadline: float) -> str | None:
    """The next key; None when the deadline (of time.monotonic) comes first."""
    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    return os.read(descriptor, 1).decode("latin-1") or "q" if ready else None
