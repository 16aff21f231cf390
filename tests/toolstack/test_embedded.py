"""The toolstack in one's own process: domains that end, that go while somebody looks, and what stays of them."""

from __future__ import annotations

import pytest

from xenolith.toolstack.api import power_on
from xenolith.toolstack.client import (
    Closed,
    DomainInfo,
    DomainNotFound,
    InvalidRequest,
    ShutdownRequest,
    Trigger,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded import EmbeddedToolstack

from .conftest import GUESTS


def test_a_domain_that_has_shut_down_has_nothing_to_do_to_power_off_and_cannot_reboot(
    crashed: tuple[EmbeddedToolstack, int],
) -> None:
    toolstack, domid = crashed
    toolstack.request_shutdown(domid, ShutdownRequest.POWEROFF)  # which would take a minute if it waited
    with pytest.raises(InvalidRequest, match="has shut down already"):
        toolstack.request_shutdown(domid, ShutdownRequest.REBOOT)


def test_what_a_domain_printed_can_be_read_when_it_is_gone(crashed: tuple[EmbeddedToolstack, int]) -> None:
    toolstack, domid = crashed
    printed = toolstack.open_console(domid).read(60)
    name = toolstack.config(domid).name
    toolstack.destroy(domid)
    assert [(domain.domid, domain.name) for domain in toolstack.departed()] == [(domid, name)]
    console = toolstack.open_console(domid)
    assert console.read(60) == printed
    assert console.read(60) == b""
    with pytest.raises(DomainNotFound):
        toolstack.pause(domid)


def test_a_domain_is_shown_as_it_was_until_it_is_gone(crashed: tuple[EmbeddedToolstack, int]) -> None:
    toolstack, domid = crashed
    before = toolstack.domains()
    seen: list[list[DomainInfo]] = []
    domain = toolstack.dom0.domains[domid]
    domain.undo.callback(lambda: seen.append(toolstack.domains()))
    toolstack.destroy(domid)
    assert [info.domid for info in seen[0]] == [0, domid]
    assert seen[0][1] == before[1]


def test_statistics_leave_out_a_domain_that_goes_meanwhile(
    crashed: tuple[EmbeddedToolstack, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    toolstack, domid = crashed
    listed = toolstack.domains()
    toolstack.destroy(domid)
    monkeypatch.setattr(toolstack, "domains", lambda: listed)
    assert [counters.domid for counters in toolstack.statistics()] == [0]


def test_a_machine_that_was_closed_says_so() -> None:
    with power_on(memory_mib=32, engine="unicorn") as machine:
        client = machine.client
        domain = machine.create(DomainConfig("a", kernel=str(GUESTS / "hello.elf"), target_memory_kib=16 << 10))
    machine.close()
    uses = (machine.domains, client.host, client.subscribe, client.dmesg, domain.pause, domain.console)
    for use in (*uses, lambda: domain.state, lambda: domain.statistics, domain.wait):
        with pytest.raises(Closed, match="was closed"):
            use()


def test_an_nmi_for_a_vcpu_that_is_none_is_refused(crashed: tuple[EmbeddedToolstack, int]) -> None:
    toolstack, domid = crashed
    with pytest.raises(InvalidRequest, match="no vCPU 7"):
        toolstack.trigger(domid, Trigger.NMI, 7)


def test_the_limits_of_a_configuration_are_those_of_the_domain() -> None:
    config = DomainConfig("a", kernel=str(GUESTS / "hello.elf"), memory_mib=16)
    config.max_event_channels, config.max_grant_frames, config.max_maptrack_frames = 100, 5, 2
    config.rtc_timeoffset = -3600 % 2**32  # as the reader has it
    with power_on(memory_mib=32, engine="unicorn") as machine:
        made = machine.create(config)
        client = machine.client
        assert isinstance(client, EmbeddedToolstack)
        spec = client.dom0.domains[made.domid].spec
    limits = spec.limits
    assert spec.time_offset == -3600
    assert (limits.event_channel_port, limits.grant_frames, limits.mappings) == (100, 5, 512)
