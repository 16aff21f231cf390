"""A domain's counters by name (compare Xen's perfc): what it trapped for, and which hypercalls it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xenolith.abi import hypercalls, x86
from xenolith.hypervisor.domain import (
    COUNT_PAGE_TABLE_WRITE,
    COUNT_PRIVILEGED,
    COUNT_SYSCALL_BOUNCE,
    COUNT_SYSCALL_UNTRAPPED,
    COUNT_UPCALL,
)
from xenolith.hypervisor.runstate import running_time
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, TRAP_SYSENTER

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain

HYPERCALL_NAMES: Final = {
    number: name.removeprefix("HYPERVISOR_")
    for name, number in vars(hypercalls).items()
    if name.startswith("HYPERVISOR_")
}
TRAP_NAMES: Final = {
    **{number: "#" + name.removeprefix("VECTOR_") for name, number in vars(x86).items() if name.startswith("VECTOR_")},
    TRAP_SYSCALL: "syscall",
    TRAP_SYSENTER: "sysenter",
    TRAP_CPUID: "cpuid",
    COUNT_SYSCALL_BOUNCE: "system call of a program",
    COUNT_SYSCALL_UNTRAPPED: "system call without a trap",
    COUNT_UPCALL: "event upcall",
    COUNT_PAGE_TABLE_WRITE: "page table write",
    COUNT_PRIVILEGED: "privileged instruction",
}

DERIVED: Final = ("event upcall", "page table write", "privileged instruction")
"""Counted with another trap already."""


@dataclass(frozen=True)
class Counters:
    """What a domain did since it was made.

    `traps` by kind; page table writes are page faults too, and privileged instructions general protection faults.
    `hypercalls` by name, those inside a multicall not counted.  `cpu_time` in ns.
    """

    cpu_time: int
    traps: dict[str, int]
    hypercalls: dict[str, int]

    @property
    def total_traps(self) -> int:
        """Every trap once, hypercalls included."""
        direct = sum(count for name, count in self.traps.items() if name not in DERIVED)
        return direct + sum(self.hypercalls.values())


def cpu_time(domain: Domain) -> int:
    """ns for which the domain's vCPUs have run."""
    now = domain.hypervisor.clock.now()
    return sum(running_time(vcpu, now) for vcpu in domain.vcpus)


def counters(domain: Domain) -> Counters:
    """A snapshot, the largest counts first."""
    counts = list(domain.trap_counts)
    counts[COUNT_SYSCALL_UNTRAPPED] = sum(vcpu.untrapped_syscalls for vcpu in domain.vcpus)
    counts[COUNT_UPCALL] += sum(vcpu.untrapped_ticks for vcpu in domain.vcpus)
    return Counters(
        cpu_time(domain),
        _by_name(counts, TRAP_NAMES, "trap"),
        _by_name(list(domain.hypercall_counts), HYPERCALL_NAMES, "hypercall"),
    )


def _by_name(counts: list[int], names: dict[int, str], what: str) -> dict[str, int]:
    named = {names.get(number, f"{what} {number}"): count for number, count in enumerate(counts) if count}
    return dict(sorted(named.items(), key=lambda item: -item[1]))
