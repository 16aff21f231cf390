"""Making and unmaking a domain: who gives it its part of each mechanism (Xen: domain_create, domain_kill, pv/domain.c).

A domain is born empty and paused, with Xen's own frames for it: shared_info, and the page tables that map the window of
its descriptor tables.  When it dies it gives back all it has, except frames that others still map.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.hypercalls import DOMID_FIRST_RESERVED
from xenolith.abi.x86 import PAGE_SIZE, PTE_A, PTE_P, PTE_RW, PTE_US
from xenolith.hypervisor import audit, descriptors, event_fifo, paging, ring0
from xenolith.hypervisor.domain import MAX_VCPUS, UNLIMITED_WORK, CpuidChange, Domain
from xenolith.hypervisor.domain_record.domain import clock_ahead, load_domain
from xenolith.hypervisor.domain_record.frames import FrameRecord, FrameTypes, check_frames
from xenolith.hypervisor.domain_record.kinds import Plain, Record, RecordError
from xenolith.hypervisor.events import DEFAULT_MAX_PORT, EventChannels
from xenolith.hypervisor.grants import DEFAULT_MAX_FRAMES, DEFAULT_MAX_MAPPINGS, MOST_FRAMES, GrantTable
from xenolith.hypervisor.hypercalls.table import HYPERCALL_TABLE
from xenolith.hypervisor.time import VcpuTimers
from xenolith.hypervisor.view import View
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.memory import MachineMemory, OutOfMemory

if TYPE_CHECKING:
    from xenolith.hypervisor.hypervisor import Hypervisor

XEN_TABLE: Final = PTE_P | PTE_RW | PTE_US | PTE_A  # entries of Xen's own upper tables
WINDOW_TABLE: Final = PTE_P | PTE_RW | PTE_A


class NoSuchDomain(Exception):
    """No domain has this id."""


class DomainCreateError(Exception):
    """The domain cannot be made; the text says why and what to change."""


@dataclass(frozen=True)
class Limits:
    """What a domain may have at most (Xen: xen_domctl_createdomain)."""

    event_channel_port: int = DEFAULT_MAX_PORT  # the largest
    grant_frames: int = DEFAULT_MAX_FRAMES
    mappings: int = DEFAULT_MAX_MAPPINGS  # of other domains' grants, at a time
    cpuid: tuple[CpuidChange, ...] = ()  # what it is told of the processor, if not what all domains are

    def check(self) -> None:
        """Raises DomainCreateError for what no domain can have."""
        if not 1 <= self.grant_frames <= MOST_FRAMES:
            raise DomainCreateError(f"a grant table of {self.grant_frames} frames: it has 1 to {MOST_FRAMES}")
        if min(self.event_channel_port, self.mappings) < 0:
            raise DomainCreateError(f"{self.event_channel_port} event channels and {self.mappings} mappings of grants")


USUAL: Final = Limits()
OF_DOM0: Final = Limits(event_channel_port=(1 << 14) - 1)  # for several domains a hundred, and some thousand clones


def create_dom0(hypervisor: Hypervisor) -> Domain:
    """Make domain 0, whose code is Python (`python_domain`). Once, before any other domain."""
    domain = Domain(hypervisor, 0, None, 1, View(hypervisor.memory, 0))
    _wire(domain, OF_DOM0)
    domain.grants.grow(1)  # which grants nothing
    hypervisor.scheduler.init_domain(domain)
    with hypervisor.lock:
        hypervisor.domains[0] = domain
    return domain


def create_domain(hypervisor: Hypervisor, uuid: bytes, max_vcpus: int, max_pages: int, limits: Limits = USUAL) -> int:
    """Make an empty domain, paused once; its domid. Raises DomainCreateError."""
    return _create(hypervisor, uuid, max_vcpus, max_pages, None, limits)


@dataclass(frozen=True)
class Arrival:
    """A domain that comes from elsewhere: its frames' contents are in `memory` (view.memory_for) at the same MFNs."""

    memory: MachineMemory
    record: Plain
    frames: FrameRecord
    types: FrameTypes | None = None
    """Of a copy of a domain of this machine, which is believed; anything else is checked."""


