"""Unicorn's execution context with guest-user mode in stub processes: native speed without hardware virtualisation.

The guest kernel stays on Unicorn.  Where an address space is *wanted* in a stub, the vCPU's way back to user mode ends
Unicorn's loop, its registers go from the one register file into the stub's signal frame, and whatever the program does
that is not plain computing comes back as a signal, which is turned into the exception that it was: the same trap
handlers, native and Python's, get it.  See spaces.py for memory, code.py for the process, and docs/native-user.md.

What a stub cannot do exactly is left to Unicorn, and decided before it runs: 32-bit code, single-stepping,
breakpoints, CR0.TS, selectors other than null in data segment registers, RIP in the upper half, a program that maps
something where the stub's own pages are; and for the rest of its time slice an access to a frame of another domain.

The processor's XSAVE components are the host's from the beginning: programs learn of them from CPUID, which a stub
cannot intercept.  Unicorn has x87 and SSE; the other components wait in an image meanwhile, and XSAVE and its kin are
carried out on both (adaptive/extended.py).  A program that is on Unicorn is not told of AVX, and if it uses that all
the same, having learned of it in a stub, it goes on in one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from ctypes import PYFUNCTYPE, addressof, c_int, c_uint32, c_uint64
from struct import pack_into, unpack_from
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from iced_x86 import Decoder, EncodingKind, Instruction, OpKind, Register, RegisterExt

from xenolith.abi.x86 import (
    CR0_TS,
    DR6_ONES,
    DR6_STEP,
    DS,
    EFLAGS_ID,
    EFLAGS_IF,
    EFLAGS_NT,
    EFLAGS_RESERVED_ONE,
    EFLAGS_RF,
    EFLAGS_TF,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    MASK32,
    MASK64,
    PAGE_SHIFT,
    PFEC_INSN,
    PFEC_PRESENT,
    PFEC_USER,
    PFEC_WRITE,
    PTE_P,
    R8,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_NP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    XSAVE_EXTENDED,
    XSAVE_HEADER,
    is_canonical,
)
from xenolith.machine import native, page_walk
from xenolith.machine.cpuid import native_cpuid
from xenolith.machine.engines import native_state
from xenolith.machine.engines.adaptive import extended
from xenolith.machine.engines.protocol import (
    TRAP_CPUID,
    TRAP_NOTHING,
    TRAP_SYSCALL,
    CpuState,
    EngineError,
    ModeSwitchState,
    TrapHandler,
)
from xenolith.machine.engines.unicorn import features, layout
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.engines.unicorn.deliver import Hook
from xenolith.machine.engines.unicorn.deliver import library as deliver_library
from xenolith.machine.engines.unicorn.instance import Instance
from xenolith.machine.engines.unicorn.user import code, host, native_run, shared, stub
from xenolith.machine.engines.unicorn.user.extended_state import ExtendedState
from xenolith.machine.engines.unicorn.user.placement import Placement
from xenolith.machine.engines.unicorn.user.shared import BREAKPOINTS, NULL_SELECTOR, UserFields
from xenolith.machine.engines.unicorn.user.spaces import UPPER_HALF, Outcome, Space, Spaces
from xenolith.machine.engines.unicorn.user.stub import StubDied
from xenolith.machine.memory import MachineMemory
from xenolith.machine.operands import GuestFault, effective_address
from xenolith.machine.tsc import read_tsc, scale

_log = logging.getLogger(__name__)
_CR0, _CR2, _CR3 = layout.CR // 8, layout.CR // 8 + 2, layout.CR // 8 + 3
_DR6, _DR7 = layout.DR // 8 + 6, layout.DR // 8 + 7
_HFLAGS: Final = layout.HFLAGS // 4
_USER_MODE: Final = layout.HF_CS64  # of hflags, and without HF_KERNEL and HF_TS
_MODES: Final = layout.HF_CS64 | layout.HF_KERNEL | layout.HF_TS
_FPU: Final = slice(shared.FPU_START, shared.FPU_START + shared.FPU_SIZE)
_KEPT_BY_HANDLER: Final = EFLAGS_NT | EFLAGS_ID  # what a return from a signal does not load
_TRACED: Final = 2  # si_code TRAP_TRACE
_OF_KERNEL: Final = 0x80  # si_code SI_KERNEL
_URETPROBE: Final = 335
_INT_80: Final = 0x80 << 3 | 2  # the error code of an INT 0x80 without a gate
_VECTORS: Final = frozenset((0, 1, 3, 4, 5, 6, 11, 12, 13, 14, 16, 17, 19))  # that programs raise
_OF_SELECTORS: Final = (VECTOR_NP, VECTOR_SS, VECTOR_GP)
_UD2, _XSETBV = b"\x0f\x0b", b"\x0f\x01\xd1"
_FRAME_ORDER: Final = (RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP, RIP)  # in the signal frame, after R8 to R15

_FLAT: Final = (Register.DS, Register.SS, Register.ES)

HAND_OVER_SECONDS: Final = 0.0002  # after which somebody looks whether a stub has handed over
_UNDELIVERED: Final = (shared.SIGNAL, shared.TRAP, shared.DIED)

Trap = tuple[int, int, int]


class NativeUserCpu(UnicornCpu):
    """See the module's text; the protocol's Cpu for methods without explanation. For domains with one vCPU."""

    def __init__(self, instance: Instance, memory: MachineMemory, force: bool) -> None:
        """`force`: all user mode runs in stubs."""
        self._user = UserFields(enabled=True, memory=memory.address, memory_size=memory.size, frames=memory.frames)
        super().__init__(instance, memory)
        components = extended.components(host.components(), native_cpuid)
        size = max((part.start + part.size for part in components), default=XSAVE_EXTENDED)
        self.spaces = Spaces(memory, self._user.spaces)
        self._stubs_lock = threading.Lock()  # taken while none may run
        self._order = threading.Lock()
        memory.other_writers = self
        self._state = ExtendedState(self, memory, components, size)
        self._all = sum(1 << part.number for part in components) | extended.BOTH_HAVE
        self.placement = Placement(memory.span, force, host.overhead())
        self._hook.wanted = self.placement.wanted_address
        self._translating = c_uint64(0)
        if instance.softmmu is not None:
            self._translating = c_uint64.from_buffer(instance.softmmu, type(instance.softmmu).translating.offset)
        self._hook.translating = addressof(self._translating)
        for number, leaf in enumerate(dict.fromkeys(leaf for leaf, _ in features.UNTOLD)):
            self._hook.untold[number][:] = leaf, *(features.UNTOLD.get((leaf, n), 0) for n in range(4))
            self._hook.untold_count = number + 1
        self._hook.marked, self._hook.writable = instance.code_frames, self.spaces.writable_address
        self._hook.frames = memory.frames if instance.softmmu is not None else 0  # who else does not mark all of them
        self._calls.entry_changed = native.function_address(self.spaces.entry_changed)
        self._native_handler: Any = None
        self._plain = False
        self._loaded: CpuState | None = None
        self._looked = 0  # CPU time of this thread when the policy last saw what a program had done, ...
        self._ran = 0  # ... and for how many ticks of the TSC the vCPU has run since
        self._native_loop: Callable[[], int] | None = None
        if (exact := self._state.native_fields) is not None:
            with contextlib.suppress(native.Missing):
                self._use_native_loop(exact, host.overhead())

    def _use_native_loop(self, exact: int, overhead: tuple[int, int]) -> None:
        """`exact`: address of the Extended. Raises native.Missing."""
        user, hook, base = self._user, self._hook, addressof(self._hook)
        user.extended, user.image_size, user.components = exact, len(self._state.image), self._all
        user.env, user.get_rflags, user.set_rflags = self.env, hook.get_rflags, hook.set_rflags
        user.stays, user.distrusts = (base + getattr(Hook, name).offset for name in ("stays", "distrusts"))
        user.reports, user.writable = self.spaces.reports_address, self.spaces.writable_address
        user.written = self.spaces.written_address
        placement, factors = self.placement, scale()
        user.wanted, user.regret = placement.wanted_address, placement.regret_address
        user.patience, user.overhead[:] = placement.patience_address, overhead
        user.tsc_mul, user.tsc_shift = factors
        self._native_loop, hook.run_user = native_run.loop(user)
        hook.user = addressof(user)

    @property
    def _kicked(self) -> bool:
        return self._user.kicked

    @_kicked.setter
    def _kicked(self, value: bool) -> None:
        self._user.kicked = value

    @property
    def traps(self) -> int:
        """How often guest code in a stub has stopped."""
        return self._user.traps

    @property
    def faults_handled(self) -> int:
        """How many page faults native code has resolved."""
        return self._user.faults

    # --- state ----------------------------------------------------------------------------------------------

    def load(self, state: CpuState) -> None:
        super().load(state)
        self._loaded = state
        if self._plain:
            return
        self._state.load(state.xsave, state.xcr0)
        self._user.is_converted, self._user.shown_by = False, 0

    def store(self, state: CpuState) -> None:
        if self._plain:
            super().store(state)
            return
        if state is not self._loaded:
            return  # `swap` has left nothing here
        image, xcr0 = bytearray(self._state.current()), self._state.xcr0
        super().store(state)
        state.xsave, state.xcr0 = image, xcr0

    def swap(self, old: CpuState, new: CpuState) -> None:
        if self._plain:
            super().swap(old, new)
            return
        self.store(old)
        self.load(new)

    def set_xcr0(self, value: int) -> None:
        if not self._plain:
            self._state.set_xcr0(value)

    def attach(self, modes: ModeSwitchState | None) -> None:
        super().attach(modes)
        self._native_handler = None
        if modes is not None and modes.native_handler:
            prototype = PYFUNCTYPE(c_int, c_uint64, c_uint32, c_uint64, c_uint64)
            self._native_handler = prototype(modes.native_handler)
        self._user.vcpu = self._vcpu
        self._user.handler = modes.native_handler if modes is not None else 0

    def become_plain(self) -> None:
        """Be a UnicornCpu, with no more components than that has: the domain has several vCPUs, and was not run yet."""
        self._plain = True
        self._memory.other_writers = None
        self._state.rest()
        self._hook.untold_count = 0
        self._give_up()

    def _give_up(self) -> None:
        """No stub from now on, and none that is left."""
        self._user.enabled = False
        self._hook.wanted = 0
        self.spaces.close()

    def close(self) -> None:
        self.spaces.close()
        super().close()

    def written(self) -> npt.NDArray[np.bool_]:
        """Frames that programs in stubs may have written to since the last call. From any thread."""
        user = self._user
        with self._stubs_lock:
            user.held = True
            with self._order:  # a stub begins to run in the opposite order: the store is seen before the load is made
                pass
            while user.running_task:
                self.kick()
                time.sleep(HAND_OVER_SECONDS)
            user.renewed = True
            found = self.spaces.written()
            user.held = False
        return found

    # --- running --------------------------------------------------------------------------------------------

    def run(self, on_trap: TrapHandler) -> None:
        if self._plain:
            super().run(on_trap)
            return
        began = read_tsc()
        try:
            while (self._user.left in _UNDELIVERED or not self._kicked) and self._turn(on_trap):
                pass
            self._ran += read_tsc() - began
            self._look()
        finally:
            self._kicked = False
            self._user.left = shared.NOTHING

    def kick(self) -> None:
        super().kick()
        if task := self._user.running_task:
            stub.interrupt(self._user.running_pid, task)

    def _look(self) -> None:
        """Have the policy see what a program has done on Unicorn."""
        hook, now = self._hook, time.thread_time_ns()
        cpu_ns, ran = now - self._looked, self._ran
        if self.placement.ran_on_unicorn(hook.user_l4, hook.user_ticks, hook.user_traps, cpu_ns, ran):
            hook.user_ticks = hook.user_traps = 0
            self._looked, self._ran = now, 0

    def _enter_user_mode(self) -> None:
        """As deliver.c: user mode goes on, on Unicorn."""
        self._hook.user_since, self._hook.translated = read_tsc(), self._translating.value

    def _leave_user_mode(self, traps: int) -> None:
        """As deliver.c: user mode was left, by so many traps."""
        hook, l4_mfn = self._hook, self._q[_CR3] >> PAGE_SHIFT
        if hook.user_l4 != l4_mfn:
            hook.user_l4, hook.user_ticks, hook.user_traps = l4_mfn, 0, 0
        hook.user_ticks += read_tsc() - hook.user_since - (self._translating.value - hook.translated)
        hook.user_traps += traps

    def _turn(self, on_trap: TrapHandler) -> bool:
        """Run in a stub or on Unicorn. False: leave."""
        self._forget_the_dead()
        l4_mfn = self._q[_CR3] >> PAGE_SHIFT
        left, self._user.left = self._user.left, shared.NOTHING
        if left == shared.LEFT:
            return False
        if left in _UNDELIVERED:
            return self._run_in_stub(l4_mfn, on_trap, left)
        user = not self._d[_HFLAGS] & layout.HF_KERNEL
        if user and self._user.enabled and self.placement.wants_stub(l4_mfn):
            if not self._hook.stays and self._may_run_in_stub(l4_mfn):
                return self._run_in_stub(l4_mfn, on_trap)
            self._hook.stays = True
        if user and self._hook.distrusts:
            self._hook.distrusts = False
            if self._instance.softmmu is None or self.spaces.may_have_written(self._instance.marked):
                self.distrust_code()
                self.flush_tlb()
        self._hook.to_user = False
        if user:
            self._enter_user_mode()
        self._execute(self._on_unicorn(on_trap))
        if self._kicked and not self._d[_HFLAGS] & layout.HF_KERNEL:
            self._leave_user_mode(0)
        return self._hook.to_user

    def _forget_the_dead(self) -> None:
        self.spaces.take_reports()
        while self.spaces.dead:
            self.placement.forget(self.spaces.dead.pop())

    def _on_unicorn(self, on_trap: TrapHandler) -> TrapHandler:
        hook, d, measures = self._hook, self._d, deliver_library() is None

        def handler(vector: int, error_code: int, address: int) -> bool:
            user = not d[_HFLAGS] & layout.HF_KERNEL
            if user:
                hook.stays = False
                if measures:
                    self._leave_user_mode(shared.EXCEPTION if vector == VECTOR_PF else 1)
            if vector == VECTOR_UD:
                answer = self._at_undefined(user)
                if answer is None:
                    return True
                vector, error_code, address = answer
                if vector == TRAP_NOTHING:
                    return False
            if vector == TRAP_CPUID and user:
                more = self._answer_cpuid(on_trap)
            else:
                more = on_trap(vector, error_code, address)
            if measures and not d[_HFLAGS] & layout.HF_KERNEL:
                self._enter_user_mode()
            return more and self._goes_on()

        return handler

    def _goes_on(self) -> bool:
        """As deliver.c: whether guest code goes on here."""
        hook = self._hook
        if not hook.wanted or self._d[_HFLAGS] & layout.HF_KERNEL:
            return True
        elsewhere = not hook.stays and self.placement.wants_stub(self._q[_CR3] >> PAGE_SHIFT)
        if not elsewhere and not hook.distrusts:
            return True
        hook.to_user = True
        return False

    def _answer_cpuid(self, on_trap: TrapHandler) -> bool:
        """A program on Unicorn is told of nothing that would have it use wide vectors. False: leave."""
        regs = self.regs
        leaf = regs[RAX] & MASK32
        more = on_trap(TRAP_CPUID, 0, 0)
        for n, place in enumerate((RAX, RBX, RCX, RDX)):
            regs[place] &= ~features.UNTOLD.get((leaf, n), 0)
        return more

    def _at_undefined(self, user: bool) -> Trap | None:
        """An opcode that Unicorn does not know: None: it was carried out; TRAP_NOTHING: a stub is to; else its trap."""
        head = self._code(3) or self._code(2) or b""
        if head[:2] == _UD2:
            return VECTOR_UD, 0, 0
        if head == _XSETBV:
            return VECTOR_GP, 0, 0
        instruction = self._instruction()
        has_wide_vectors = instruction.encoding != EncodingKind.LEGACY
        if self._q[_CR0] & CR0_TS and (has_wide_vectors or instruction.is_save_restore_instruction):
            return VECTOR_NM, 0, 0
        try:
            if self._state.carry_out(instruction):
                self._user.shown_by = 0
                return None
        except GuestFault as fault:
            return fault.vector, fault.error_code, fault.address
        l4_mfn = self._q[_CR3] >> PAGE_SHIFT
        if user and self._user.enabled and self._may_run_in_stub(l4_mfn):
            self.placement.want(l4_mfn)
            self._hook.to_user = True
            return TRAP_NOTHING, 0, 0
        if not user and has_wide_vectors and self._user.enabled:
            return self._borrow(l4_mfn, instruction)
        return VECTOR_UD, 0, 0

    def _borrow(self, l4_mfn: int, instruction: Instruction) -> Trap | None:
        """Execute one instruction of the guest kernel's in a stub, which has the kernel's half at 0: None, or its trap.

        A kernel that finds AVX in CPUID, where programs have to find it, may have a use for it.
        """
        regs, memory, wide = self.regs, self._memory, self.runs_64_bit_code
        operands = [instruction.op_kind(number) for number in range(instruction.op_count)]
        base = None
        if OpKind.MEMORY in operands:
            register, index = instruction.memory_base, instruction.memory_index
            moves = register != Register.NONE and register != index and instruction.memory_segment in _FLAT
            if not moves or instruction.is_vsib or effective_address(regs, instruction, wide) < UPPER_HALF:
                return VECTOR_UD, 0, 0
            base = RegisterExt.number(register) if RegisterExt.is_gpr64(register) else None  # else it is RIP
        if regs[RIP] < UPPER_HALF or not wide or memory.private:
            return VECTOR_UD, 0, 0
        written = [
            address >> PAGE_SHIFT
            for place in ((0, 63) if operands[:1] == [OpKind.MEMORY] else ())
            if (address := self._machine_address(l4_mfn, effective_address(regs, instruction, wide) + place))
        ]
        before, flags = None if base is None else regs[base], self.get_rflags()
        regs[RIP] -= UPPER_HALF
        if base is not None:
            regs[base] = regs[base] - UPPER_HALF & MASK64
        self.set_rflags(flags | EFLAGS_TF)
        trap = self._step(l4_mfn)
        regs[RIP] = regs[RIP] + UPPER_HALF & MASK64
        self.set_rflags(self.get_rflags() & ~EFLAGS_TF | flags & EFLAGS_TF)
        if base is not None and before is not None and instruction.op0_register != instruction.memory_base:
            regs[base] = before
        for mfn in written:
            self.code_written(mfn)
        return None if trap[0] == VECTOR_DB and not flags & EFLAGS_TF else trap

    def _step(self, l4_mfn: int) -> Trap:
        """One instruction of the upper half, in its stub."""
        with self._stubs_lock:
            return self._step_alone(l4_mfn)

    def _step_alone(self, l4_mfn: int) -> Trap:
        try:
            space = self.spaces.find(l4_mfn, UPPER_HALF)
            while True:
                self._prepare(space)
                self._show(space.stub)
                number = space.stub.run(lambda: False)
                trap = self._take_back(space.stub, number)
                if trap is None:
                    continue
                if trap[0] != VECTOR_PF:
                    return trap
                _, error_code, va = trap
                outcome = Outcome.FAULT
                if va < UPPER_HALF:
                    outcome = self.spaces.fault(space, va, bool(error_code & PFEC_WRITE), bool(error_code & PFEC_INSN))
                if outcome is Outcome.CANNOT:
                    return VECTOR_UD, 0, 0
                if outcome is Outcome.FAULT:
                    va = va + UPPER_HALF & MASK64
                    present = self._machine_address(l4_mfn, va) is not None
                    self._q[_CR2] = va
                    return VECTOR_PF, error_code | (PFEC_PRESENT if present else 0), va
        except (StubDied, EngineError):
            self._user.shown_by = 0
            return VECTOR_GP, 0, 0

    def _machine_address(self, l4_mfn: int, va: int) -> int | None:
        return page_walk.machine_address(self._memory, l4_mfn, va)

    def _instruction(self) -> Instruction:
        wide = self.runs_64_bit_code
        data = next(filter(None, (self._code(size) for size in range(15, 0, -1))), b"")
        return Decoder(64 if wide else 32, data, ip=self.regs[RIP]).decode()

    # --- in a stub ------------------------------------------------------------------------------------------

    def _may_run_in_stub(self, l4_mfn: int) -> bool:
        """Whether a stub would do exactly what the processor does, from here on."""
        regs, q = self.regs, self._q
        return (
            self._d[_HFLAGS] & _MODES == _USER_MODE
            and not (q[_DR7] & BREAKPOINTS or regs[RFLAGS] & EFLAGS_TF)
            and regs[RIP] < code.USER_END
            and regs[ES] <= NULL_SELECTOR
            and regs[DS] <= NULL_SELECTOR
            and regs[FS] <= NULL_SELECTOR
            and regs[GS] <= NULL_SELECTOR
            and not self._memory.private
            and not self._memory.q[(l4_mfn << 9) + code.AREA_SLOT] & PTE_P
        )

    def _stays_in_stub(self, l4_mfn: int) -> bool:
        """Whether guest-user mode of this address space goes on in its stub."""
        return (
            self._q[_CR3] >> PAGE_SHIFT == l4_mfn
            and self.placement.wants_stub(l4_mfn)
            and not self._hook.stays
            and self._may_run_in_stub(l4_mfn)
        )

    def _run_in_stub(self, l4_mfn: int, on_trap: TrapHandler, left: int = shared.NOTHING) -> bool:
        """Run guest-user mode until it is left. False: leave `run`. `left`: what native code has left there."""
        try:
            space = self.spaces.find(l4_mfn)
            self.spaces.watch(l4_mfn)
        except EngineError as error:
            _log.warning("programs run on Unicorn from now on: %s", error)
            self._give_up()
            return True
        self._hook.distrusts = True
        try:
            while left != shared.NOTHING or not self._kicked:
                if left == shared.NOTHING and self._native_loop is not None:
                    self._prepare(space)
                    left, self._user.left = self._native_loop(), shared.NOTHING
                if left in (shared.KERNEL, shared.LEFT):
                    return left == shared.KERNEL
                if left == shared.NOTHING:
                    if self._kicked:
                        return False
                    if not self._stays_in_stub(l4_mfn):
                        return True
                    if self._map_missed(space):
                        continue
                trap = self._next_trap(space, left)
                left = shared.NOTHING
                if trap is None:
                    continue
                if trap[0] == VECTOR_PF:
                    trap = self._page_fault(space, *trap[1:])
                    if trap is None:
                        if self._hook.stays:
                            return True
                        continue
                if trap[0] in _OF_SELECTORS and trap[1]:
                    self._hook.stays = True  # the host's descriptors are not the guest's: Unicorn shall say
                    return True
                if not self._deliver(on_trap, trap):
                    return False
                if self._d[_HFLAGS] & layout.HF_KERNEL or not self._stays_in_stub(l4_mfn):
                    return True
        except StubDied as death:
            _log.info("a stub process of address space %#x has ended: %s", l4_mfn, death)
            self._user.running_task = 0
            self.spaces.drop(space)
            self._user.shown_by = 0
            return self._deliver(on_trap, (VECTOR_GP, 0, 0))
        return False

    def _prepare(self, space: Space) -> None:
        """What its stub has mapped is brought up to date, and charged to it. Raises StubDied."""
        began = read_tsc()
        if self._user.renewed:
            self._user.renewed = False
            self.spaces.renew()
        if self.spaces.prepare(space):
            self.placement.charge(space.l4_mfn, read_tsc() - began)

    def _fault(self, space: Space, va: int, write: bool, fetch: bool) -> Outcome:
        """As Spaces.fault, and charged. Raises StubDied."""
        began = read_tsc()
        outcome = self.spaces.fault(space, va, write, fetch)
        self.placement.charge(space.l4_mfn, read_tsc() - began)
        return outcome

    def _map_missed(self, space: Space) -> bool:
        """What the guest's kernel has mapped after a page fault. False: there was none. Raises StubDied.

        As if it were read, and so writable if it is dirty already: only a write makes a page dirty.
        """
        user = self._user
        missed, user.missed_l4 = user.missed_l4, 0
        if missed != space.l4_mfn:
            return False
        self._fault(space, user.missed_va, False, user.missed_fetch)
        return True

    def _next_trap(self, space: Space, left: int) -> Trap | None:
        """The one that native code has left, or the next one; None if it was only a kick. Raises StubDied."""
        user = self._user
        if left == shared.TRAP:
            return user.vector, user.error_code, user.address
        if left == shared.DIED:
            raise space.stub.died(user.reason)
        return self._take(space) if left == shared.SIGNAL else self._run_once(space)

    def _run_once(self, space: Space) -> Trap | None:
        """Let the program run until its next signal: the trap that it was, or None if it was only a kick."""
        running, user = space.stub, self._user
        while True:
            self._prepare(space)
            self._show(running)
            user.running_pid = running.pid
            user.running_task = running.fields.task
            if self._kicked:
                user.running_task = 0
                return None
            if not user.held and not user.renewed:
                break
            user.running_task = 0
            with self._stubs_lock:  # somebody asks what was written
                pass
        running.run(self._is_kicked)
        user.running_task = 0
        user.traps += 1
        return self._take(space)

    def _take(self, space: Space) -> Trap | None:
        """The same, from a stub that has handed over."""
        running = space.stub
        number, *_, fs_base, gs_base = running.fields.arguments
        trap = self._take_back(running, number)
        self.regs[FS_BASE], self.regs[GS_BASE] = fs_base, gs_base
        if trap is not None:
            ticks = running.stopped - running.words[code.RESUMED // 8]
            self.placement.ran_in_stub(space.l4_mfn, ticks, trap[0] != TRAP_SYSCALL)
        return trap

    def _is_kicked(self) -> bool:
        return self._kicked

    def _show(self, running: stub.Stub) -> None:
        """Put the registers into the stub's signal frame."""
        regs, q = self.regs, running.words
        at = (running.frame + stub.R8) // 8
        q[at : at + 8] = regs[R8 : R15 + 1]
        for place, register in enumerate(_FRAME_ORDER, at + 8):
            q[place] = regs[register]
        flags = self.get_rflags() | EFLAGS_IF | EFLAGS_RESERVED_ONE
        q[(running.frame + stub.FLAGS) // 8] = flags
        q[code.FLAGS // 8] = flags & _KEPT_BY_HANDLER | EFLAGS_IF | EFLAGS_RESERVED_ONE
        q[code.FS_BASE // 8], q[code.GS_BASE // 8] = regs[FS_BASE], regs[GS_BASE]
        user, image, handled = self._user, self._state.image, self._state.handled
        if not user.is_converted or self._b[_FPU] != bytes(user.converted):
            self._state.current()
            self._note_converted()
            user.shown_by = 0
        if user.shown_by != addressof(running.fields) or user.handled != handled:
            running.bytes[running.xsave : running.xsave + len(image)] = image
            user.shown_by, user.handled = addressof(running.fields), handled

    def _note_converted(self) -> None:
        """Unicorn's x87 and SSE state and the image are the same now."""
        self._user.converted[:] = self._b[_FPU]
        self._user.is_converted = True

    def _take_back(self, running: stub.Stub, number: int) -> Trap | None:
        """The registers from the signal frame, which the program may have forged: then they are its own."""
        regs, q = self.regs, running.words
        frame = running.frame // 8
        at = frame + stub.R8 // 8
        regs[R8 : R15 + 1] = q[at : at + 8]
        for place, register in enumerate(_FRAME_ORDER, at + 8):
            regs[register] = q[place]
        flags = q[frame + stub.FLAGS // 8]
        self.set_rflags(flags & ~EFLAGS_RF)
        self._take_extended(running)
        selectors = q[frame + stub.CS // 8]
        if selectors & 0xFFFF != stub.HOST_CS64:
            try:
                self.set_code_stack(selectors & 0xFFFF, selectors >> 48)
            except ValueError:
                return VECTOR_GP, 0, 0
        if number == code.SIGKICK:
            return None
        if number == code.SIGSYS:
            (arch,) = unpack_from("<I", running.bytes, running.frame + stub.SIGNAL_ARCH)
            return self._system_call(arch, q[frame + stub.SIGNAL_CALL // 8])
        if (
            number == code.SIGILL
            and unpack_from("<i", running.bytes, running.frame + stub.SIGNAL_CODE)[0] == _OF_KERNEL
        ):
            regs[RAX] = _URETPROBE  # the one system call that no filter sees, on newer kernels
            return TRAP_SYSCALL, 0, 0
        vector, error_code = q[frame + stub.VECTOR // 8], q[frame + stub.ERROR // 8]
        if vector not in _VECTORS:
            return VECTOR_GP, 0, 0
        if vector == VECTOR_PF:
            return VECTOR_PF, error_code & (PFEC_WRITE | PFEC_INSN) | PFEC_USER, q[frame + stub.CR2 // 8]
        if vector == VECTOR_DB:
            traced = unpack_from("<i", running.bytes, running.frame + stub.SIGNAL_CODE)[0] == _TRACED
            self._q[_DR6] = DR6_ONES | DR6_STEP if traced else DR6_ONES
            return VECTOR_DB, 0, self._q[_DR6]
        return vector, error_code & 0xFFFF, 0

    def _system_call(self, arch: int, place: int) -> Trap:
        regs = self.regs
        if arch == stub.ARCH_I386:
            regs[RIP] = regs[RIP] - 2 & MASK64
            return VECTOR_GP, _INT_80, 0
        if place >> PAGE_SHIFT == stub.VSYSCALL:  # the host's kernel would emulate it, and has returned from it already
            regs[RIP], regs[RSP] = place, regs[RSP] - 8 & MASK64
            return VECTOR_PF, PFEC_USER | PFEC_INSN, place
        return TRAP_SYSCALL, 0, 0

    def _take_extended(self, running: stub.Stub) -> None:
        image = self._state.image
        now = running.bytes[running.xsave : running.xsave + len(image)]
        if now == image:
            return
        image[:] = now
        (used,) = unpack_from("<Q", image, XSAVE_HEADER)
        pack_into("<Q", image, XSAVE_HEADER, used & self._all)
        image[XSAVE_HEADER + 8 : XSAVE_EXTENDED] = bytes(XSAVE_EXTENDED - XSAVE_HEADER - 8)
        (mxcsr,) = unpack_from("<I", image, extended.MXCSR.start)
        pack_into("<I", image, extended.MXCSR.start, mxcsr & layout.MXCSR_DEFINED)
        self.load_extended(image)
        self._note_converted()

    def _page_fault(self, space: Space, error_code: int, va: int) -> Trap | None:
        """A page fault in the stub: None: it is resolved, or not if Unicorn is to make the access."""
        write, fetch = bool(error_code & PFEC_WRITE), bool(error_code & PFEC_INSN)
        outcome = self._fault(space, va, write, fetch) if is_canonical(va) else Outcome.FAULT
        if outcome is Outcome.FAULT:
            present = self._machine_address(space.l4_mfn, va) is not None
            self._q[_CR2] = va
            user = self._user
            user.missed_l4, user.missed_va, user.missed_fetch = space.l4_mfn, va, fetch
            return VECTOR_PF, error_code | (PFEC_PRESENT if present else 0), va
        if outcome is Outcome.CANNOT:
            self._hook.stays = True
        return None

    def _deliver(self, on_trap: TrapHandler, trap: Trap) -> bool:
        """To the native trap handler, and to Python's if that leaves it."""
        if self._native_handler is not None and self._vcpu:
            answer = self._native_handler(self._vcpu, *trap)
            if answer == native_state.LOOK:
                trap = TRAP_NOTHING, 0, 0
            elif answer != native_state.NOT_HANDLED:
                return bool(answer)
        return on_trap(*trap)
