"""Domains with networks come and go, and nothing of them stays: on a real machine, with ways to the outside."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xenolith.dom0.backends.net import VifSpec
from xenolith.dom0.image import load_image
from xenolith.dom0.network.port import Publication
from xenolith.dom0.services import DomainSpec
from xenolith.hypervisor.control import DomainCreateError

from .netfront import why_no_passt
from .test_leaks import HELLO, held

if TYPE_CHECKING:
    from machines import Machine


def children() -> int:
    return len(Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text().split())


def spec(*nets: VifSpec) -> DomainSpec:
    return DomainSpec(name="net", image=load_image(HELLO), kernel="hello.elf", memory_kib=16 << 10, nets=nets)


def interface(number: int, *publications: Publication) -> VifSpec:
    return VifSpec(number=number, mac=b"\0\x16\x3e\0\0" + bytes([number]), publications=publications)


def test_domains_with_networks_leave_nothing_behind(machine: Callable[[int], Machine]) -> None:
    dom0 = machine(64).dom0

    def cycle() -> None:
        domain = dom0.create(spec(interface(0), interface(1)))
        dom0.plug_net(domain, interface(2))
        dom0.start(domain)
        assert domain.wait(60) is not None
        dom0.destroy(domain)

    for _ in range(5):
        cycle()
    before = held(dom0)
    for _ in range(20):
        cycle()
    after = held(dom0)
    assert after.__class__(**{**vars(after), "mappings": 0}) == before.__class__(**{**vars(before), "mappings": 0})
    assert not dom0.network.router.vifs


@pytest.mark.skipif(bool(why_no_passt()), reason=why_no_passt())
def test_published_ports_leave_no_process_behind_and_none_that_is_taken_is_published(
    machine: Callable[[int], Machine],
) -> None:
    dom0 = machine(64).dom0
    before = held(dom0), children()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DomainCreateError) as error:
            dom0.create(spec(interface(0, Publication(6, "127.0.0.1", port, 80))))
        assert "passt" in str(error.value)
        assert children() == before[1]
    domain = dom0.create(spec(interface(0, Publication(6, "127.0.0.1", port, 80))))
    assert children() == before[1] + 1
    dom0.destroy(domain)
    after = held(dom0)
    assert (after.threads, after.descriptors, children()) == (before[0].threads, before[0].descriptors, before[1])
