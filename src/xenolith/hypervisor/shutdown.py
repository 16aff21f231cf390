"""The end of a domain: by its own will, a watchdog, a crash (Xen: common/domain.c, domain_shutdown, domain_crash)."""

from __future__ import annotations

from xenolith.abi.hypercalls import SHUTDOWN_crash
from xenolith.hypervisor.domain import Domain, Vcpu


def domain_shutdown(domain: Domain, reason: int) -> None:
    """The domain stops for `reason` (SHUTDOWN_*), of which dom0 will hear. The first reason counts."""
    with domain.lock:
        if domain.shutdown_reason is not None:
            return
        domain.shutdown_reason = domain.shutdown_code if domain.shutdown_code is not None else reason
        domain.hypervisor.scheduler.tell_to_leave(domain)
    domain.hypervisor.log(f"{domain!r}: shut down, reason {domain.shutdown_reason}")
    domain.hypervisor.scheduler.announce_shutdown(domain)


def domain_crash(victim: Vcpu | Domain, text: str) -> None:
    """End a domain that cannot go on, telling the log why. Nothing happens to one that has shut down."""
    domain = victim.domain if isinstance(victim, Vcpu) else victim
    if domain.shutdown_reason is not None:
        return
    domain.hypervisor.log(text)
    domain.crash_report = domain.crash_report or text
    domain_shutdown(domain, SHUTDOWN_crash)
