"""The adaptive engine: a vCPU that moves between KVM and Unicorn while it runs.

The two engines are good at different things.  On KVM guest code computes at native speed, but on a host without VMX or
SVM a trap costs tens of microseconds before Python sees it.  On Unicorn code is several times slower and a trap
nearly free.  So a vCPU that mostly traps (a kernel that builds its page tables) is better off on Unicorn, and one that
computes on KVM.  A vCPU's state belongs to no engine (design decision 3), so it is stored from one and loaded into
the other at a trap boundary.

What has to stay exact:

- Registers.  Both engines work on one register file in place.
- x87 and SSE state goes along.  The upper parts of vector registers stay behind in KVM, as Unicorn has none: code
  with a VEX or EVEX prefix raises #UD there, which moves the vCPU back to KVM, where the same instruction is executed.
  Legacy SSE code leaves the upper parts alone.  XSAVE and XRSTOR, which a kernel executes at every switch of tasks, are
  carried out in Python on all components (extended.py).
  A program that asks CPUID on Unicorn is told of no AVX, so when an address space is made, and a program may be about
  to start, the vCPU goes there; and by its own choice it does not leave KVM while upper parts are in use.
- Any other instruction that Unicorn does not know likewise moves the vCPU to KVM: guests find in CPUID what KVM has.
- Translations.  Unicorn keeps code that it translated, and KVM changes memory behind its back: executable frames are
  compared by checksum at each move.  TLBs are flushed.
- States that KVM gets wrong on some hosts (CR0.TS, breakpoints, 32-bit code, selectors other than null) run on Unicorn.
  So does, once that is known, a kernel that loads CS by itself, and may read it, which on KVM is always the same, or
  that reads the machine-to-physical table at the ABI's fixed address, which KVM may keep to itself: small kernels.
- Atomicity.  Unicorn's LOCK prefix does not hold against another processor, so a domain with several vCPUs stays on
  KVM.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Final

from xenolith.abi.layout import MACH2PHYS_VIRT_END, MACH2PHYS_VIRT_START
from xenolith.abi.x86 import (
    CR4_OSXSAVE,
    EFLAGS_TF,
    PAGE_SHIFT,
    PTE_P,
    PTE_US,
    VECTOR_DB,
    VECTOR_NM,
    VECTOR_PF,
    VECTOR_UD,
    XSAVE_EXTENDED,
)
from xenolith.machine import page_walk
from xenolith.machine.engines.adaptive import extended
from xenolith.machine.engines.adaptive.borrowed import Borrowed, bits, uses_extended_state
from xenolith.machine.engines.adaptive.needs import Needs
from xenolith.machine.engines.adaptive.placement import LEAST_PATIENCE, Placement
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.engine import KvmEngine
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.native_state import UNLIMITED, EngineCalls
from xenolith.machine.engines.protocol import (
    TRAP_CPUID,
    Cpu,
    CpuState,
    Engine,
    EngineError,
    ModeSwitchState,
    TrapHandler,
)
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.engines.unicorn.engine import UnicornEngine
from xenolith.machine.memory import MachineMemory

_CR3: Final = layout.CR // 8 + 3
_CR4: Final = layout.CR // 8 + 4
_UD2: Final = b"\x0f\x0b"

POLICY_KVM: Final = "kvm"  # on KVM, but for a kernel that boots
POLICY_MEASURED: Final = "measured"  # where the last traps say that it is faster
POLICY_ON_REQUEST: Final = "on request"  # where it is, until `request_move`

BOOT_PATIENCE: Final = 8_000_000  # ns of regret: a few hundred traps on end
AFTER_NEED: Final = 32  # traps for which a vCPU stays on Unicorn after a state that needed it

WINDOW: Final = 32  # traps after which the policy is asked again ...
NATIVE_WINDOW: Final = 256  # ... or so many that native code handles on Unicorn, ...
KVM_WINDOW: Final = 12  # ... or so many on KVM, where each costs fifty times as much
PATIENT_WINDOWS: Final = 1
QUIET_NS: Final = 2_000_000  # or CPU time
START_NS: Final = 5_000_000  # CPU time, but for translation, on Unicorn after a new address space: a program may start
ASKED_NS: Final = 300_000  # likewise after the first CPUID in that time

# Of leaf 7, what a kernel is not told either: ERMS and FSRM, because Unicorn carries out REP MOVSB and STOSB byte by
# byte, and AVX512VL, with which Linux uses wide vectors for its random numbers, and that is at each fork.
_NEVER_TOLD_EBX: Final = bits(9, 31)
_NEVER_TOLD_EDX: Final = bits(4)


class AdaptiveEngine(Engine):
    """A domain's pair of engines. Raises EngineError where either cannot run here.

    `policy` says where a vCPU runs when nothing forces it: one of the POLICY_* values.
    """

    cpus_shared = False

    def __init__(self, memory: MachineMemory, name: str = "adaptive", policy: str = POLICY_MEASURED) -> None:
        self.name = name
        self.memory = memory
        traits = host_traits()
        if not traits.counts_as_host:
            raise EngineError("KVM gives guests a time stamp counter of their own, which Unicorn does not have")
        self.kvm = KvmEngine(memory, traits)
        self.unicorn = UnicornEngine(memory)
        self.xcr0_mask = self.kvm.xcr0_mask
        self.l4_entries = {**self.unicorn.l4_entries, **self.kvm.l4_entries}
        self.kernel_l4_entries = self.kvm.kernel_l4_entries
        self.caches_tables = self.kvm.caches_tables
        self.entry_changed = self.kvm.entry_changed
        self._cpu = AdaptiveCpu(self, policy)
        self.executable_mapped = self._cpu.executable_mapped
        self.code_frames = self.unicorn.code_frames

    @property
    def may_move(self) -> bool:
        """Whether the domain has a single vCPU: see the module's text on atomicity."""
        return len(self.kvm.cpus) == 1

    def cpu(self, vcpu_id: int) -> Cpu:
        return self.kvm.cpu(vcpu_id) if vcpu_id else self._cpu

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        eax, ebx, ecx, edx = self.kvm.host_cpuid(leaf, subleaf)
        if (leaf, subleaf) == (7, 0):
            ebx, edx = ebx & ~_NEVER_TOLD_EBX, edx & ~_NEVER_TOLD_EDX
        return eax, ebx, ecx, edx

    def close(self) -> None:
        self.unicorn.close()
        self.kvm.close()


