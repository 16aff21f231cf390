"""What `xl top` makes of two looks at the counters."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from toolstack.fake import FakeClient
from xenolith.cli.top import SORT_KEYS, Row, Sample, render_table, rows, sort_rows, take_sample
from xenolith.toolstack.config.domain import DomainConfig


def machine_with(*names: str) -> FakeClient:
    machine = FakeClient()
    for name in names:
        machine.create(DomainConfig(name, target_memory_kib=64 * 1024, vcpus=2))
    return machine


def later(sample: Sample, seconds: float, **growth: int) -> Sample:
    """The same domains after a while, each counter grown by so much."""
    statistics = {
        domid: replace(
            counters,
            vcpu_times_ns=tuple(time + growth.get("cpu_time_ns", 0) // 2 for time in counters.vcpu_times_ns),
            **{name: getattr(counters, name) + amount for name, amount in growth.items()},
        )
        for domid, counters in sample.statistics.items()
    }
    return Sample(sample.time_s + seconds, sample.domains, statistics)


def test_rates_are_differences_over_the_time_between_two_looks() -> None:
    before = take_sample(machine_with("web"), 100.0)
    now = later(before, 2.0, cpu_time_ns=1_000_000_000, traps=5000, hypercalls=300, network_sent_bytes=4096)
    row = next(row for row in rows(before, now, 1024 * 1024) if row.name == "web")
    assert (row.cpu_percent, row.vcpu_percent) == (50.0, (25.0, 25.0))
    assert (row.traps, row.hypercalls, row.network_sent) == (2500.0, 150.0, 2048.0)
    assert (row.memory_mib, row.memory_percent) == (64, 6.25)


def test_the_first_look_has_no_rates() -> None:
    first = take_sample(machine_with("web"), 100.0)
    assert all(row.cpu_percent == row.traps == 0 for row in rows(None, first, 1024))


def test_a_domain_that_is_new_under_an_old_number_has_no_negative_rates() -> None:
    before = later(take_sample(machine_with("old"), 100.0), 1.0, cpu_time_ns=10**12, traps=10**6)
    now = replace(take_sample(machine_with("new"), 102.0))
    assert all(row.cpu_percent >= 0 and row.traps >= 0 for row in rows(before, now, 1024))


def test_domains_that_came_or_went_between_the_looks_do_no_harm() -> None:
    one, two = take_sample(machine_with("a"), 1.0), take_sample(machine_with("a", "b"), 2.0)
    assert [row.name for row in rows(one, two, 1024)] == ["Domain-0", "a", "b"]
    assert [row.name for row in rows(two, one, 1024)] == ["Domain-0", "a"]


amounts = st.floats(0, 1e6)
any_rows = st.builds(
    Row,
    name=st.sampled_from("abcdef"),
    domid=st.integers(0, 9),
    state=st.just("r-----"),
    cpu_seconds=amounts,
    cpu_percent=amounts,
    vcpu_percent=st.just((0.0,)),
    memory_mib=st.integers(0, 999),
    memory_percent=amounts,
    traps=amounts,
    hypercalls=amounts,
    network_received=amounts,
    network_sent=amounts,
    disk_read=amounts,
    disk_written=amounts,
)


@given(st.lists(any_rows), st.sampled_from(list(SORT_KEYS.values())))
def test_every_column_sorts_without_losing_a_domain(table: list[Row], column: str) -> None:
    ordered = sort_rows(table, column)
    assert sorted(map(str, ordered)) == sorted(map(str, table))
    if column == "cpu":
        assert [row.cpu_percent for row in ordered] == sorted((row.cpu_percent for row in table), reverse=True)
    if column in ("name", "domid"):
        assert [getattr(row, column) for row in ordered] == sorted(getattr(row, column) for row in table)


def test_the_table_shows_each_vcpu_when_asked() -> None:
    before = take_sample(machine_with("web"), 100.0)
    table = rows(before, later(before, 1.0, cpu_time_ns=500_000_000), 1024 * 1024)
    terminal = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.print(render_table(table, "name", per_vcpu=True))
    text = terminal.export_text()
    assert text.count("vcpu 0") == 2
    assert "25.0" in text
