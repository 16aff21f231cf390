"""Domains and vCPUs: the state that ring 0 keeps for each guest (Xen: struct domain, struct vcpu).

Only state and its invariants live here; each mechanism's behaviour is in the module of its name.

Locking.  `Domain.lock` protects all of a domain's state and every frame it owns; a vCPU's traps are handled
holding it.  Two domains' locks are taken in ascending order of domid.  Whoever holds no lock, or must not
wait, may only call `events.post` and `scheduler.kick`, which take none.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.hypercalls import RUNSTATE_offline
from xenolith.abi.x86 import R8, R10, RAX, RDI, RDX, RIP, RSI
from xenolith.hypervisor.console_io import EmergencyConsole
from xenolith.hypervisor.frames import TYPE_L4, TYPE_SEGDESC, TYPE_WRITABLE
from xenolith.hypervisor.runstate import running_time
from xenolith.hypervisor.time import Timer, VcpuTimers
from xenolith.machine.engines.protocol import Cpu, CpuState, Engine, register_file

# Indices into Domain.trap_counts beyond the exception vectors and TRAP_* values; more in traps.py.
COUNT_SYSCALL_BOUNCE: Final = 40
COUNT_SYSCALL_UNTRAPPED: Final = 44

if TYPE_CHECKING:
    from xenolith.hypervisor.events import EventChannels
    from xenolith.hypervisor.grants import GrantTable
    from xenolith.hypervisor.hypervisor import Hypervisor
    from xenolith.hypervisor.scheduler import Context

MAX_VCPUS: Final = 32


class Vcpu:
    """A virtual CPU."""

    def __init__(self, domain: Domain, vcpu_id: int) -> None:
        self.domain = domain
        self.vcpu_id: int = vcpu_id
        self.state = CpuState()
        self.cpu: Cpu | None = None  # the execution context it is loaded on
        self.regs: memoryview = self.state.regs  # cpu.regs while loaded, state.regs otherwise
        self.thread = 0  # identity of the thread that runs its Cpu
        self.in_guest = False  # set under the domain's lock; executing guest code, or about to
        self.flush_requested = False  # flush the TLB before executing guest code again

        # Address space and mode (Xen: arch.guest_table, guest_table_user, TF_kernel_mode).
        self.kernel_mode = True
        self.kernel_l4 = 0  # MFN; 0: none
        self.user_l4 = 0  # MFN; 0: none
        self.other_gs_base: int = 0  # of the mode it is not in: swapped on every mode switch
        self.compatibility = False  # runs on CS/SS that are not 64-bit flat
        self.flat_selectors: set[tuple[int, int]] = set()  # (CS, SS) pairs known to be 64-bit flat

        # Traps (Xen: arch.pv).
        self.kernel_sp = 0
        self.kernel_ss = 0
        self.trap_address = [0] * 256  # 0: no handler
        self.trap_selector = [0] * 256
        self.trap_flags = bytearray(256)
        self.event_callback = 0
        self.failsafe_callback = 0
        self.syscall_callback = 0
        self.syscall32_callback = 0
        self.sysenter_callback = 0
        self.failsafe_masks_events = False
        self.syscall_masks_events = False
        self.syscall32_masks_events = False
        self.sysenter_masks_events = False
        self.nmi_pending = False
        self.nmi_masked = False
        self.iopl = 0
        self.task_switched = False  # what the guest set as CR0.TS
        self.debug = [0] * 8
        self.cpuid_answers: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # (leaf, subleaf) -> registers
        self.cr4 = 0  # what the guest wrote, of the bits it may have
        self.gdt_frames: list[int] = []  # MFNs, each held as segment descriptor page
        self.gdt_entries = 0
        self.ldt_va = 0  # guest linear address, 0: none
        self.ldt_entries = 0
        self.ldt_frames: dict[int, int] = {}  # page of the LDT -> MFN held as segment descriptor page
        self.base_changed = False  # set by operations that load a base pointer: flush before going on
        self.restarted = False  # the hypercall at hand will be made again by the guest
        self.in_multicall = False
        self.restart_arguments: tuple[int, ...] = ()  # of the multicall's entry at hand

        # Shared with the guest: machine addresses in bytes, 0: none.
        self.info = 0  # its vcpu_info
        self.info_mfn = 0  # held frame after VCPUOP_register_vcpu_info
        self.time_area_va = 0
        self.runstate_area_va = 0

        # Scheduling and time (hypervisor/scheduler.py, hypervisor/time.py).
        self.online = False  # VCPUOP_up was called
        self.initialised = False
        self.blocked = False
        self.poll_port = 0  # in SCHEDOP_poll: the port it waits for, -1: any
        self.pause_count = 0
        self.may_run = False  # False makes it leave the engine at the next trap boundary
        self.runstate = RUNSTATE_offline
        self.runstate_since = 0  # ns since boot
        self.runstate_times = [0, 0, 0, 0]  # ns in each RUNSTATE_*
        self.context: Context | None = None  # the scheduler's, once the domain was started
        self.kicked = False  # somebody wants it to leave the guest: long hypercalls restart (Xen: preempt check)
        self.share = 0  # weighted ns of CPU time, see scheduler.py
        self.timers = VcpuTimers(self)
        self.set_timer_late = self.timers.set_singleshot_late
        self.timer_look = 0  # see GuestModes
        self.time_version = 0
        self.time_outdated = True  # vcpu_time_info is to be written before it runs
        self.virq_port = [0] * 24

    @property
    def syscalls(self) -> int:
        """System calls of its domain's programs so far."""
        return self.domain.trap_counts[COUNT_SYSCALL_BOUNCE] + self.domain.trap_counts[COUNT_SYSCALL_UNTRAPPED]

    def until(self, moment: int) -> int:
        """ns from now until a moment of the hypervisor's clock."""
        return moment - self.domain.hypervisor.clock.now()

    def count_syscalls(self, count: int) -> None:
        """So many more were carried out without a trap."""
        self.domain.trap_counts[COUNT_SYSCALL_UNTRAPPED] += count

    def restart_hypercall(self, number: int, *arguments: int) -> int:
        """Let the guest make this hypercall again with these arguments, so that nothing else has to wait for it.

        The SYSCALL instruction is two bytes long.  The result is meaningless (Xen: hypercall_create_continuation).
        """
        self.restarted = True
        if self.in_multicall:
            self.restart_arguments = arguments
            return 0
        regs = self.regs
        regs[RAX] = number
        for register, argument in zip((RDI, RSI, RDX, R10, R8), arguments, strict=False):
            regs[register] = argument & 0xFFFF_FFFF_FFFF_FFFF
        regs[RIP] -= 2
        return 0

    def set_xcr0(self, value: int) -> bool:
        """Set XCR0 to a value that the engine can execute."""
        self.state.xcr0 = value
        self.cpuid_answers.clear()
        if self.cpu is not None:
            self.cpu.set_xcr0(value)
        return True

    def __repr__(self) -> str:
        return f"d{self.domain.domid}v{self.vcpu_id}"


