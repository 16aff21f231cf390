"""Domains that end are dealt with as their configuration says, on a machine in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from toolstack.fake import UNREADABLE, FakeClient
from xenolith.toolstack.client import DomainEvent, EventKind, ToolstackError, every
from xenolith.toolstack.config.domain import Action, DomainConfig
from xenolith.toolstack.supervisor import Supervisor

NOON = datetime(2026, 3, 4, 12, 5, tzinfo=UTC)


@pytest.fixture
def machine() -> Iterator[FakeClient]:
    client = FakeClient()
    yield client
    client.close()


@pytest.fixture
def supervisor(machine: FakeClient, tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(machine, tmp_path / "dump", lambda: NOON)
    supervisor.pause_between_lives = lambda seconds: False
    yield supervisor
    supervisor.close()


def started(machine: FakeClient, supervisor: Supervisor, config: DomainConfig) -> tuple[int, Iterator[DomainEvent]]:
    """A running, supervised domain and what will happen to it."""
    domid = machine.create(config)
    supervisor.supervise(domid)
    events = every(supervisor.watch(domid))
    machine.unpause(domid)
    return domid, events


def texts(events: Iterator[DomainEvent]) -> list[str]:
    return [event.text for event in events if event.kind is EventKind.MESSAGE]


def until_rebuilt(events: Iterator[DomainEvent]) -> int:
    """The new domid."""
    for event in events:
        if event.kind is EventKind.REBUILT:
            assert event.successor is not None
            return event.successor
    raise AssertionError("the domain was not rebuilt")


def test_a_domain_that_powers_off_is_destroyed_with_the_words_of_xl(
    machine: FakeClient, supervisor: Supervisor
) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a"))
    machine.end(domid, 0)
    assert texts(events) == [
        "Domain 1 has shut down, reason code 0 0x0",
        "Action for shutdown reason code 0 is destroy",
        "Domain 1 needs to be cleaned up: destroying the domain",
        "Done. Exiting now",
    ]
    assert machine.guests == {}


def test_a_preserved_domain_stays_and_is_not_watched_any_more(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a", on_crash=Action.PRESERVE))
    machine.end(domid, 3)
    assert texts(events)[-1] == "Done. Exiting now"
    assert machine.guests[domid].info.shutdown
    with pytest.raises(ToolstackError, match="not supervised"):
        supervisor.watch(domid)


def test_a_rebooting_domain_comes_back_and_is_followed_on(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a"))
    for life in range(2, 5):
        machine.end(domid, 1)
        domid = until_rebuilt(events)
        assert domid == life
    machine.end(domid, 0)
    assert texts(events)[-1] == "Done. Exiting now"
    assert machine.guests == {}
    assert [call for call in machine.calls if call[0] == "create"] == [("create", "a")] * 4


def test_a_crash_leaves_a_core_before_the_domain_goes(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a/b", on_crash=Action.COREDUMP_DESTROY))
    machine.end(domid, 3)
    core = next(text for text in texts(events) if text.startswith("dumping core to "))
    path = core.removeprefix("dumping core to ")
    assert path.endswith("dump/a_b")
    assert machine.calls[-2:] == [("dump_core", domid, path), ("destroy", domid)]


def test_a_core_that_cannot_be_written_does_not_hold_up_the_restart(machine: FakeClient) -> None:
    supervisor = Supervisor(machine, Path("/proc/nowhere"), lambda: NOON)
    supervisor.pause_between_lives = lambda seconds: False
    domid, events = started(machine, supervisor, DomainConfig("a", on_crash=Action.COREDUMP_RESTART))
    machine.end(domid, 3)
    assert until_rebuilt(events) == 2
    supervisor.close()


def test_rename_restart_keeps_the_corpse_under_another_name(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a", on_crash=Action.RENAME_RESTART))
    machine.end(domid, 3)
    successor = until_rebuilt(events)
    assert {guest.info.name for guest in machine.guests.values()} == {"a-20260304T1205Z", "a"}
    machine.end(successor, 3)
    assert "already exists" in texts(events)[-2]
    assert set(machine.guests) == {domid, successor}


def test_a_domain_that_somebody_destroys_is_forgotten(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a"))
    machine.destroy(domid)
    assert [event.kind for event in events] == [EventKind.DESTROYED]


def test_what_config_update_stored_is_what_gets_built(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a", target_memory_kib=32768))
    machine.set_config(domid, DomainConfig("a", target_memory_kib=65536))
    machine.end(domid, 1)
    assert machine.guests[until_rebuilt(events)].info.memory_kib == 65536


def test_a_domain_that_cannot_be_rebuilt_is_given_up_with_the_reason(
    machine: FakeClient, supervisor: Supervisor
) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a"))
    machine.set_config(domid, DomainConfig("a", kernel=UNREADABLE))
    machine.end(domid, 1)
    assert texts(events)[-2:] == [
        "rebuild failed: failed to open file '/nope': No such file or directory",
        "Giving up on this domain.",
    ]


def test_a_soft_reset_starts_the_same_domain_over(machine: FakeClient, supervisor: Supervisor) -> None:
    domid, events = started(machine, supervisor, DomainConfig("a"))
    machine.end(domid, 5)
    assert next(event.text for event in events if event.text.startswith("Done")) == "Done. Rebooting now"
    assert not machine.guests[domid].info.shutdown
    machine.end(domid, 0)
    assert texts(events)[-1] == "Done. Exiting now"


def test_a_domain_that_ended_before_it_was_supervised_is_dealt_with(
    machine: FakeClient, supervisor: Supervisor
) -> None:
    domid = machine.create(DomainConfig("a"))
    machine.end(domid, 0)
    events = machine.subscribe()
    supervisor.supervise(domid)
    assert events.get() == DomainEvent(EventKind.DESTROYED, domid)


def test_a_domain_that_is_abandoned_between_two_lives_does_not_come_back(
    machine: FakeClient, supervisor: Supervisor
) -> None:
    between, go_on = threading.Event(), threading.Event()

    def pause(seconds: float) -> bool:
        between.set()
        go_on.wait()
        return False

    supervisor.pause_between_lives = pause
    domid, events = started(machine, supervisor, DomainConfig("a", on_reboot=Action.RESTART))
    machine.end(domid, 1)
    assert between.wait(20)
    assert not supervisor.abandon("b")
    assert supervisor.abandon("a")
    go_on.set()
    assert [event.text for event in events if event.kind is EventKind.MESSAGE][-1] == "Domain a is not built again."
    supervisor.close()
    assert machine.guests == {}
    assert not supervisor.abandon("a")


def test_a_domain_that_is_abandoned_while_it_is_built_again_goes_again(
    machine: FakeClient, supervisor: Supervisor
) -> None:
    create = machine.create

    def abandoned_meanwhile(config: DomainConfig) -> int:
        domid = create(config)
        if domid == 2:
            assert supervisor.abandon("a")
        return domid

    machine.create = abandoned_meanwhile  # type: ignore[assignment, method-assign]
    domid, events = started(machine, supervisor, DomainConfig("a", on_reboot=Action.RESTART))
    machine.end(domid, 1)
    assert [event.kind for event in events][-1] is EventKind.RELEASED
    supervisor.close()
    assert machine.calls[-2:] == [("create", "a"), ("destroy", 2)]


def test_a_host_that_gives_no_thread_does_not_keep_a_domain_from_its_end(
    machine: FakeClient, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("domain"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    domid, events = started(machine, supervisor, DomainConfig("a", on_reboot=Action.RESTART))
    machine.end(domid, 1)
    assert until_rebuilt(events) == 2


def test_closing_leaves_the_domains_alone_even_between_two_lives(machine: FakeClient, tmp_path: Path) -> None:
    supervisor = Supervisor(machine, tmp_path)
    domid, events = started(machine, supervisor, DomainConfig("a"))
    machine.end(domid, 1)
    assert next(event for event in events if event.text == "Done. Rebooting now")
    supervisor.close()
    assert [call[0] for call in machine.calls].count("create") == 1
