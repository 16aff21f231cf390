"""Domains and vCPUs: the state that ring 0 keeps for each guest (Xen: struct domain, struct vcpu).

Only state and its invariants live here; each mechanism's behaviour is in the module of its name.

Locking.  `Domain.lock` protects all of a domain's state and every frame it owns; a vCPU's traps are handled
holding it.  Two domains' locks are taken in ascending order of domid.  Whoever holds no lock, or must not
wait, may only call `events.post` and `scheduler.kick`, which take none.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_uint8, c_uint32, c_uint64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from xenolith.abi import layout
from xenolith.abi.event_fifo import EVENT_ARRAY_PAGES, EVTCHN_FIFO_MAX_QUEUES
from xenolith.abi.hypercalls import VIRQ_TIMER, RUNSTATE_offline
from xenolith.abi.x86 import MASK64, R8, R10, RAX, RDI, RDX, RIP, RSI, advanced
from xenolith.hypervisor.frames import TYPE_L4, TYPE_SEGDESC, TYPE_WRITABLE
from xenolith.machine.engines.native_state import FLAT_PAIRS, UNLIMITED, ModeFields
from xenolith.machine.engines.protocol import Cpu, CpuState, Engine, register_file
from xenolith.machine.native import Fields

if TYPE_CHECKING:
    from xenolith.hypervisor.events import EventChannels
    from xenolith.hypervisor.grants import GrantTable
    from xenolith.hypervisor.hypervisor import Hypervisor
    from xenolith.hypervisor.sched.context import Context
    from xenolith.hypervisor.sched.cpupool import Cpupool
    from xenolith.hypervisor.sched.policy import Unit
    from xenolith.hypervisor.time import Timer, VcpuTimers
    from xenolith.hypervisor.view import View

MAX_VCPUS: Final = 32
MOST_UNDONE: Final = 32
COUNTERS: Final = 64
CPUID_ANSWERS: Final = 128  # kept for each vCPU; a guest may ask for any number of leaves
# What a guest may ask for in one trap: some milliseconds, for which whoever wants its lock or its vCPU waits.
WORK: Final = 2048
UNLIMITED_WORK: Final = 1 << 62  # for what dom0 does
LOG_BYTES: Final = 64 << 10  # kept of each domain's emergency console

# Indices into Domain.trap_counts beyond the exception vectors and TRAP_* values.
COUNT_SYSCALL_BOUNCE: Final = 40
COUNT_UPCALL: Final = 41
COUNT_PAGE_TABLE_WRITE: Final = 42
COUNT_PRIVILEGED: Final = 43
COUNT_SYSCALL_UNTRAPPED: Final = 44


Hypercall = tuple[Callable[..., Any], int]  # and how many arguments it takes besides the vCPU


class VcpuFields(ModeFields):
    """What of a vCPU native code shares (design decision 4); ModeFields has what engines see, too."""

    flush_requested: bool  # flush the TLB before executing guest code again
    in_guest: bool  # executing guest code, or about to: set under the domain's lock only
    nmi_pending: bool
    iopl: int  # I/O privilege level, as the guest set it
    ldt_entries: int
    cpuid_count: int  # entries of `cpuid_table`: leaf, subleaf, EAX, EBX, ECX, EDX
    # Native code has done the first part of a batch, and left the rest in the registers: `batch` has what was in the
    # first two.  If a multicall's entry was begun, `call` has its number and arguments as they are now.  If the batch
    # is to say how many requests it has done, `batch_done` are.
    begun: bool
    batch_begun: bool
    batch_done: int
    call_begun: bool
    control_block: int  # machine address in bytes, 0: none; this and the next of the FIFO event ABI
    queue_tails: ctypes.Array[c_uint32]  # the last port in each queue, 0: none

    _fields_: ClassVar[Fields] = (
        ("domain_address", c_uint64),
        ("calls", c_uint64),  # address of the EngineCalls of the Cpu that it is loaded on, 0: its traps are Python's
        ("trap_address", c_uint64 * 256),
        ("trap_flags", c_uint8 * 256),
        ("iopl", c_uint32),
        ("ldt_entries", c_uint32),
        ("cpuid_count", c_uint32),
        ("cpuid_table", c_uint32 * 6 * CPUID_ANSWERS),
        ("batch", c_uint64 * 2),
        ("batch_done", c_uint32),
        ("work_left", c_uint32),  # of native code, in the trap at hand
        ("looked_at", c_uint32),  # frames that became executable, by native code
        ("call", c_uint64 * 7),
        ("control_block", c_uint64),
        ("queue_tails", c_uint32 * EVTCHN_FIFO_MAX_QUEUES),
        ("flush_requested", c_bool),
        ("in_guest", c_bool),
        ("nmi_pending", c_bool),
        ("begun", c_bool),
        ("batch_begun", c_bool),
        ("call_begun", c_bool),
    )


class Vcpu(VcpuFields):
    """A virtual CPU."""

    __hash__ = object.__hash__

    def __init__(self, domain: Domain, vcpu_id: int) -> None:
        self.domain = domain
        self.domain_address = ctypes.addressof(domain)
        self.vcpu_id = vcpu_id
        self.address = ctypes.addressof(self)
        self.native_budget = UNLIMITED
        self.state = CpuState()
        self.cpu: Cpu | None = None  # the execution context it is loaded on
        self.regs: memoryview = self.state.regs  # cpu.regs while loaded, state.regs otherwise
        self.thread = 0  # identity of the thread that runs its Cpu

        # Address space and mode (Xen: arch.guest_table, guest_table_user, TF_kernel_mode) are in ModeFields.
        self.kernel_mode = True
        self.flat_selectors: set[tuple[int, int]] = set()  # (CS, SS) pairs known to be 64-bit flat

        # Traps (Xen: arch.pv). What is not here is in VcpuFields.
        self.trap_selector = [0] * 256
        self.failsafe_callback = 0
        self.syscall32_callback = 0
        self.sysenter_callback = 0
        self.failsafe_masks_events = False
        self.syscall32_masks_events = False
        self.sysenter_masks_events = False
        self.task_switched = False  # what the guest set as CR0.TS
        self.debug = [0] * 8
        self.cpuid_answers: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # (leaf, subleaf) -> registers
        self.cr4 = 0  # what the guest wrote, of the bits it may have
        self.gdt_frames: list[int] = []  # MFNs, each held as segment descriptor page
        self.gdt_entries = 0
        self.ldt_va = 0  # guest linear address, 0: none
        self.ldt_frames: dict[int, int] = {}  # page of the LDT -> MFN held as segment descriptor page
        self.base_changed = False  # set by operations that load a base pointer: flush before going on
        self.restarted = False  # the hypercall at hand will be made again by the guest
        self.in_multicall = False
        self.restart_arguments: tuple[int, ...] = ()  # of the multicall's entry at hand

        # Shared with the guest; `info` is the machine address of its vcpu_info.
        self.info_mfn = 0  # held frame after VCPUOP_register_vcpu_info
        self.time_area_va = 0
        self.runstate_area_va = 0

        # Scheduling and time (sched, time).
        self.online = False  # VCPUOP_up was called
        self.initialised = False
        self.blocked = False
        self.poll_port = 0  # in SCHEDOP_poll: the port it waits for, -1: any
        self.pause_count = 0
        self.runstate = RUNSTATE_offline
        self.runstate_since = 0  # ns since boot
        self.runstate_times = [0, 0, 0, 0]  # ns in each RUNSTATE_*
        self.context: Context | None = None  # the scheduler's, once the domain was started
        self.kicked = False  # somebody wants it to leave the guest: long hypercalls restart (Xen: preempt check)
        self.unit: Unit  # as the scheduling policy sees it
        self.timers: VcpuTimers
        self.time_version = 0
        self.time_outdated = True  # vcpu_time_info is to be written before it runs

    @property
    def timer_port(self) -> int:
        """Event channel of VIRQ_TIMER, 0: not bound."""
        return int(self.virq_port[VIRQ_TIMER])

    @property
    def syscalls(self) -> int:
        """System calls of its domain's programs so far."""
        return int(self.domain.trap_counts[COUNT_SYSCALL_BOUNCE]) + self.untrapped_syscalls

    def know_cpuid(self, question: tuple[int, int], answer: tuple[int, int, int, int]) -> None:
        """CPUID with this leaf and subleaf gives these registers, until `forget_cpuid`."""
        if self.cpuid_count < CPUID_ANSWERS:
            self.cpuid_answers[question] = answer
            self.cpuid_table[self.cpuid_count][:] = *question, *answer
            self.cpuid_count += 1

    def forget_cpuid(self) -> None:
        """XCR0 has changed, which CPUID tells."""
        self.cpuid_answers.clear()
        self.cpuid_count = 0

    def add_flat_pair(self, cs: int, ss: int) -> None:
        """These selectors are 64-bit flat, until `forget_flat_pairs`."""
        if (cs, ss) not in self.flat_selectors:
            self.flat_selectors.add((cs, ss))
            self.flat_pairs[:] = [cs << 16 | ss, *self.flat_pairs[: FLAT_PAIRS - 1]]

    def forget_flat_pairs(self) -> None:
        """Descriptors changed: no selectors are known to be flat."""
        self.flat_selectors.clear()
        self.flat_pairs[:] = [0] * FLAT_PAIRS

    def until(self, moment: int) -> int:
        """ns from now until a moment of the domain's clock."""
        return moment - self.domain.clock.now()

    def count_syscalls(self, count: int) -> None:
        """So many more were carried out without a trap."""
        self.untrapped_syscalls += count

    def count_ticks(self, count: int, length: int) -> None:
        """So many events of the singleshot timer, `length` ns apart, were delivered without a trap."""
        self.untrapped_ticks += count
        self.timer_deadline += count * length
        if self.timer_look:
            self.timer_look += count * length

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
            regs[register] = argument & MASK64
        regs[RIP] = advanced(regs[RIP], -2)
        return 0

    def set_xcr0(self, value: int) -> bool:
        """Set XCR0 to a value that the engine can execute."""
        self.state.xcr0 = value
        self.forget_cpuid()
        if self.cpu is not None:
            self.cpu.set_xcr0(value)
        return True

    def __repr__(self) -> str:
        return f"d{self.domain.domid}v{self.vcpu_id}"


