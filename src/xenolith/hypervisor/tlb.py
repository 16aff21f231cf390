"""TLB flushes on behalf of a domain (Xen: flush_tlb_mask and the flush clock).

`Domain.flush_epoch` counts complete flushes of all the domain's vCPUs; the frame table stamps frames with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xenolith.hypervisor.domain import Domain, Vcpu


def flush_domain(domain: Domain) -> None:
    """No vCPU of the domain keeps any cached translation when this returns."""
    domain.flush_epoch += 1
    flush_vcpus(domain.vcpus)


def flush_vcpus(vcpus: Iterable[Vcpu]) -> None:
    """These vCPUs forget all cached translations before they execute guest code again."""
    seen = set()
    for vcpu in vcpus:
        cpu = vcpu.cpu
        if cpu is not None and id(cpu) not in seen:
            seen.add(id(cpu))
            cpu.flush_tlb()


def flush_page(vcpus: Iterable[Vcpu], va: int) -> None:
    """These vCPUs forget cached translations of one page."""
    seen = set()
    for vcpu in vcpus:
        cpu = vcpu.cpu
        if cpu is not None and id(cpu) not in seen:
            seen.add(id(cpu))
            cpu.flush_page(va)
