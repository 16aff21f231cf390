"""dom0's services around real, tiny guests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xenolith.dom0.console import Overflow
from xenolith.dom0.image import load_image
from xenolith.dom0.services import DomainSpec, GuestDomain
from xenolith.hypervisor.control import DomainCreateError, NoSuchDomain

if TYPE_CHECKING:
    from machines import Machine

PREBUILT = Path(__file__).resolve().parents[2] / "guests" / "prebuilt"


def spec(guest: str, cmdline: str = "") -> DomainSpec:
    path = PREBUILT / f"{guest}.elf"
    return DomainSpec(
        name=guest, image=load_image(path), kernel=str(path), cmdline=cmdline, memory_kib=16 << 10, vcpus=2
    )


@pytest.fixture
def host(machine: Callable[[int], Machine]) -> Machine:
    return machine(64)


def test_a_new_domain_is_paused_and_described_in_xenstore(host: Machine) -> None:
    domain = host.dom0.create(spec("hello"))
    assert host.dom0.control.info(domain.domid).total_pages == 4096
    assert domain.console.scrollback == b""
    home = f"/local/domain/{domain.domid}"
    store = host.dom0.xenstore
    assert store.read(f"{home}/name") == "hello"
    assert store.read(f"{home}/vm") == f"/vm/{domain.spec.uuid}"
    assert store.read(f"{home}/memory/target") == "16384"
    assert store.directory(f"{home}/cpu") == ["0", "1"]
    assert int(store.read(f"{home}/console/ring-ref")) == domain.built.console_mfn
    assert store.get_perms(home) == ["n0", f"r{domain.domid}"]
    assert store.get_perms(f"{home}/control/shutdown") == [f"n{domain.domid}"]


def test_a_domain_that_powers_off_is_noticed_and_stays_until_it_is_destroyed(host: Machine) -> None:
    seen: list[GuestDomain] = []
    host.dom0.shutdown_hooks.append(seen.append)
    domain = host.dom0.create(spec("hello"))
    host.dom0.start(domain)
    assert host.finish(domain).shutdown_reason == 0
    assert host.dom0.control.info(domain.domid).shutdown
    host.dom0.destroy(domain)
    assert seen == [domain]
    with pytest.raises(NoSuchDomain):
        host.dom0.control.info(domain.domid)
    assert b"hello from a PV guest" in domain.console.scrollback
    assert not host.dom0.xenstore.exists(f"/local/domain/{domain.domid}")
    assert not host.dom0.xenstore.exists(f"/vm/{domain.spec.uuid}")


def test_a_domains_memory_is_all_given_back(host: Machine) -> None:
    free = host.dom0.control.machine().free_pages
    for _ in range(3):
        domain = host.dom0.create(spec("hello"))
        host.dom0.start(domain)
        host.finish(domain)
        host.dom0.destroy(domain)
        assert host.dom0.control.machine().free_pages == free


def test_a_domain_that_cannot_be_made_leaves_nothing_behind(host: Machine) -> None:
    free = host.dom0.control.machine().free_pages
    with pytest.raises(DomainCreateError, match="2000 bytes"):
        host.dom0.create(spec("hello", "x" * 2000))
    with pytest.raises(DomainCreateError, match="MiB free"):
        host.dom0.create(replace(spec("hello"), memory_kib=1 << 20))
    assert host.dom0.control.machine().free_pages == free
    assert not host.dom0.control.list()
    assert host.dom0.xenstore.directory("/local/domain") == ["0"]


def test_destroying_a_running_domain_ends_those_who_wait_for_it(host: Machine) -> None:
    domain = host.dom0.create(spec("hello"))
    reader = domain.console.open_reader(Overflow.WAIT)
    outcomes: list[object] = []
    waiting = [
        threading.Thread(target=lambda: outcomes.append(reader.read())),
        threading.Thread(target=lambda: outcomes.append(domain.wait())),
    ]
    for thread in waiting:
        thread.start()
    host.dom0.destroy(domain)
    for thread in waiting:
        thread.join()
    assert b"" in outcomes
    assert domain.end is not None
    assert not domain.end.shutdown


def test_two_domains_end_each_in_its_own_way(host: Machine) -> None:
    crashing, greeting = host.dom0.create(spec("crash", "no-handler")), host.dom0.create(spec("hello", "console_io"))
    for domain in (crashing, greeting):
        host.dom0.start(domain)
    assert host.finish(crashing).shutdown_reason == 3
    ended = host.finish(greeting)
    assert ended.shutdown_reason == 0
    assert "FAILED=0" in ended.console
