"""The engine protocol: all that ring 0 asks of the thing that executes guest code.

An `Engine` belongs to one domain.  It has one or more `Cpu`s, the execution contexts: Unicorn gives all vCPUs
of a domain the same Cpu (its LOCK prefix is not atomic between engines), KVM one Cpu each.  A vCPU's
state lives in a `CpuState`, which the hypervisor owns; `Cpu.load` puts it on an execution context, `Cpu.store` takes
it back complete, so that it can be saved, sent away or loaded into another engine (design decision 3).

A guest, its kernel too, must never get more than CPL-3 rights over memory and instructions.  The engine
may *run* the guest kernel as it likes (Unicorn: CPL 1, which gives it a TLB of its own) as long as every
privileged instruction still traps.

Traps.  While a Cpu runs, every trap calls `on_trap(vector, error_code, address)` on the running thread.
`vector` is an exception vector (0..31) or one of the TRAP_* values below.  In the callback the general
registers, RIP and segment bases are current in `Cpu.regs` and may be changed there; RFLAGS only through
`get_rflags`/`set_rflags`.  RIP is as the processor leaves it: after the instruction for `syscall`, #BP, #OF; at it
for faults.  `int n` without a hardware gate is #GP with error code n << 3 | 2, RIP at it.  `on_trap` returns
True to go on in the guest, False to leave `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from xenolith.abi.x86 import (
    EFLAGS_DEFINED,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_RESERVED_ONE,
    EFLAGS_VM,
    REGISTER_WORDS,
    XSAVE_EXTENDED,
)

TRAP_SYSCALL: Final = 32
TRAP_SYSENTER: Final = 33
TRAP_NOTHING: Final = 35  # no trap at all: an engine that stopped the vCPU asks for events to be looked for
TRAP_CPUID: Final = 34  # engines that can intercept CPUID; RIP after it; answer by writing RAX RBX RCX RDX

# Of RFLAGS, what guest code may have set and what it always has.
ENTRY_FLAGS: Final = EFLAGS_DEFINED & ~(EFLAGS_IOPL | EFLAGS_VM)
ALWAYS_SET: Final = EFLAGS_IF | EFLAGS_RESERVED_ONE

TrapHandler = Callable[[int, int, int], bool]


class EngineError(Exception):
    """The engine cannot run here, or failed; the text tells a person what and why."""


def register_file() -> memoryview:
    """A fresh register file: REGISTER_WORDS 64-bit words, see abi.x86."""
    return memoryview(bytearray(REGISTER_WORDS * 8)).cast("Q")


@dataclass(slots=True)
class CpuState:
    """A vCPU's processor state while it is on no Cpu.

    `regs` follows abi.x86 (selectors and bases included; attributes are not portable).  `l4_mfn` is the page
    table it runs on, `user` whether in guest-user mode.  `xsave` is an XSAVE image in the standard
    (uncompacted) format; its header tells which components it holds.  `gdt_va`/`ldt_va` are linear addresses
    in Xen's own part of the address space.
    """

    regs: memoryview = field(default_factory=register_file)
    l4_mfn: int = 0
    user: bool = False
    task_switched: bool = False  # CR0.TS: the next FPU instruction raises #NM
    debug: list[int] = field(default_factory=lambda: [0] * 8)  # DR0..DR7
    xsave: bytearray = field(default_factory=lambda: bytearray(XSAVE_EXTENDED))
    xcr0: int = 3
    gdt_va: int = 0
    gdt_limit: int = 0xFFFF
    ldt_va: int = 0
    ldt_limit: int = 0  # 0: no LDT


class ModeSwitchState(Protocol):
    """What a Cpu must know of a vCPU, and changes, to switch its modes by itself: see hypervisor.domain.Vcpu."""

    kernel_mode: bool
    kernel_l4: int
    user_l4: int
    kernel_sp: int
    kernel_ss: int
    other_gs_base: int
    syscall_callback: int
    event_callback: int
    shared_info: int
    syscall_masks_events: bool
    nmi_masked: bool
    architectural_iopl: bool
    compatibility: bool
    info: int
    vcpu_id: int
    timer_look: int  # until then (ns since boot) it may keep a singleshot timer of that time to itself; 0: none
    flat_selectors: set[tuple[int, int]]
    native_handler: int  # see native_state.ModeFields; 0: none
    native_budget: int
    new_space: bool

    @property
    def timer_port(self) -> int:
        """Event channel of VIRQ_TIMER, 0: not bound."""

    @property
    def address(self) -> int:
        """Of its native_state.ModeFields."""

    @property
    def syscalls(self) -> int:
        """System calls of its programs, so far."""

    def count_syscalls(self, count: int) -> None:
        """So many more were carried out without a trap."""

    def count_ticks(self, count: int, length: int) -> None:
        """So many events of its singleshot timer, `length` ns apart, were delivered without a trap."""

    def set_timer_late(self, deadline: int) -> None:
        """The guest has set its singleshot timer some time ago. The Cpu makes a TRAP_NOTHING next, or `run` returns."""

    def until(self, moment: int) -> int:
        """ns from now until then."""


class Cpu(Protocol):
    """An execution context.  All but `kick` is called by the thread that runs it."""

    regs: memoryview  # the register file of the loaded vCPU, live
    get_rflags: Callable[[], int]
    set_rflags: Callable[[int], None]
    tsc_offset: int = 0  # by how much the guest's time stamp counter is ahead of the host's
    calls: int = 0  # address of its native_state.EngineCalls; 0: native code cannot work on it

    def load(self, state: CpuState) -> None:
        """Make this state the one that runs."""

    def store(self, state: CpuState) -> None:
        """Write the loaded state back, complete, and what `swap` kept of others. It stays loaded."""

    def swap(self, old: CpuState, new: CpuState) -> None:
        """Take `old`, which is loaded, off, and put `new` on.

        A Cpu may do it more quickly by keeping parts of `old` until `store(old)` asks for them; `regs`, `l4_mfn`,
        `user`, `task_switched`, `debug` and the tables are always written back.
        """
        self.store(old)
        self.load(new)

    def attach(self, modes: ModeSwitchState) -> None:
        """This vCPU is the one loaded: a Cpu may switch its modes without a trap, in place of the hypervisor."""

    def run(self, on_trap: TrapHandler) -> None:
        """Execute until `on_trap` returns False or the Cpu is kicked."""

    def kick(self) -> None:
        """Make `run` return soon. From any thread, at any time; one that comes before `run` makes it return at once."""

    def switch_mode(self, l4_mfn: int, user: bool) -> None:
        """Go on in guest-kernel or guest-user mode on this page table, of which nothing changed since it was last used.

        Cached translations of the same mode and table may be kept: the hypervisor says when to flush.
        """

    def flush_tlb(self) -> None:
        """Forget every cached translation, of both modes."""

    def flush_page(self, va: int) -> None:
        """Forget cached translations of the page at linear address `va`."""

    def set_segment(self, segment: int, selector: int) -> None:
        """Load ES, DS, FS or GS (abi.x86 index) as the instruction would: descriptor from the GDT or LDT.

        Raises ValueError where the instruction would fault; the register is then null.
        """

    def set_code_stack(self, cs: int, ss: int) -> None:
        """Load CS and SS for the code to be run next: 64-bit flat, or as their descriptors say (compatibility mode).

        While the loaded CS and SS are 64-bit flat ones, the hypervisor may change their selectors directly in
        `regs` to others which it knows to be 64-bit flat.  Raises ValueError where a return to these selectors
        at CPL 3 would fault; nothing is changed then.
        """

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS."""

    def set_debug(self, number: int, value: int) -> None:
        """Load DR0-3, 6 or 7 with a value the hypervisor has checked."""

    def set_ldt(self, va: int, limit: int) -> None:
        """The LDT's linear address and limit (0: none)."""

    def set_xcr0(self, value: int) -> None:
        """Load XCR0 with a value that the hypervisor has checked against `Engine.xcr0_mask`."""

    def code_written(self, mfn: int) -> None:
        """Ring 0 wrote to this frame: code translated from it is stale."""

    def executable_mapped(self, mfn: int) -> None:
        """An executable mapping of this frame was made, or a writable one withdrawn: its code may have changed."""