def restore_domain(
    hypervisor: Hypervisor, uuid: bytes, max_vcpus: int, max_pages: int, arrival: Arrival, limits: Limits = USUAL
) -> int:
    """Make a domain that has arrived, paused once; its domid. Whatever becomes of it, `arrival.memory` is used up.

    Raises RecordError where it cannot be what it is said to be, and DomainCreateError.
    """
    try:
        check_frames(arrival.frames, arrival.memory.frames)
        arrival.memory.adopt(arrival.frames.mfns)
        return _create(hypervisor, uuid, max_vcpus, max_pages, arrival, limits)
    except BaseException as error:
        arrival.memory.close()
        if isinstance(error, OutOfMemory):
            raise DomainCreateError(f"not enough machine memory: {error}") from error
        raise


def _create(
    hypervisor: Hypervisor, uuid: bytes, max_vcpus: int, max_pages: int, arrival: Arrival | None, limits: Limits
) -> int:
    if not 1 <= max_vcpus <= MAX_VCPUS:
        raise DomainCreateError(f"{max_vcpus} vCPUs: a domain has 1 to {MAX_VCPUS}")
    limits.check()
    with hypervisor.lock:
        domid = hypervisor.next_domid()
    if domid >= DOMID_FIRST_RESERVED:
        raise DomainCreateError("all domain ids are in use")
    with ExitStack() as undo:
        try:
            view = View(hypervisor.memory, max_pages, arrival.memory if arrival else None)
            undo.callback(view.memory.close)
            engine = hypervisor.engine_factory(view.memory)
            undo.callback(engine.close)
            domain = Domain(hypervisor, domid, engine, max_vcpus, view)
            domain.uuid = uuid
            domain.max_pages = max_pages
            domain.paused_by_control = 1
            if arrival is not None:
                record = Record(arrival.record, "the domain")
                domain.clock_ahead = clock_ahead(record, hypervisor.clock)
                domain.clock = hypervisor.clock.ahead(domain.clock_ahead)
            _set_up(domain, arrival is None, limits)
            if arrival is not None:
                undo.callback(_stop_timers, domain)
                load_domain(domain, arrival.record, arrival.frames, arrival.types)
                problems = audit.check_domain(domain) if arrival.types is None else []
                if problems:
                    raise RecordError(f"its frames do not add up: {problems[0]}")
        except EngineError as error:
            raise DomainCreateError(f"the engine cannot be started: {error}") from error
        except OutOfMemory as error:
            raise DomainCreateError(f"not enough machine memory: {error}") from error
        undo.pop_all()
    hypervisor.scheduler.init_domain(domain)
    with hypervisor.lock:
        hypervisor.domains[domid] = domain
    how = "restored" if arrival else "created"
    hypervisor.log(f"d{domid}: {how} with {max_vcpus} vCPUs and at most {max_pages >> 8} MiB on {engine.name}")
    return domid