@dataclass(frozen=True)
class CpuidChange:
    """Of one register (0: EAX ... 3: EDX) of CPUID: bits that are to be 0, 1, and the host's. No bit is in two of them.

    `subleaf` None: the first, or whichever a leaf without subleaves is asked for.
    """

    leaf: int
    subleaf: int | None
    register: int
    zeros: int
    ones: int
    hosts: int


class EmergencyConsole:
    """What a domain wrote with console_io: the last LOG_BYTES bytes, and a hook that sees it all as it comes.

    The hook runs in the midst of a hypercall and must only hand on (compare events.Handler).
    """

    def __init__(self) -> None:
        self._kept = bytearray()
        self.hook: Callable[[bytes], None] | None = None

    def write(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > 2 * LOG_BYTES:
            del self._kept[:-LOG_BYTES]
        if self.hook is not None:
            self.hook(data)

    @property
    def text(self) -> bytes:
        return bytes(self._kept[-LOG_BYTES:])


class DomainLock:
    """The lock of a domain: an RLock, and, against native code that handles a trap, a word which that holds meanwhile.

    Native code never waits: where it finds the word taken it leaves the trap to Python, which does wait, here.

    A guest that traps again and again lets go of the lock for microseconds, in which a thread that waits is not even
    woken.  So who waits says so (`lock_wanted`), and a trap gives way first (Xen's spin locks hand out tickets).
    """

    def __init__(self, domain: Domain) -> None:
        self._python = threading.RLock()
        self._turn = threading.Lock()  # held by the one thread that is next
        self._domain = domain
        self._depth = 0
        self._address = ctypes.addressof(domain) + DomainFields.lock_word.offset
        self._word = c_uint32.from_address(self._address)
        self.take_word: Callable[[int], None] | None = None  # with native code: takes the word at this address

    def acquire(self, blocking: bool = True) -> bool:
        """Take it, or answer False if that would mean to wait and `blocking` is False."""
        if not self._python.acquire(False):
            if not blocking:
                return False
            with self._turn:
                self._domain.lock_wanted = True
                self._python.acquire()
                self._domain.lock_wanted = False
        self._depth += 1
        if self._depth == 1 and self.take_word is not None:
            self.take_word(self._address)
        return True

    def give_way(self) -> None:
        """Let a thread that waits for the lock have it first. Not for one that holds it."""
        with self._turn:
            pass

    def release(self) -> None:
        """Undo one `acquire`."""
        self._depth -= 1
        if not self._depth and self.take_word is not None:
            self._word.value = 0
        self._python.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class DomainFields(ctypes.Structure):
    """What of a domain native code shares."""

    domid: int
    reference_lost: bool  # native code was to drop one that there was not
    lock_wanted: bool  # see DomainLock
    work_limit: int  # WORK, in units of paging's; native code counts requests and tables
    undo_count: int  # page tables in `undo_list`, MFNs that are to drop what their entries hold, see paging
    flush_epoch: int  # complete TLB flushes so far, modulo 2**32, see frames.py
    vm_assist: int
    shared_info: int  # machine address in bytes
    event_pages: ctypes.Array[c_uint64]  # machine address of each page of event words, 0: none, see event_fifo
    ldt_in_use: bool
    caches_tables: bool  # its engine caches page tables, not only translations
    bells: int  # address of EventChannels.bells
    bell_count: int
    dying: bool
    grant_entries: int  # of its grant table, if that is of version 1
    grant_frames: int  # address of the MFNs of the table's frames
    active_grants: int  # address of a grants.Active for each possible entry
    code_frames: int  # see Engine.code_frames
    python_references: bool
    """Frames may be referenced in ways that only Python's `paging` knows: by grant mappings, linear page tables, or
    after their allocation was given up. Never cleared."""

    _fields_: ClassVar[Fields] = (
        ("memory_address", c_uint64),  # where machine memory begins in this process
        ("m2p_address", c_uint64),  # and the machine-to-physical table
        ("owner_address", c_uint64),  # and the arrays of the frame table
        ("type_info_address", c_uint64),
        ("count_info_address", c_uint64),
        ("stamp_address", c_uint64),
        ("machine_frames", c_uint64),
        ("trap_counts", c_uint64 * COUNTERS),  # by vector, TRAP_* or COUNT_*
        ("hypercall_counts", c_uint64 * COUNTERS),
        ("xen_l4_entries", c_uint64 * (layout.XEN_LAST_SLOT - layout.XEN_FIRST_SLOT + 1)),
        ("view_slot", c_uint64),  # of L4 tables, which the engine wants to differ between the modes; 0: none
        ("view_entries", c_uint64 * 2),  # in tables of guest-user and of guest-kernel mode
        ("vm_assist", c_uint64),
        ("shared_info", c_uint64),
        ("bells", c_uint64),
        ("bell_count", c_uint64),
        ("event_pages", c_uint64 * EVENT_ARRAY_PAGES),
        ("queues_address", c_uint64),  # where `port_queues` lies
        ("grant_entries", c_uint64),
        ("grant_frames", c_uint64),
        ("active_grants", c_uint64),
        ("code_frames", c_uint64),
        ("flush_epoch", c_uint32),
        ("domid", c_uint32),
        ("vcpu_count", c_uint32),
        ("contexts", c_uint32),  # threads that run its vCPUs
        ("lock_word", c_uint32),  # see DomainLock
        ("lock_wanted", c_bool),
        ("vcpu_addresses", c_uint64 * MAX_VCPUS),  # of each vCPU's VcpuFields
        ("undo_list", c_uint64 * MOST_UNDONE),
        ("undo_count", c_uint32),
        ("work_limit", c_uint32),
        ("reference_lost", c_bool),
        ("dying", c_bool),
        ("ldt_in_use", c_bool),
        ("caches_tables", c_bool),
        ("python_references", c_bool),
    )


class Domain(DomainFields):
    """A domain."""

    __hash__ = object.__hash__

    def __init__(self, hypervisor: Hypervisor, domid: int, engine: Engine | None, max_vcpus: int, view: View) -> None:
        self.hypervisor = hypervisor
        self.view = view
        self.memory = view.memory
        self.frames = frames = view.frames
        self.domid = domid
        self.engine = engine  # None: dom0, whose code is Python
        self.memory_address, self.machine_frames = self.memory.address, frames.frames
        self.m2p_address = view.m2p_words.ctypes.data
        self.owner_address, self.stamp_address = frames.owners.ctypes.data, frames.stamps.ctypes.data
        self.type_info_address, self.count_info_address = frames.type_infos.ctypes.data, frames.count_infos.ctypes.data
        self.lock = DomainLock(self)
        self.clock = hypervisor.clock  # its own time since boot, `clock_ahead` ns ahead of the machine's
        self.clock_ahead = 0
        self.time_offset = 0  # s, of its wall clock from UTC (Xen: time_offset_seconds)
        self.privileged = domid == 0
        self.uuid = bytes(16)
        self.vcpu_count = max_vcpus
        self.vcpus = [Vcpu(self, vcpu_id) for vcpu_id in range(max_vcpus)]
        self.vcpu_addresses[:max_vcpus] = [vcpu.address for vcpu in self.vcpus]

        # Memory. Every frame it owns is in the frame table with its domid; these are the totals.
        self.max_pages = 0
        self.total_pages = 0
        self.shared_info_mfn = 0
        # What the engine wants mapped in tables of guest-user and of guest-kernel mode, where that differs.
        self.engine_views: tuple[dict[int, int], dict[int, int]] = {}, {}
        self.window_l1: list[int] = []  # MFNs of the L1 tables that map the descriptor window
        self.flush_epoch = 1
        self.work_limit = WORK
        self.work_left = UNLIMITED_WORK  # of it, in the trap at hand
        self.linear: dict[int, int] = {}  # page tables with (positive) or under (negative) linear entries
        self.foreign_mapped: Counter[int] = Counter()  # MFNs that dom0 has mapped, each time it did
        self.memory_map: list[tuple[int, int, int]] = []  # e820: (address, size, type)

        # What the engine wants to be told of (None: nothing).
        self.executable_mapped: Callable[[int], None] | None = None  # see Cpu.executable_mapped
        # A present page-table entry changed: word index, old and new value. Entry 0: its whole table is no more.
        self.entry_changed: Callable[[int, int, int], None] | None = None

        # What it is told of the processor, if not what all domains are
        self.cpuid_changes: tuple[CpuidChange, ...] = ()

        # Its part of the mechanisms, which lifecycle puts in place.
        self.hypercalls: list[Hypercall] = []  # by number
        self.events: EventChannels
        self.port_queues: memoryview  # bytes, of its ports in the FIFO event ABI, see event_fifo
        self.grants: GrantTable
        # Events posted by other threads, applied at the next trap boundary of the domain's own (events.post).
        self.posted: deque[int] = deque()
        self.code_written: set[int] = set()  # frames that others have written to; see events.post_code_written

        # Life cycle.
        self.paused_by_control = 0
        self.shutdown_reason: int | None = None
        self.shutdown_announced = False  # dom0 was told
        self.shutdown_code: int | None = None  # set beforehand by SCHEDOP_shutdown_code
        self.crash_report = ""
        self.watchdogs: list[Timer | None] = [None, None]
        self.emergency_console = EmergencyConsole()
        self.cpupool: Cpupool  # set by the scheduler, like the units of its vCPUs

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
        yield from self.events.references()
        yield from self.grants.references()

    def shared_frames(self) -> list[int]:
        """Frames of Xen's that are shared with the domain, besides shared_info: its grant table."""
        return self.grants.frames + self.grants.status_frames

    def granted_frames(self) -> frozenset[int]:
        """Frames of other domains that it has mapped by grant."""
        return self.grants.granted_frames()

    @property
    def fifo(self) -> bool:
        """Whether it uses the FIFO event ABI."""
        return self.vcpus[0].fifo

    @property
    def shut_down(self) -> bool:
        return self.shutdown_reason is not None

    def __repr__(self) -> str:
        return f"d{self.domid}"


def runnable(vcpu: Vcpu) -> bool:
    """Whether the vCPU could execute guest code now."""
    domain = vcpu.domain
    return (
        vcpu.online
        and not vcpu.blocked
        and not vcpu.pause_count
        and not domain.paused_by_control
        and domain.shutdown_reason is None
        and not domain.dying
    )


__all__ = ["MAX_VCPUS", "Domain", "Vcpu", "register_file"]
