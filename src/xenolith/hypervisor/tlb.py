"""TLB flushes on behalf of a domain (Xen: flush_tlb_mask and the flush clock).

`Domain.flush_epoch` counts complete flushes of all the domain's vCPUs; the frame table stamps frames with it.

A Cpu may be flushed by its own thread only.  For a vCPU on another thread the flush is left as a request, which it
fulfils before it executes guest code again, and it is kicked out of the guest.  `Vcpu.in_guest` is set only under the
domain's lock, which the caller of these functions holds, so once it is seen clear the request cannot be overtaken.
"""

from __future__ import annotations

import time
from threading import get_ident
from typing import TYPE_CHECKING, Final

KICK_WORK: Final = 32  # of Domain.work_left

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xenolith.hypervisor.domain import Domain, Vcpu


def flush_domain(domain: Domain) -> None:
    """No vCPU of the domain uses any translation cached so far when this returns."""
    domain.flush_epoch += 1
    flush_vcpus(domain.vcpus)


def flush_vcpus(vcpus: Iterable[Vcpu]) -> None:
    """These vCPUs use no translation cached so far when this returns."""
    here = get_ident()
    elsewhere = []
    flushed = None
    for vcpu in vcpus:
        cpu = vcpu.cpu
        if cpu is None or cpu is flushed:
            continue
        if vcpu.thread == here:
            cpu.flush_tlb()
            flushed = cpu
        else:
            vcpu.flush_requested = True
            if vcpu.in_guest:
                cpu.kick()
                elsewhere.append(vcpu)
    _wait_until_out(elsewhere)


def flush_page(vcpus: Iterable[Vcpu], va: int) -> None:
    """These vCPUs use no translation of the page at `va` cached so far when this returns."""
    here = get_ident()
    others = []
    flushed = None
    for vcpu in vcpus:
        cpu = vcpu.cpu
        if cpu is None or cpu is flushed:
            continue
        if vcpu.thread == here:
            cpu.flush_page(va)
            flushed = cpu
        else:
            others.append(vcpu)
    if others:
        flush_vcpus(others)


def _wait_until_out(vcpus: list[Vcpu]) -> None:
    """A kick takes microseconds to arrive; until then there is nothing better to do."""
    for vcpu in vcpus:
        vcpu.domain.work_left -= KICK_WORK
        while vcpu.in_guest:
            time.sleep(0)