def _set_up(domain: Domain, shares_info: bool, limits: Limits) -> None:
    """Xen's own frames for a domain, the shared_info too unless it has one already, and its mechanisms."""
    frames = domain.frames
    engine = domain.engine
    assert engine is not None
    if shares_info:
        (domain.shared_info_mfn,) = frames.allocate_xen(1)
        frames.share_with_guest(domain.shared_info_mfn, domain.domid)
    pages = len(domain.vcpus) * descriptors.PAGES_PER_VCPU
    tables = frames.allocate_xen(2 + (pages + 511) // 512)
    domain.shared_info = domain.shared_info_mfn * PAGE_SIZE
    l3, l2, *domain.window_l1 = tables
    q = domain.memory.q
    q[l3 << 9] = l2 << 12 | WINDOW_TABLE
    for number, l1 in enumerate(domain.window_l1):
        q[l2 << 9 | number] = l1 << 12 | WINDOW_TABLE
    for vcpu in domain.vcpus:
        descriptors.set_up_window(vcpu)
        vcpu.shared_info = domain.shared_info
        vcpu.info = domain.shared_info + vcpu.vcpu_id * layout.VCPU_INFO_SIZE
        vcpu.state.gdt_va = descriptors.gdt_va(vcpu.vcpu_id)
        vcpu.state.gdt_limit = (layout.FIRST_RESERVED_GDT_PAGE + 1) * PAGE_SIZE - 1
    entries = domain.xen_l4_entries
    entries[descriptors.WINDOW_SLOT - layout.XEN_FIRST_SLOT] = l3 << 12 | WINDOW_TABLE
    for slot, entry in {**domain.view.m2p_l4_entries, **engine.l4_entries}.items():
        entries[slot - layout.XEN_FIRST_SLOT] = entry
    if engine.kernel_l4_entries is not None:
        domain.engine_views = engine.l4_entries, engine.kernel_l4_entries
        ((domain.view_slot, user_entry),) = engine.l4_entries.items()
        domain.view_entries[:] = user_entry, engine.kernel_l4_entries[domain.view_slot]
    domain.executable_mapped = engine.executable_mapped
    domain.code_frames = engine.code_frames
    domain.caches_tables = engine.caches_tables
    domain.entry_changed = engine.entry_changed
    _wire(domain, limits)


def _stop_timers(domain: Domain) -> None:
    """Cancel all timers of a domain."""
    for vcpu in domain.vcpus:
        vcpu.timers.stop()
    for timer in domain.watchdogs:
        if timer is not None:
            domain.hypervisor.timers.cancel(timer)


def _wire(domain: Domain, limits: Limits) -> None:
    """Give a domain its part of each mechanism, and native code where there is some."""
    domain.lock.take_word = ring0.lock_taker()
    domain.hypercalls = HYPERCALL_TABLE
    domain.cpuid_changes = limits.cpuid
    domain.events = EventChannels(domain, limits.event_channel_port)
    domain.grants = GrantTable(domain, limits.grant_frames, limits.mappings)
    for vcpu in domain.vcpus:
        vcpu.native_handler = ring0.handler_address()
        vcpu.native_timer, vcpu.now = ring0.timer_address(), ring0.clock_address(domain.clock)
        vcpu.timers = VcpuTimers(vcpu)
        vcpu.set_timer_late = vcpu.timers.set_singleshot_late


def _relinquish(domain: Domain) -> bool:
    """Drop the references of a dead domain. False: its frame table was inconsistent; all its memory goes, then."""
    try:
        with domain.lock:
            paging.relinquish(domain)
            return True
    except (AssertionError, IndexError, ValueError):
        domain.hypervisor.log(f"{domain!r}: its frame table is inconsistent:\n{traceback.format_exc()}")
        with domain.lock:
            domain.frames.abandon()
        return False


def destroy(domain: Domain) -> None:
    """End a domain and give back all it has, except frames that others still map."""
    hypervisor = domain.hypervisor
    with hypervisor.lock:
        if domain.dying:
            return
        domain.dying = True
    hypervisor.scheduler.stop(domain)
    domain.work_left = UNLIMITED_WORK
    domain.events.close_all()
    with domain.lock:
        event_fifo.give_up(domain)
        domain.code_frames = 0
        for vcpu in domain.vcpus:
            vcpu.cpu = None
            descriptors.destroy_gdt(vcpu)
            descriptors.unload_ldt(vcpu)
            if vcpu.info_mfn:
                paging.put_page_and_type(domain, vcpu.info_mfn)
                vcpu.info_mfn = 0
    if domain.engine is not None:
        domain.engine.close()
        domain.engine = None
    domain.executable_mapped = domain.entry_changed = None
    orderly = _relinquish(domain)
    domain.grants.release_all()
    with domain.lock:  # to the end: those who map its frames give them back one by one under it
        if orderly:
            for mfn in (domain.shared_info_mfn, *domain.shared_frames()):
                domain.frames.end_sharing(mfn)
        domain.memory.keep_only(domain.frames.referenced(domain.domid))
    with hypervisor.lock:
        del hypervisor.domains[domain.domid]
    hypervisor.log(f"{domain!r}: destroyed")