class AdaptiveCpu:
    """A vCPU that is on one of two engines. See the protocol's Cpu for methods without explanation."""

    tsc_offset = 0
    get_rflags: Callable[[], int]
    set_rflags: Callable[[int], None]
    switch_mode: Callable[[int, bool], None]
    flush_tlb: Callable[[], None]
    flush_page: Callable[[int], None]

    def __init__(self, engine: AdaptiveEngine, policy: str) -> None:
        self._engine = engine
        self._memory = engine.memory
        self._unicorn: UnicornCpu = engine.unicorn.cpu(0)
        self.regs = self._unicorn.regs
        self._unicorn.leave_cpuid_to_python()
        self._kvm: KvmCpu = engine.kvm.cpu(0, self.regs)
        self._state = CpuState(xsave=bytearray(engine.kvm.xsave_size))
        self._borrowed = Borrowed(self._memory, self._unicorn, engine.kvm, self._state)
        self._needs = Needs(self._memory, engine.kvm.traits, self._kvm, self._unicorn)
        self._active: UnicornCpu | KvmCpu = self._kvm
        self._target: UnicornCpu | KvmCpu | None = None  # where to go on
        self._requested: str | None = None
        self._leave = False
        self._borrow = False  # go to KVM for a single instruction
        self._kick = False
        self._modes: ModeSwitchState | None = None
        self._calls = EngineCalls()  # those of the engine where it is
        self.calls = ctypes.addressof(self._calls) if self._kvm.calls else 0
        self.moves = 0
        self.policy = policy
        patience = BOOT_PATIENCE if policy == POLICY_KVM else LEAST_PATIENCE
        self._placement = Placement(engine.kvm.traits.exit_cost_ns, patience)
        self._since_need = AFTER_NEED  # traps on Unicorn since only Unicorn would do
        self._traps = 0
        self._window_start = 0
        self._start_ends = 0  # until this time (`_time`) the vCPU stays on Unicorn, because a program may start
        self._held = 0  # windows for which it has stayed on KVM for its vector registers' sake
        self._go_to(self._unicorn if policy == POLICY_MEASURED else self._kvm)

    @property
    def running_on(self) -> str:
        """The engine it is on: `kvm` or `unicorn`."""
        return "kvm" if self._active is self._kvm else "unicorn"

    # --- state ------------------------------------------------------------------------------------------

    def load(self, state: CpuState) -> None:
        needs = self._needs
        needs.task_switched, needs.dr7 = state.task_switched, state.debug[7]
        needs.gdt, needs.ldt = (state.gdt_va, state.gdt_limit), (state.ldt_va, state.ldt_limit)
        self._state.xcr0 = state.xcr0
        self._state.xsave = bytearray(state.xsave.ljust(self._engine.kvm.xsave_size, b"\0"))
        self._active.load(state)
        self._prepare_active()

    def store(self, state: CpuState) -> None:
        if self._active is self._kvm:
            self._kvm.store(state)
            return
        self._store_from_unicorn(state)

    swap = Cpu.swap

    def attach(self, modes: ModeSwitchState) -> None:
        self._modes = self._needs.modes = modes
        self._kvm.attach(modes)
        self._unicorn.attach(modes)
        self._start_window()

    def set_segment(self, segment: int, selector: int) -> None:
        self._active.set_segment(segment, selector)

    def set_code_stack(self, cs: int, ss: int) -> None:
        self._active.set_code_stack(cs, ss)

    def set_task_switched(self, on: bool) -> None:
        self._needs.task_switched = on
        self._active.set_task_switched(on)

    def set_debug(self, number: int, value: int) -> None:
        if number == 7:
            self._needs.dr7 = value
        self._active.set_debug(number, value)

    def set_ldt(self, va: int, limit: int) -> None:
        self._needs.ldt = (va, limit)
        self._active.set_ldt(va, limit)

    def set_xcr0(self, value: int) -> None:
        self._state.xcr0 = value
        self._borrowed.prepare(self._active is self._unicorn)
        if self._active is self._kvm:
            self._kvm.set_xcr0(value)

    def code_written(self, mfn: int) -> None:
        if self._active is self._unicorn:
            self._unicorn.code_written(mfn)

    def executable_mapped(self, mfn: int) -> None:
        if self._active is self._unicorn:
            self._unicorn.executable_mapped(mfn)

    # --- running ------------------------------------------------------------------------------------------

    def run(self, on_trap: TrapHandler) -> None:
        self._leave = False
        on_kvm, on_unicorn = self._handlers(on_trap)
        while True:
            self._look_around()
            if self._target is not None:
                self._move()
            if self._kick:  # it may have gone to the engine that the vCPU was on
                self._kick = False
                return
            self._active.run(on_kvm if self._active is self._kvm else on_unicorn)
            moving = self._target is not None
            if self._borrow:
                self._execute_one(on_trap)
            elif moving:
                self._move()
            if self._leave or self._kick or not moving:
                self._kick = False
                return

    def kick(self) -> None:
        self._kick = True
        self._active.kick()

    def request_move(self, name: str) -> None:
        """Go on on the engine `kvm` or `unicorn` from the next trap boundary on. From any thread."""
        self._requested = name
        self._active.kick()

    def _handlers(self, on_trap: TrapHandler) -> tuple[TrapHandler, TrapHandler]:

        def on_kvm(vector: int, error_code: int, address: int) -> bool:
            if vector == VECTOR_PF and self._is_out_of_reach(address):
                self._target, self._since_need = self._unicorn, 0
                return False
            if not on_trap(vector, error_code, address):
                self._leave = True
            self._traps += 1
            if self._requested is not None or self._window_is_over() or self._needs.only_unicorn_can(self._l4_mfn):
                self._look_around()
            return not self._leave and self._target is None

        def on_unicorn(vector: int, error_code: int, address: int) -> bool:
            if vector == TRAP_CPUID:
                self._borrowed.answer_cpuid()
                if self._start_ends:
                    self._start_ends = min(self._start_ends, self._time() + ASKED_NS)
                return True
            if vector == VECTOR_UD and self._only_kvm_can():
                instruction = self._borrowed.instruction()
                if self._needs.task_switched and uses_extended_state(instruction):
                    return on_unicorn(VECTOR_NM, 0, 0)
                try:
                    if self._borrowed.saved_or_restored(instruction):
                        return True
                except extended.OperandFault as fault:
                    return on_unicorn(VECTOR_PF, fault.error_code, fault.address)
                self._target, self._start_ends = self._kvm, 0
                self._needs.uses_wide_vectors = True
                self._borrow = self._needs.only_unicorn_can(self._l4_mfn) or self._needs.selectors_would_be_lost()
                return False
            if not on_trap(vector, error_code, address):
                self._leave = True
            self._traps += 1
            self._since_need += 1
            if self._requested is not None or not self._traps % AFTER_NEED or self._window_is_over():
                self._look_around()
            return not self._leave and self._target is None

        return on_kvm, on_unicorn

    def _execute_one(self, on_trap: TrapHandler) -> None:
        """Execute one instruction on KVM that Unicorn does not have, by a single step, and go back.

        For a vCPU whose state KVM gets wrong: no other instruction may see that state.
        """
        self._borrow = False
        instruction = self._borrowed.instruction()
        self._transfer(self._kvm)
        self._grant(0)
        single_steps = self.get_rflags() & EFLAGS_TF

        def stepped(vector: int, error_code: int, address: int) -> bool:
            if not single_steps:
                self.set_rflags(self.get_rflags() & ~EFLAGS_TF)
                if vector == VECTOR_DB:
                    return False
            if not on_trap(vector, error_code, address):
                self._leave = True
            return False

        self.set_rflags(self.get_rflags() | EFLAGS_TF)
        self._kvm.run(stepped)
        if not single_steps:  # a kick may have come first
            self.set_rflags(self.get_rflags() & ~EFLAGS_TF)
        written = self._borrowed.frames_written(instruction, self._l4_mfn, self._kvm.runs_64_bit_code)
        self._transfer(self._unicorn)
        for mfn in written:
            self._unicorn.code_written(mfn)

    # --- where to run -------------------------------------------------------------------------------------

    def _is_out_of_reach(self, address: int) -> bool:
        """Whether KVM has refused the guest a part of the machine-to-physical table, to which it may go on Unicorn."""
        if not MACH2PHYS_VIRT_START <= address < MACH2PHYS_VIRT_END or not self._engine.may_move:
            return False
        if page_walk.permitted(self._memory, self._l4_mfn, address, PTE_P | PTE_US) is None:
            return False
        self._needs.reads_fixed_m2p = self._modes is not None and self._modes.kernel_mode
        return True

    @property
    def _l4_mfn(self) -> int:
        return self._kvm.l4_mfn if self._active is self._kvm else self.regs[_CR3] >> PAGE_SHIFT

    def _only_kvm_can(self) -> bool:
        """Whether an undefined opcode on Unicorn may be one that KVM executes: not UD2, nor what follows Xen's own."""
        code = self._borrowed.code(2)
        return code is not None and code != _UD2 and self._engine.may_move

    def _look_around(self) -> None:
        """Decide where to go on: by request, by necessity, or by what the last traps cost."""
        requested, self._requested = self._requested, None
        here = self._active
        if not self._engine.may_move:
            wanted: UnicornCpu | KvmCpu = self._kvm
        elif self._needs.only_unicorn_can(self._l4_mfn):
            self._since_need = 0
            wanted = self._unicorn
        elif requested is not None:
            wanted = self._kvm if requested == "kvm" else self._unicorn
        elif self.policy == POLICY_ON_REQUEST:
            wanted = here
        elif self._keeps_to_kvm():
            wanted = self._kvm if self._since_need >= AFTER_NEED else here
            if self._window_is_over():
                self._start_window()
        else:
            wanted = self._by_measurement()
        if wanted is self._kvm and here is self._unicorn and self._needs.selectors_would_be_lost():
            self._requested = requested
            wanted = here
        self._target = wanted if wanted is not here else None

    def _keeps_to_kvm(self) -> bool:
        """Whether the policy is KVM for all that KVM can do.

        Not before the guest has a program: a kernel that boots does little but change page tables, one trap for each
        entry, by the ten thousand.
        """
        return self.policy == POLICY_KVM and (self._modes is None or self._modes.user_l4 != 0)

    def _by_measurement(self) -> UnicornCpu | KvmCpu:
        """Ask the policy, once a window of traps or of time."""
        here = self._active
        if self._modes is not None and self._modes.new_space:
            self._start_ends = self._time() + START_NS
        if self._start_ends:
            if self._time() >= self._start_ends:
                self._start_ends = 0
            self._start_window()
            return self._unicorn if self._start_ends else here
        elapsed = time.thread_time_ns() - self._window_start
        if not self._window_is_over() and elapsed < QUIET_NS:
            return here
        native_traps = self._native_traps()
        traps = self._traps + native_traps
        syscalls = self._count_syscalls() - self._syscalls
        translation = self._unicorn.translation_ns - self._translation
        self._start_window()
        if not self._placement.spent(self.running_on, traps, elapsed, syscalls, native_traps, translation):
            return here
        if here is self._unicorn:
            return self._kvm
        # In the middle of a function that uses wide vectors, the rest of it had better run here too.  But EVEX-encoded
        # code leaves registers 16 to 31 in use for the rest of its program's life.
        self._held += 1
        if self._held <= PATIENT_WINDOWS and extended.in_use(self._kvm.extended_image(), self._borrowed.components):
            return here
        return self._unicorn

    def _time(self) -> int:
        """CPU time of this thread, ns, but for what Unicorn needed to translate."""
        return time.thread_time_ns() - self._unicorn.translation_ns

    def _grant(self, traps: int) -> None:
        if self._modes is not None:
            self._modes.native_budget = traps

    def _native_traps(self) -> int:
        """Those of this window that Python has not seen."""
        return self._granted - self._modes.native_budget if self._modes is not None else 0

    def _window_is_over(self) -> bool:
        """Whether it has had as many traps as it may have."""
        if self._traps >= WINDOW or (self._granted > 0 and self._native_traps() == self._granted):
            return True
        return self._modes is not None and self._modes.new_space

    def _start_window(self) -> None:
        """Native code may handle so many traps until the policy is asked again.

        None on Unicorn where the policy is to leave it after some traps.
        """
        self._traps = 0
        if self._modes is not None:
            self._modes.new_space = False
        on_kvm = self._active is self._kvm
        self._granted = KVM_WINDOW if on_kvm else NATIVE_WINDOW
        if self._keeps_to_kvm() or not self._engine.may_move:
            self._granted = UNLIMITED if on_kvm else 0
        self._grant(self._granted)
        self._syscalls = self._count_syscalls()
        self._translation = self._unicorn.translation_ns
        self._window_start = time.thread_time_ns()

    def _count_syscalls(self) -> int:
        """Those that the fast path does, or would do if the vCPU were on KVM."""
        return self._modes.syscalls if self._modes is not None and self._engine.kvm.traits.has_fast_path else 0

    # --- moving -------------------------------------------------------------------------------------------

    def _move(self) -> None:
        """Go on on the other engine."""
        target, self._target = self._target, None
        assert target is not None
        self._placement.left(self.running_on)
        self._held = 0
        if target is self._kvm:
            self._unicorn.note_code()
        self._transfer(target)
        if target is self._unicorn:
            self._unicorn.distrust_code()
        self.moves += 1

    def _transfer(self, target: UnicornCpu | KvmCpu) -> None:
        """Store the state from one engine and load it into the other."""
        self._target = None
        state = self._state
        if target is self._unicorn:
            self._kvm.take_selectors()
            self._kvm.store(state)
        else:
            self._store_from_unicorn(state)
        self._go_to(target)
        target.load(state)
        self._prepare_active()

    def _store_from_unicorn(self, state: CpuState) -> None:
        """Unicorn's state, with what only KVM has of the extended state left as it was."""
        xcr0, image = self._state.xcr0, self._borrowed.image()
        state.xsave = bytearray(XSAVE_EXTENDED)
        self._unicorn.store(state)
        state.xcr0, state.xsave = xcr0, bytearray(image)

    def _prepare_active(self) -> None:
        self._borrowed.prepare(self._active is self._unicorn)
        if self._active is self._unicorn:
            self._unicorn.flush_tlb()
            if self._borrowed.has_more:
                # XSAVE and its kin are to be undefined, so that they are executed where all components are.
                self.regs[_CR4] &= ~CR4_OSXSAVE
        else:
            self._kvm.flush_tlb()

    def _go_to(self, target: UnicornCpu | KvmCpu) -> None:
        """Make an engine the one that all calls go to."""
        self._active = target
        if self.calls:
            ctypes.memmove(self.calls, target.calls, ctypes.sizeof(EngineCalls))
            # KVM has to know of entries that change wherever the vCPU is; Unicorn's functions need no context.
            self._calls.context, self._calls.entry_changed = self._kvm.entry_changed_call
        self.get_rflags, self.set_rflags = target.get_rflags, target.set_rflags
        self.switch_mode = target.switch_mode
        self.flush_tlb, self.flush_page = target.flush_tlb, target.flush_page
        self._start_window()