class Engine(Protocol):
    """A domain's engine."""

    name: str
    cpus_shared: bool  # True: all vCPUs run on one Cpu, one at a time
    xcr0_mask: int  # XSAVE components that guest code can really use
    l4_entries: dict[int, int]  # L4 slot -> entry: what the engine needs mapped in every address space
    kernel_l4_entries: dict[int, int] | None = None  # the same in those that a vCPU uses in guest-kernel mode
    caches_tables: bool = False  # it caches page tables, not only translations: see `entry_changed`
    executable_mapped: Callable[[int], None] | None = None  # Cpu.executable_mapped for all Cpus; None: not of interest
    code_frames: int = 0
    """Host address of a byte for each frame: not 0 where code was translated from it. 0: nowhere."""
    entry_changed: Callable[[int, int, int], None] | None = None
    """Ring 0 changed a page-table entry that was present: index in 64-bit words of machine memory, old and new value.

    Entry 0 of a table stands for the whole table, to be reported when a frame stops being one.  None: not of interest.
    """

    def cpu(self, vcpu_id: int) -> Cpu:
        """The Cpu on which this vCPU runs; made when first asked for."""

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """What CPUID would tell ring-3 code on this engine, before any policy: eax, ebx, ecx, edx."""

    def close(self) -> None:
        """Release everything. No Cpu may be running."""