class Domain:
    """A domain."""

    def __init__(self, hypervisor: Hypervisor, domid: int, engine: Engine | None, max_vcpus: int) -> None:
        self.hypervisor = hypervisor
        self.memory = hypervisor.memory
        self.frames = hypervisor.frames
        self.domid = domid
        self.engine = engine  # None: dom0, whose code is Python
        self.lock = threading.RLock()
        self.privileged = domid == 0
        self.uuid = bytes(16)
        self.vcpus = [Vcpu(self, vcpu_id) for vcpu_id in range(max_vcpus)]

        # Memory. Every frame it owns is in the frame table with its domid; these are the totals.
        self.max_pages = 0
        self.total_pages = 0
        self.shared_info_mfn = 0
        self.shared_info = 0  # machine address in bytes
        self.xen_l4_entries: list[int] = [0] * (layout.XEN_LAST_SLOT - layout.XEN_FIRST_SLOT + 1)
        # What the engine wants mapped in tables of guest-user and of guest-kernel mode, where that differs.
        self.engine_views: tuple[dict[int, int], dict[int, int]] = {}, {}
        self.xen_frames: list[int] = []  # MFNs of Xen's frames that serve this domain alone
        self.window_l1: list[int] = []  # MFNs of the L1 tables that map the descriptor window
        self.flush_epoch = 1  # complete TLB flushes so far, see frames.py
        self.linear: dict[int, int] = {}  # page tables with (positive) or under (negative) linear entries
        self.ldt_in_use = False
        self.foreign_mapped: Counter[int] = Counter()  # MFNs that dom0 has mapped, each time it did
        self.memory_map: list[tuple[int, int, int]] = []  # e820: (address, size, type)
        self.vm_assist = 0

        # What the engine wants to be told of (None: nothing).
        self.caches_tables = False  # it caches page tables, not only translations
        self.executable_mapped: Callable[[int], None] | None = None  # see Cpu.executable_mapped
        # A present page-table entry changed: word index, old and new value. Entry 0: its whole table is no more.
        self.entry_changed: Callable[[int, int, int], None] | None = None

        # Events posted by other threads, applied at the next trap boundary of the domain's own (events.post).
        self.posted: deque[int] = deque()
        self.events: EventChannels
        self.grants: GrantTable

        # Life cycle.
        self.paused_by_control = 0
        self.shutdown_reason: int | None = None
        self.dying = False
        self.shutdown_announced = False  # dom0 was told
        self.shutdown_code: int | None = None  # set beforehand by SCHEDOP_shutdown_code
        self.crash_report = ""
        self.watchdogs: list[Timer | None] = [None, None]
        self.emergency_console = EmergencyConsole()
        self.weight = 256  # share of the CPU relative to other domains

        # Accounting: traps by kind, see traps.py.
        self.trap_counts = [0] * 64
        self.hypercall_counts = [0] * 64

    def references(self) -> Iterator[tuple[int, int | None]]:
        """Every reference to a frame that the domain's own state holds, beyond its page tables and pins.

        (MFN, the type it needs or None); for the invariant checker.
        """
        for vcpu in self.vcpus:
            for table in (vcpu.kernel_l4, vcpu.user_l4):
                if table:
                    yield table, TYPE_L4
            for mfn in (*vcpu.gdt_frames, *vcpu.ldt_frames.values()):
                yield mfn, TYPE_SEGDESC
            if vcpu.info_mfn:
                yield vcpu.info_mfn, TYPE_WRITABLE
        for mfn in (*self.foreign_mapped.elements(), *self.shared_frames()):
            yield mfn, TYPE_WRITABLE
        if self.shared_info_mfn:
            yield self.shared_info_mfn, TYPE_WRITABLE
        yield from self.grants.references()

    def shared_frames(self) -> list[int]:
        """Frames of Xen's that are shared with the domain, besides shared_info: its grant table."""
        return self.grants.frames

    def granted_frames(self) -> frozenset[int]:
        """Frames of other domains that it has mapped by grant."""
        return self.grants.granted_frames()

    @property
    def cpu_time(self) -> int:
        """ns for which its vCPUs have run."""
        now = self.hypervisor.clock.now()
        return sum(running_time(vcpu, now) for vcpu in self.vcpus)

    @property
    def shut_down(self) -> bool:
        return self.shutdown_reason is not None

    def __repr__(self) -> str:
        return f"d{self.domid}"


__all__ = ["MAX_VCPUS", "Domain", "Vcpu", "register_file"]
