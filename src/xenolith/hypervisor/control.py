"""The control interface: what dom0 may ask of the hypervisor about other domains (paper 3.1; Xen: domctl).

dom0's services and the toolstack use this, event channels, grants and xenstore, and nothing else of the hypervisor.
Domains are named by domid.  Operations on a domain that does not exist raise NoSuchDomain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from xenolith.abi import layout
from xenolith.abi.errno import EINVAL
from xenolith.abi.hypercalls import RUNSTATE_running, SHUTDOWN_crash, SHUTDOWN_suspend
from xenolith.abi.vcpu_context import VcpuContext
from xenolith.abi.x86 import (
    CS,
    DS,
    EFLAGS_IF,
    EFLAGS_RESERVED_ONE,
    ES,
    PAGE_SIZE,
    RAX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    SS,
)
from xenolith.hypervisor import inspection, lifecycle, paging, time, view
from xenolith.hypervisor.domain import UNLIMITED_WORK, CpuidChange, Domain
from xenolith.hypervisor.domain_record.domain import domain_state
from xenolith.hypervisor.domain_record.frames import FrameRecord, FrameTypes, frame_record, frame_types
from xenolith.hypervisor.domain_record.kinds import Plain, RecordError
from xenolith.hypervisor.frames import TYPE_COUNT, TYPE_MASK, TYPE_WRITABLE
from xenolith.hypervisor.hypercalls import vcpu_op, version
from xenolith.hypervisor.inspection import LinearRun, OwnMemory
from xenolith.hypervisor.lifecycle import USUAL, Arrival, DomainCreateError, Limits, NoSuchDomain
from xenolith.hypervisor.runstate import running_time, runstate_times
from xenolith.hypervisor.sched.algorithms import ALGORITHMS
from xenolith.hypervisor.shutdown import domain_shutdown
from xenolith.hypervisor.statistics import Counters, counters, cpu_time
from xenolith.machine.cpuid import native_cpuid
from xenolith.machine.memory import Frames, Image, MachineMemory, OutOfMemory
from xenolith.machine.write_tracking import NotTracked, WriteTracking

if TYPE_CHECKING:
    from xenolith.hypervisor.hypervisor import Hypervisor

E820_RAM: Final = 1
MAX_WEIGHT: Final = 65535
MAX_MICROSECONDS: Final = 10_000_000  # of a parameter that is a time
FEATURE_WORDS: Final = (
    (1, 0, 3), (1, 0, 2), (0x8000_0001, 0, 3), (0x8000_0001, 0, 2), (0xD, 1, 0), (7, 0, 1), (7, 0, 2),
    (0x8000_0007, 0, 3),
)  # fmt: skip


@dataclass(frozen=True)
class DomainInfo:
    """A domain as the toolstack lists it (Xen: XEN_DOMCTL_getdomaininfo)."""

    domid: int
    uuid: bytes
    running: bool
    blocked: bool
    paused: bool
    shutdown: bool
    shutdown_reason: int | None
    dying: bool
    crash_report: str
    total_pages: int
    max_pages: int
    ceiling_pages: int  # that it was made with: what max_pages can be at most
    online_vcpus: int
    max_vcpus: int
    cpu_time: int  # ns
    traps: int
    engine: str
    cpupool: str


@dataclass(frozen=True)
class VcpuInfo:
    """A vCPU as the toolstack lists it (Xen: XEN_DOMCTL_getvcpuinfo)."""

    vcpu_id: int
    online: bool
    running: bool
    blocked: bool
    pcpu: int  # on which it runs or ran last; 0 before that
    cpu_time: int  # ns
    times: tuple[int, int, int, int]  # ns running (as `cpu_time`), runnable, blocked, offline
    hard_affinity: frozenset[int] | None  # None: all pCPUs
    soft_affinity: frozenset[int] | None


@dataclass(frozen=True)
class CpupoolInfo:
    """A cpupool (Xen: XEN_SYSCTL_CPUPOOL_OP_INFO)."""

    name: str
    scheduler: str
    pcpus: tuple[int, ...]
    domains: int  # how many
    schedparam: Mapping[str, int]
    scheduler_parameters: tuple[str, ...]


@dataclass(frozen=True)
class MachineInfo:
    """The machine as the toolstack describes it (Xen: XEN_SYSCTL_physinfo, xen_version)."""

    pcpus: int
    tsc_hz: int
    total_pages: int
    free_pages: int
    version: tuple[int, int]
    extra_version: str
    capabilities: str
    scheduler: str
    scheduler_parameters: tuple[str, ...]
    unassigned_pcpus: frozenset[int]  # that are in no cpupool
    features: tuple[int, ...]  # CPUID words 1.edx 1.ecx e1.edx e1.ecx Da1.eax 7b0.ebx 7c0.ecx e7.edx (Xen: hw_cap)


@dataclass(frozen=True)
class StillDomain:
    """A domain that stands still: its record, its frames, and its machine memory to read their contents from.

    `populated`: of each frame of it, whether that can hold anything but zeros.
    """

    record: Plain
    frames: FrameRecord
    populated: npt.NDArray[np.bool_]
    memory: memoryview


@dataclass(frozen=True)
class Frozen:
    """What a domain was at one moment, and its memory then."""

    max_pages: int
    vcpus: int
    record: Plain
    frames: FrameRecord
    types: FrameTypes
    image: Image

    def close(self) -> None:
        self.image.close()


class Control:
    """The control hypercalls, made by dom0's Python code."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    def _domain(self, domid: int) -> Domain:
        domain = self._hypervisor.domain(domid)
        if domain is None:
            raise NoSuchDomain(f"there is no domain {domid}")
        return domain

    # --- life cycle ----------------------------------------------------------------------------------

    def create_domain(self, uuid: bytes, max_vcpus: int, max_pages: int, limits: Limits = USUAL) -> int:
        """Make an empty domain, paused once; its domid. Raises DomainCreateError."""
        return lifecycle.create_domain(self._hypervisor, uuid, max_vcpus, max_pages, limits)

    def destroy(self, domid: int) -> None:
        """End a domain and give back all it has, except frames that others still map."""
        lifecycle.destroy(self._domain(domid))

    def pause(self, domid: int) -> None:
        """Stop the domain's vCPUs; none executes when this returns. Counts."""
        self._hypervisor.scheduler.pause(self._domain(domid))

    def unpause(self, domid: int) -> None:
        """Undo one pause. A domain is born paused: this is also how it begins."""
        self._hypervisor.scheduler.unpause(self._domain(domid))

    def resume(self, domid: int) -> None:
        """Let a domain go on that has shut down to suspend itself (Xen: XEN_DOMCTL_resumedomain).

        Its hypercall answers that it was not suspended, for it is where it was. Raises ValueError for another.
        """
        domain = self._domain(domid)
        self._hypervisor.scheduler.store_states(domain)  # no thread has anything of it in hand then
        with domain.lock:
            if domain.shutdown_reason != SHUTDOWN_suspend:
                raise ValueError(f"domain {domid} has not suspended itself")
            domain.vcpus[0].regs[RAX] = 1
            domain.shutdown_reason = None
            domain.shutdown_announced = False
            for vcpu in domain.vcpus:
                self._hypervisor.scheduler.wake(vcpu)

    def send_nmi(self, domid: int, vcpu_id: int) -> None:
        """Send a vCPU an NMI (Xen: XEN_DOMCTL_sendtrigger). Raises ValueError where it is not online."""
        domain = self._domain(domid)
        with domain.lock:
            if vcpu_id >= len(domain.vcpus) or not domain.vcpus[vcpu_id].online:
                raise ValueError(f"domain {domid} has no vCPU {vcpu_id} that is online")
            vcpu_op.send_nmi(domain.vcpus[vcpu_id])

    def scheduling(self, domid: int) -> dict[str, int]:
        """The scheduler's parameters of a domain (Xen: XEN_DOMCTL_SCHEDOP_getinfo)."""
        return dict(self._domain(domid).vcpus[0].unit.parameters)

    def set_scheduling(self, domid: int, parameters: Mapping[str, int]) -> None:
        """Change some of them (Xen: XEN_DOMCTL_SCHEDOP_putinfo). Raises ValueError."""
        domain = self._domain(domid)
        policy = domain.cpupool.policy
        for name, value in parameters.items():
            if name not in policy.parameters:
                raise ValueError(f"the scheduler {policy.name} has no parameter {name}")
            least, most = 0, MAX_MICROSECONDS
            if name == "weight":
                least, most = 1, MAX_WEIGHT
            elif name == "cap":
                most = 100 * len(domain.vcpus)
            if not least <= value <= most:
                raise ValueError(f"{name} out of range, valid values are from {least} to {most}")
        self._hypervisor.scheduler.pools.adjust(domain, parameters)

    def set_affinity(
        self, domid: int, vcpu_id: int | None, hard: frozenset[int] | None, soft: frozenset[int] | None
    ) -> None:
        """Where a vCPU (None: each) may run and where it would rather (Xen: XEN_DOMCTL_setvcpuaffinity).

        None for a set leaves it as it is.  Raises ValueError.
        """
        domain = self._domain(domid)
        if vcpu_id is not None and not 0 <= vcpu_id < len(domain.vcpus):
            raise ValueError(f"domain {domid} has no vCPU {vcpu_id}")
        vcpus = domain.vcpus if vcpu_id is None else [domain.vcpus[vcpu_id]]
        self._hypervisor.scheduler.pools.set_affinity(vcpus, hard, soft)

    def set_time_offset(self, domid: int, seconds: int) -> None:
        """How far the domain's wall clock is ahead of UTC (Xen: XEN_DOMCTL_settimeoffset). Before it runs."""
        domain = self._domain(domid)
        with domain.lock:
            domain.time_offset = seconds
            time.set_wall_clock(domain)

    def set_max_pages(self, domid: int, pages: int) -> None:
        """Let the domain have no more than so many frames (Xen: XEN_DOMCTL_max_mem); those that it has stay.

        Raises ValueError beyond what it was made with: its machine addresses end there.
        """
        domain = self._domain(domid)
        ceiling = domain.view.max_pages
        if not 1 <= pages <= ceiling:
            raise ValueError(f"domain {domid} can have 1 to {ceiling} pages, not {pages}")
        domain.max_pages = pages

    def crash(self, domid: int, why: str) -> None:
        """Shut the domain down as crashed."""
        domain = self._domain(domid)
        domain.crash_report = domain.crash_report or why
        domain_shutdown(domain, SHUTDOWN_crash)

    def info(self, domid: int) -> DomainInfo:
        """A snapshot of the domain's state."""
        return _info(self._domain(domid))

    def vcpus(self, domid: int) -> list[VcpuInfo]:
        """A snapshot of each of the domain's vCPUs."""
        domain = self._domain(domid)
        now = self._hypervisor.clock.now()
        with domain.lock:
            return [
                VcpuInfo(
                    vcpu.vcpu_id,
                    vcpu.online,
                    vcpu.runstate == RUNSTATE_running,
                    vcpu.blocked,
                    max(vcpu.unit.pcpu, 0),
                    running_time(vcpu, now),
                    runstate_times(vcpu, now),
                    vcpu.unit.hard,
                    vcpu.unit.soft,
                )
                for vcpu in domain.vcpus
            ]

    # --- cpupools (Xen: XEN_SYSCTL_cpupool_op) -----------------------------------------------------------

    def cpupools(self) -> Sequence[CpupoolInfo]:
        """All cpupools, that in which domains begin first."""
        return [
            CpupoolInfo(
                pool.name,
                pool.policy.name,
                tuple(pool.holders),
                len({unit.domid for unit in pool.members}),
                dict(pool.policy.schedparam),
                tuple(pool.policy.parameters),
            )
            for pool in self._hypervisor.scheduler.pools
        ]

    def create_cpupool(self, name: str, scheduler: str, pcpus: Collection[int]) -> None:
        """Make one of pCPUs that are in none. `scheduler` is one of ALGORITHMS. Raises ValueError."""
        if scheduler not in ALGORITHMS:
            raise ValueError(f"there is no scheduler {scheduler}, only {', '.join(ALGORITHMS)}")
        self._hypervisor.scheduler.pools.create(name, ALGORITHMS[scheduler], pcpus)

    def destroy_cpupool(self, name: str) -> None:
        """Its pCPUs are in no cpupool then. Raises ValueError where it has domains."""
        self._hypervisor.scheduler.pools.destroy(name)

    def rename_cpupool(self, name: str, new_name: str) -> None:
        """Raises ValueError."""
        self._hypervisor.scheduler.pools.rename(name, new_name)

    def add_to_cpupool(self, name: str, pcpus: Collection[int]) -> None:
        """Give it pCPUs that are in none. Raises ValueError."""
        self._hypervisor.scheduler.pools.add_pcpus(name, pcpus)

    def remove_from_cpupool(self, name: str, pcpus: Collection[int]) -> None:
        """Take pCPUs from it; nobody runs on them when this returns. Raises ValueError."""
        self._hypervisor.scheduler.pools.remove_pcpus(name, pcpus)

    def move_to_cpupool(self, domid: int, name: str) -> None:
        """Its vCPUs may run on any pCPU of the pool then. Raises ValueError."""
        domain = self._domain(domid)
        scheduler = self._hypervisor.scheduler
        scheduler.pause(domain)
        try:
            scheduler.pools.move_domain(domain, name)
        finally:
            scheduler.unpause(domain)

    def set_schedparam(self, name: str, parameters: Mapping[str, int]) -> None:
        """Change parameters of a cpupool's algorithm. Raises ValueError."""
        policy = self._hypervisor.scheduler.pools.named(name).policy
        for parameter, value in parameters.items():
            if parameter not in policy.schedparams:
                raise ValueError(f"the scheduler {policy.name} has no parameter {parameter}")
            if not 0 <= value <= MAX_MICROSECONDS:
                raise ValueError(f"{parameter} out of range, valid values are from 0 to {MAX_MICROSECONDS}")
        self._hypervisor.scheduler.pools.set_schedparam(name, parameters)

    # --- what there is -----------------------------------------------------------------------------------

    def counters(self, domid: int) -> Counters:
        """What the domain did, counted by kind."""
        return counters(self._domain(domid))

    def list(self) -> list[DomainInfo]:
        """All domains but dom0, by domid."""
        with self._hypervisor.lock:
            domains = [domain for domid, domain in sorted(self._hypervisor.domains.items()) if domid]
        return [_info(domain) for domain in domains]

    def machine(self) -> MachineInfo:
        """What the machine has and which hypervisor this is."""
        hypervisor = self._hypervisor
        return MachineInfo(
            pcpus=hypervisor.scheduler.pcpus,
            tsc_hz=hypervisor.tsc_hz,
            total_pages=hypervisor.memory.frames,
            free_pages=hypervisor.memory.free_frames,
            version=(version.MAJOR, version.MINOR),
            extra_version=version.EXTRAVERSION.decode(),
            capabilities=version.CAPABILITIES.decode().strip(),
            scheduler=hypervisor.scheduler.pools.first.policy.name,
            scheduler_parameters=tuple(hypervisor.scheduler.pools.first.policy.parameters),
            unassigned_pcpus=frozenset(hypervisor.scheduler.pools.unassigned),
            features=tuple(native_cpuid(leaf, subleaf)[word] for leaf, subleaf, word in FEATURE_WORDS),
        )

    def log_text(self) -> str:
        """The hypervisor's log (Xen: XEN_SYSCTL_readconsole)."""
        return self._hypervisor.log_text

    def clear_log(self) -> None:
        self._hypervisor.clear_log()

    def emergency_output(self, domid: int) -> bytes:
        """The latest of what the domain wrote with console_io."""
        return self._domain(domid).emergency_console.text

    # --- building ------------------------------------------------------------------------------------

    def populate(self, domid: int, count: int) -> Frames:
        """Give the domain `count` frames at pfns 0, 1, ...; their MFNs. Raises DomainCreateError."""
        domain = self._domain(domid)
        hypervisor = self._hypervisor
        if domain.total_pages + count > domain.max_pages:
            raise DomainCreateError(f"{count} pages are more than the domain's limit of {domain.max_pages}")
        try:
            mfns = domain.memory.allocate(count)
        except OutOfMemory as error:
            free = hypervisor.memory.free_frames
            raise DomainCreateError(f"the machine has {free >> 8} MiB free, the domain wants {count >> 8}") from error
        domain.frames.assign(mfns, domid)
        domain.view.m2p_words[mfns] = np.arange(count, dtype=np.uint64)
        domain.total_pages += count
        return mfns

    def write_frames(self, domid: int, mfn: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write into consecutive frames of a domain that are in no use that forbids it.

        Raises ValueError where one is not the domain's, or is a page table or descriptor page.
        """
        domain = self._domain(domid)
        frames = domain.frames
        count = (offset + len(data) + PAGE_SIZE - 1) // PAGE_SIZE
        infos = frames.type_infos[mfn : mfn + count]
        in_use = ((infos & np.uint64(TYPE_COUNT)) != 0) & ((infos & np.uint64(TYPE_MASK)) != np.uint64(TYPE_WRITABLE))
        if mfn <= 0 or (frames.owners[mfn : mfn + count] != domid).any() or in_use.any():
            raise ValueError(f"frames {mfn:#x}..{mfn + count - 1:#x} cannot be written for domain {domid}")
        start = mfn * PAGE_SIZE + offset
        domain.memory.b[start : start + len(data)] = data

    def allocate_unbound(self, domid: int) -> int:
        """A port of the domain's that dom0 may bind to."""
        port = self._domain(domid).events.alloc_unbound(0)
        if port < 0:
            raise DomainCreateError(f"no event channel is free in domain {domid}")
        return port

    def grant_to_dom0(self, domid: int, ref: int, mfn: int) -> None:
        """Fill in an entry of the grant table of a domain that does not run yet (libxc: xc_dom_gnttab_seed).

        Raises DomainCreateError.
        """
        try:
            self._domain(domid).grants.permit_access(ref, 0, mfn)
        except OutOfMemory as error:
            raise DomainCreateError(f"not enough machine memory: {error}") from error

    def shared_info_mfn(self, domid: int) -> int:
        return self._domain(domid).shared_info_mfn

    def initialise_shared_info(self, domid: int, max_pfn: int) -> None:
        """As a domain finds it at boot: upcalls masked, the clock set, RAM from 0 to `max_pfn`."""
        domain = self._domain(domid)
        memory, base = domain.memory.b, domain.shared_info
        for vcpu in domain.vcpus:
            memory[vcpu.info + layout.VCPU_INFO_UPCALL_MASK] = 1
        layout.U64.pack_into(memory, base + layout.SHARED_MAX_PFN, max_pfn)
        domain.memory_map = [(0, max_pfn * PAGE_SIZE, E820_RAM)]
        time.set_wall_clock(domain)

    def set_boot_context(self, domid: int, *, l4_mfn: int, entry: int, stack: int, start_info: int) -> None:
        """vCPU 0 as the kernel is entered (public/xen.h, "start-of-day"). Raises DomainCreateError."""
        domain = self._domain(domid)
        vcpu = domain.vcpus[0]
        with domain.lock:
            result = paging.pin(domain, l4_mfn, paging.TYPE_L4)
            if result:
                raise DomainCreateError(f"the initial page tables were refused (errno {-result})")
            result = set_initial_cr3(vcpu.domain, 0, l4_mfn, 0)
            if result:
                raise DomainCreateError(f"the initial base pointer was refused (errno {-result})")
            regs = vcpu.regs
            regs[RIP], regs[RSP], regs[RSI] = entry, stack, start_info
            regs[RFLAGS] = EFLAGS_IF | EFLAGS_RESERVED_ONE
            regs[CS], regs[SS] = layout.FLAT_RING3_CS64, layout.FLAT_RING3_SS64
            regs[DS] = regs[ES] = layout.FLAT_RING3_SS64
            vcpu.add_flat_pair(layout.FLAT_RING3_CS64, layout.FLAT_RING3_SS64)
            vcpu.kernel_sp = stack
            vcpu.initialised = vcpu.online = True

    # --- travelling ----------------------------------------------------------------------------------

    @contextmanager
    def standing_still(self, domid: int) -> Iterator[StillDomain]:
        """A paused domain of which nothing changes within the context, if its back-ends do not write to it either.

        Raises RecordError where it cannot travel.
        """
        domain = self._domain(domid)
        self._hypervisor.scheduler.store_states(domain)
        with domain.lock:
            record = domain_state(domain)
            if domain.grants.used_by_others:  # who may go on writing
                raise RecordError("another domain has frames of it mapped")
            frames = frame_record(domain)
            yield StillDomain(record, frames, domain.memory.populated(), domain.memory.b.toreadonly())

    def track_writes(self, domid: int) -> WriteTracking:
        """Follow what is written to a domain's memory. Raises NotTracked where the host cannot."""
        return WriteTracking(self._domain(domid).memory)

    def running_frames(self, domid: int, written: npt.NDArray[np.bool_] | None = None) -> tuple[Frames, memoryview]:
        """The MFNs of a domain's frames that can hold anything but zeros, or were written to; and its memory to read.

        It may be running: what is read is worth something only if it was not written to meanwhile.
        """
        domain = self._domain(domid)
        wanted = domain.memory.populated() if written is None else written
        owned = domain.frames.owners[: len(wanted)] == domain.domid
        return np.flatnonzero(owned & wanted).astype(np.uint64), domain.memory.b.toreadonly()

    def freeze(self, domid: int) -> Frozen:
        """What a paused domain is at this moment, to make copies of. Close it when there are to be no more.

        Its back-ends must leave its memory alone meanwhile.  Raises RecordError where it cannot be copied.
        """
        domain = self._domain(domid)
        self._hypervisor.scheduler.store_states(domain)
        with domain.lock:
            record, frames = domain_state(domain), frame_record(domain)
            if domain.grants.used_by_others:
                raise RecordError("another domain has frames of it mapped")
            try:
                image = domain.memory.image(frames.mfns)
            except OSError as error:
                raise RecordError(f"its memory cannot be sealed: {error.strerror}") from error
            except OutOfMemory as error:
                raise RecordError(f"there is no memory for a copy of what is its own: {error}") from error
            types = frame_types(domain, frames.mfns)
            return Frozen(domain.view.max_pages, len(domain.vcpus), record, frames, types, image)

    def copy(self, frozen: Frozen, uuid: bytes, limits: Limits = USUAL) -> int:
        """Make a domain that is a copy of a frozen one and shares its memory until it writes; its domid. It is paused.

        Raises DomainCreateError.
        """
        try:
            memory = view.memory_for(self._hypervisor.memory, frozen.max_pages, frozen.image)
        except OutOfMemory as error:
            raise DomainCreateError(f"not enough machine memory: {error}") from error
        arrival = Arrival(memory, frozen.record, frozen.frames, frozen.types)
        return self.restore_domain(uuid, frozen.vcpus, frozen.max_pages, arrival, limits)

    def private_frames(self, domid: int) -> int:
        """How many frames of a clone, or of what clones were made of, are in nobody else's use."""
        memory = self._domain(domid).memory
        return memory.private_frames() if memory.private else memory.frames

    def reserve(self, domid: int, frames: int) -> bool:
        """Charge a clone, or what clones were made of, for its own frames and so many more; whether it is one.

        Raises DomainCreateError where the machine has no memory for that.
        """
        memory = self._domain(domid).memory
        if not memory.private:
            return False
        try:
            memory.reserve(frames)
        except OutOfMemory as error:
            own = memory.private_frames()
            raise DomainCreateError(f"{own + frames} frames for what a clone may write: {error}") from error
        return True

    def memory_for_arrival(self, max_pages: int) -> MachineMemory:
        """Where the frames of a domain that arrives go, at the MFNs that they had. Raises DomainCreateError."""
        try:
            return view.memory_for(self._hypervisor.memory, max_pages)
        except OutOfMemory as error:
            raise DomainCreateError(f"not enough machine memory: {error}") from error

    def restore_domain(
        self, uuid: bytes, max_vcpus: int, max_pages: int, arrival: Arrival, limits: Limits = USUAL
    ) -> int:
        """Make a domain that has arrived, paused; its domid. See lifecycle.restore_domain."""
        return lifecycle.restore_domain(self._hypervisor, uuid, max_vcpus, max_pages, arrival, limits)

    # --- frames of other domains -----------------------------------------------------------------------

    def map_foreign(self, domid: int, mfn: int) -> memoryview:
        """A writable view of a domain's frame, which stays an ordinary writable frame until `unmap_foreign`.

        Raises ValueError where it is not the domain's or is in use as something else.
        """
        domain = self._domain(domid)
        with domain.lock:
            result = paging.get_page_and_type(domain, mfn, TYPE_WRITABLE)
            if not result:
                domain.foreign_mapped[mfn] += 1
        if result:
            raise ValueError(f"frame {mfn:#x} of domain {domid} cannot be mapped writable (errno {-result})")
        return domain.memory.page(mfn)

    def unmap_foreign(self, domid: int, mfn: int) -> None:
        """Give up what `map_foreign` returned."""
        domain = self._domain(domid)
        with domain.lock:
            domain.foreign_mapped[mfn] -= 1
            paging.put_page_and_type(domain, mfn)

    # --- looking into a domain that stands still -----------------------------------------------------------

    def contexts(self, domid: int) -> Sequence[VcpuContext]:
        """The state of each vCPU of a domain that is paused or has shut down (Xen: XEN_DOMCTL_getvcpucontext)."""
        domain = self._domain(domid)
        self._hypervisor.scheduler.store_states(domain)
        with domain.lock:
            return [inspection.context(vcpu) for vcpu in domain.vcpus if vcpu.initialised]

    def own_memory(self, domid: int) -> OwnMemory:
        """The frames of a domain and their pfns."""
        domain = self._domain(domid)
        with domain.lock:
            return inspection.own_memory(domain)

    def linear_runs(self, domid: int) -> Sequence[LinearRun]:
        """Where the kernel's page table of the domain's first vCPU maps its memory."""
        domain = self._domain(domid)
        with domain.lock:
            return inspection.linear_runs(domain, domain.vcpus[0].kernel_l4)

    def read_frames(self, domid: int, mfn: int, count: int) -> bytes:
        """A copy of consecutive frames. Raises ValueError where one is not the domain's."""
        domain = self._domain(domid)
        with domain.lock:
            if mfn <= 0 or (domain.frames.owners[mfn : mfn + count] != domid).any():
                raise ValueError(f"frames {mfn:#x}..{mfn + count - 1:#x} are not all of domain {domid}")
            return bytes(domain.memory.b[mfn * PAGE_SIZE : (mfn + count) * PAGE_SIZE])


def set_initial_cr3(domain: Domain, vcpu_id: int, kernel_mfn: int, user_mfn: int) -> int:
    """Load the base pointers of a vCPU that has none and is not running."""
    vcpu = domain.vcpus[vcpu_id]
    if vcpu.kernel_l4 or not kernel_mfn:
        return -EINVAL
    domain.work_left = UNLIMITED_WORK
    paging.undo(domain)
    result = paging.get_bases(domain, kernel_mfn, user_mfn)
    if result:
        return result
    paging.set_bases(vcpu, kernel_mfn, user_mfn)
    vcpu.state.l4_mfn, vcpu.state.user = kernel_mfn, False
    return 0


def _info(domain: Domain) -> DomainInfo:
    vcpus = [vcpu for vcpu in domain.vcpus if vcpu.online]
    paused = bool(domain.paused_by_control)
    blocked = all(vcpu.blocked for vcpu in vcpus)
    return DomainInfo(
        domid=domain.domid,
        uuid=domain.uuid,
        running=not blocked and not paused and not domain.shut_down and not domain.dying,
        blocked=blocked and not domain.shut_down,
        paused=paused,
        shutdown=domain.shut_down,
        shutdown_reason=domain.shutdown_reason,
        dying=domain.dying,
        crash_report=domain.crash_report,
        total_pages=domain.total_pages,
        max_pages=domain.max_pages,
        ceiling_pages=domain.view.max_pages,
        online_vcpus=len(vcpus),
        max_vcpus=len(domain.vcpus),
        cpu_time=cpu_time(domain),
        traps=counters(domain).total_traps,
        engine=domain.engine.name if domain.engine else "python",
        cpupool=domain.cpupool.name,
    )


__all__ = [
    "USUAL",
    "Arrival",
    "Control",
    "CpuidChange",
    "CpupoolInfo",
    "DomainCreateError",
    "DomainInfo",
    "Limits",
    "MachineInfo",
    "NoSuchDomain",
    "NotTracked",
    "RecordError",
    "StillDomain",
    "VcpuInfo",
]
