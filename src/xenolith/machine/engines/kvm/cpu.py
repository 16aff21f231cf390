"""One virtual processor of KVM as an execution context (`Cpu` of the engine protocol).

The path of a trap: KVM_RUN returns with KVM_EXIT_IO because a stub of the hypervisor area executed OUT; the kernel
has left the general and system registers in the shared kvm_run page (KVM_CAP_SYNC_REGS), the processor has
left RIP, CS, RFLAGS and RSP on the trap stack.  Both are read as plain memory into the register file, the trap handler
runs, and the registers go back the same way.  No ioctl but KVM_RUN takes part.

Hardware CS and SS are always the same two selectors; the ones that the guest knows live in the register file.  Some
hosts insist on that, and it costs nothing on the others.  Loads of other selectors fault for want of a
descriptor and are carried out here, from the guest's own GDT (see segment_loads).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from struct import Struct, pack_into, unpack_from
from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.x86 import (
    CR0_TS,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CS,
    DS,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    EFLAGS_AC,
    EFLAGS_DEFINED,
    EFLAGS_DF,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_NT,
    EFLAGS_RESERVED_ONE,
    EFLAGS_RF,
    EFLAGS_TF,
    EFLAGS_VM,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    MSR_STAR,
    OPCODE_INT3,
    OPCODE_INT_N,
    OPCODE_INTO,
    PAGE_SHIFT,
    R8,
    R11,
    R15,
    RAX,
    RCX,
    RFLAGS,
    RIP,
    RSP,
    SEGMENT_BASE,
    SS,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_OF,
    VECTOR_PF,
    VECTOR_UD,
    VECTORS_WITH_ERROR_CODE,
    advanced,
)
from xenolith.machine import page_walk, segments
from xenolith.machine.engines.kvm import api, area, native_run, segment_loads
from xenolith.machine.engines.kvm.alarm import Alarm
from xenolith.machine.engines.kvm.api import ioctl, run_ioctl
from xenolith.machine.engines.kvm.fast_path import NOTHING, FastPath
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.native_state import EngineCalls
from xenolith.machine.engines.protocol import (
    TRAP_NOTHING,
    TRAP_SYSCALL,
    Cpu,
    CpuState,
    EngineError,
    GuestModes,
    TrapHandler,
    register_file,
)
from xenolith.machine.engines.unicorn.layout import DESC_L, FLAT_CODE32, FLAT_CODE64
from xenolith.machine.native import buffer_address
from xenolith.machine.segments import Segment

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.engine import KvmEngine

KICK_SIGNAL: Final = signal.SIGRTMIN + 6

_CR0: Final = 0x8005_0033  # PG AM WP NE ET MP PE
_EFER: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
_MSR_LSTAR: Final = 0xC000_0082
_MSR_CSTAR: Final = 0xC000_0083
_MSR_SFMASK: Final = 0xC000_0084
_FIRST: Final = Struct("<8Q")  # the eight registers whose order differs: see abi.x86 and api.RUN_REGS
_SELECTORS: Final = Struct("<8xQ16xQ16xQ16xQ")  # of DS ES FS GS: limit, selector, type, present
ENTRY_FLAGS: Final = EFLAGS_DEFINED & ~(EFLAGS_IOPL | EFLAGS_VM)
ALWAYS_SET: Final = EFLAGS_IF | EFLAGS_RESERVED_ONE
_SEGMENT_OFFSETS: Final = {
    ES: api.SREGS_ES,
    CS: api.SREGS_CS,
    SS: api.SREGS_SS,
    DS: api.SREGS_DS,
    FS: api.SREGS_FS,
    GS: api.SREGS_GS,
}
_DATA_SEGMENTS: Final = (ES, DS, FS, GS)
_NULL_IMAGE: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, 0, 3, 1, 3, 1, 1, 0, 1, 0, 0)
_FLAT_CODE: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.USER_CODE64, 0xB, 1, 3, 0, 1, 1, 1, 0, 0)
_FLAT_STACK: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.USER_DATA, 3, 1, 3, 1, 1, 0, 1, 0, 0)
_CODE0: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.CODE0, 0xB, 1, 0, 0, 1, 1, 1, 0, 0)
_DATA0: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.DATA0, 3, 1, 0, 1, 1, 0, 1, 0, 0)
_ERROR_IDT: Final = 2  # error code of a fault that INT n caused
_LONG_CODE: Final = DESC_L

# 64-bit words of the kvm_run page
_RUN_FIRST: Final = api.RUN_REGS
_RUN_R8: Final = api.RUN_REGS // 8 + 8
_RUN_RSP: Final = api.RUN_REGS // 8 + 6
_RUN_RIP: Final = api.RUN_REGS // 8 + 16
_RUN_RFLAGS: Final = api.RUN_REGS // 8 + 17
_RUN_RDI: Final = api.RUN_REGS // 8 + 5
_RUN_FS_BASE: Final = (api.RUN_SREGS + api.SREGS_FS) // 8
_RUN_GS_BASE: Final = (api.RUN_SREGS + api.SREGS_GS) // 8
_RUN_CR0: Final = (api.RUN_SREGS + api.SREGS_CR0) // 8
_RUN_CR2: Final = (api.RUN_SREGS + api.SREGS_CR2) // 8
_RUN_CR3: Final = (api.RUN_SREGS + api.SREGS_CR3) // 8
_RUN_CS: Final = slice(api.RUN_SREGS + api.SREGS_CS, api.RUN_SREGS + api.SREGS_CS + api.SEGMENT.size)
_RUN_SS: Final = slice(api.RUN_SREGS + api.SREGS_SS, api.RUN_SREGS + api.SREGS_SS + api.SEGMENT.size)
_RUN_SELECTORS: Final = api.RUN_SREGS + api.SREGS_DS
_RUN_CPL: Final = api.RUN_SREGS + api.SREGS_SS + 16  # SS.DPL
_RUN_EXIT_REASON: Final = api.RUN_EXIT_REASON // 4
_RUN_DIRTY: Final = api.RUN_DIRTY_REGS // 8
_RUN_PORT: Final = api.RUN_IO_PORT // 2

_RUN_INTERRUPTS: Final = slice(api.RUN_SREGS + api.SREGS_INTERRUPTS, api.RUN_SREGS + api.SREGS_SIZE)
_RUN_EVENTS: Final = slice(api.RUN_EVENTS, api.RUN_EVENTS + api.VCPU_EVENTS_SIZE)
_RUN_GUEST: Final = slice(api.RUN_REGS, api.RUN_SREGS + api.SREGS_SIZE)
_PAGE: Final = -0x1000 & (1 << 64) - 1
_MASK64: Final = (1 << 64) - 1
_WITH_ERROR_CODE: Final = VECTORS_WITH_ERROR_CODE
EFLAGS_OF: Final = 1 << 11
_DIRECTION_IN: Final = 0
LOOK_AGAIN: Final = 0.0005  # s
_INT3: Final = bytes((OPCODE_INT3,))
_INT_N: Final = bytes((OPCODE_INT_N,))
_INTO: Final = bytes((OPCODE_INTO,))
_IO_BY_DX: Final = b"\xec\xed\xee\xef\x6c\x6d\x6e\x6f"
_XSTATE_BV: Final = 512  # in an XSAVE image

_thread = threading.local()


class KvmCpu(Cpu):
    """A vCPU of KVM. See the engine protocol for the methods that are not explained here.

    `regs`: where to keep the register file; words that abi.x86 does not name are left alone.
    """

    def __init__(self, engine: KvmEngine, number: int, vm_fd: int, regs: memoryview | None = None) -> None:
        self._engine = engine
        self._memory = engine.memory
        self._stubs = engine.area.stubs
        self._pages = engine.area.cpu_pages(number)
        self._fd = ioctl(vm_fd, api.KVM_CREATE_VCPU, number)
        self._map = mmap.mmap(self._fd, engine.run_size)
        self._run = memoryview(self._map)
        self._run_q = self._run.cast("Q")
        self._run_d = self._run.cast("I")
        self._run_h = self._run.cast("H")
        self.regs = register_file() if regs is None else regs
        self.get_rflags: Callable[[], int] = partial(self.regs.__getitem__, RFLAGS)
        self.set_rflags: Callable[[int], None] = self._set_rflags
        self._file = self.regs.cast("B")
        self._cs = _FLAT_CODE
        self._ss = _FLAT_STACK
        self._selectors = _SELECTORS.unpack(bytes(_SELECTORS.size))
        self._shared = shared = self._share(number)
        self._native = native_run.library()
        self._calls = EngineCalls(regs=shared.regs, context=ctypes.addressof(shared))
        if self._native is not None:
            for name, address in self._native.calls.items():
                setattr(self._calls, name, address)
        self.calls = ctypes.addressof(self._calls) if self._native is not None else 0
        self._task_switched = False
        self._debug = [0] * 8
        self._xcr0 = 1
        self._gdt = (0, 0)  # linear address and limit
        self._ldt = (0, 0)
        self._interrupted_in_stubs = False
        self._kick_lock = threading.Lock()
        self._running_thread: int | None = None
        self._masked_for = 0  # the thread whose signal mask KVM_RUN uses
        if engine.traits.syscall_cpl == 3:
            self._pages.allow_syscall_port()
        self._fast_path: FastPath | None = None
        self._syscall_page = area.SYSCALL_PAGE
        if engine.area.has_views:
            self._alarm = Alarm(KICK_SIGNAL)
            self._fast_path = FastPath(
                engine.memory, self._pages, self.regs, engine.has_view, self._info_moved, self._alarm, shared
            )
            self._syscall_page = self._pages.code_va
        shared.syscall_page = self._syscall_page
        self._set_up()
        self._lapic = bytearray(api.LAPIC_SIZE)
        if engine.has_ticks:
            self._set_up_ticks()

    def _share(self, number: int) -> KvmFields:
        """The state that native code works on, too, and what ring 0 calls of it."""
        engine, pages, stubs = self._engine, self._pages, self._stubs
        shared = KvmFields(
            regs=buffer_address(self.regs),
            run=buffer_address(self._run),
            frame=buffer_address(pages.frame),
            list=buffer_address(pages.list),
            list_va=pages.list_va,
            memory=engine.memory.address,
            memory_size=engine.memory.size,
            changes=ctypes.addressof(engine.changes),
            info=NOTHING,
            slot=area.SLOT,
            alias=area.ALIAS,
            entries_end=stubs.rewrite_entries(0),
            tables_end=stubs.rewrite_tables(0),
            entry_size=stubs.rewrite_entries(0) - stubs.rewrite_entries(1),
            table_size=stubs.rewrite_tables(0) - stubs.rewrite_tables(1),
            flush_stub=stubs.flush,
            go_stub=stubs.go,
            fd=self._fd,
            number=number,
            flat=True,
            shadows=engine.traits.shadows_page_tables,
        )
        shared.view_entries[:] = engine.area.l4_entry, engine.area.kernel_l4_entry
        shared.flat_code[:], shared.flat_stack[:] = _FLAT_CODE, _FLAT_STACK
        shared.code0[:], shared.data0[:] = _CODE0, _DATA0
        shared.signals[:] = (1 << KICK_SIGNAL - 1).to_bytes(128, "little")
        return shared

    @property
    def entry_changed_call(self) -> tuple[int, int]:
        """Context and address of the native function that notes changed entries."""
        return self._calls.context, self._calls.entry_changed

    @property
    def l4_mfn(self) -> int:
        """The page table it is on."""
        return self._shared.l4_mfn

    # --- registers outside of `run` ------------------------------------------------------------------

    def _set_rflags(self, value: int) -> None:
        self.regs[RFLAGS] = value & ENTRY_FLAGS | ALWAYS_SET

    def load(self, state: CpuState) -> None:
        self.regs[: RIP + 1] = state.regs[: RIP + 1]
        self.set_rflags(state.regs[RFLAGS])
        self._gdt = (state.gdt_va, state.gdt_limit)
        self._ldt = (state.ldt_va, state.ldt_limit)
        self.switch_mode(state.l4_mfn, state.user)
        for segment in _DATA_SEGMENTS:
            with suppress(ValueError):  # null then: the descriptor is gone
                self.set_segment(segment, state.regs[segment] & 0xFFFF)
        self.regs[FS_BASE] = state.regs[FS_BASE]  # as WRMSR may have set them
        self.regs[GS_BASE] = state.regs[GS_BASE]
        self._load_code_stack(state.regs[CS] & 0xFFFF, state.regs[SS] & 0xFFFF)
        self.set_task_switched(state.task_switched)
        self._debug = list(state.debug)
        self._load_debug()
        self._load_extended(state)
        self._shared.flush = True

    def store(self, state: CpuState) -> None:
        state.regs[: RFLAGS + 1] = self.regs[: RFLAGS + 1]
        state.regs[ES : GS + 3] = self.regs[ES : GS + 3]
        state.l4_mfn = self.l4_mfn
        state.user = self._shared.user
        state.task_switched = self._task_switched
        state.gdt_va, state.gdt_limit = self._gdt
        state.ldt_va, state.ldt_limit = self._ldt
        registers = bytearray(api.DEBUGREGS.size)
        ioctl(self._fd, api.KVM_GET_DEBUGREGS, registers)
        state.debug = [*self._debug[:6], api.DEBUGREGS.unpack(registers)[4], self._debug[7]]
        state.xsave = self.extended_image()
        state.xcr0 = self._xcr0

    def switch_mode(self, l4_mfn: int, user: bool) -> None:
        self._shared.l4_mfn = l4_mfn
        self._shared.user = user
        self._run_q[_RUN_CR3] = l4_mfn << PAGE_SHIFT

    def flush_tlb(self) -> None:
        self._shared.flush = True

    def flush_page(self, va: int) -> None:
        self._shared.flush = True

    def set_segment(self, segment: int, selector: int) -> None:
        try:
            self.load_selector(segment, selector)
        except ValueError:
            self._write_segment(segment, 0, segments.NULL)
            raise

    def set_code_stack(self, cs: int, ss: int) -> None:
        code = segments.code_segment(cs, self._descriptor)
        stack = segments.stack_segment(ss, self._descriptor)
        if code.flags & _LONG_CODE:
            self._cs, self._ss = _FLAT_CODE, _FLAT_STACK
        else:
            self._cs = _image(code, area.USER_CODE32)
            self._ss = _image(stack, area.USER_DATA)
        self._shared.flat = self._cs is _FLAT_CODE
        for index, selector, segment in ((CS, cs, code), (SS, ss, stack)):
            self.regs[index] = selector
            self.regs[index + 1] = segment.base
            self.regs[index + 2] = segment.limit | segment.flags << 32

    def set_task_switched(self, on: bool) -> None:
        self._task_switched = on
        self._run_q[_RUN_CR0] = _CR0 | (CR0_TS if on else 0)

    def set_debug(self, number: int, value: int) -> None:
        self._debug[number] = value
        self._load_debug()

    def set_ldt(self, va: int, limit: int) -> None:
        self._ldt = (va, limit)

    def extended_image(self) -> bytearray:
        """The XSAVE image, in the standard format."""
        image = bytearray(api.XSAVE_SIZE)
        ioctl(self._fd, api.KVM_GET_XSAVE, image)
        return image[: self._engine.xsave_size]

    def try_xcr0(self, value: int) -> bool:
        """Whether KVM takes this XCR0."""
        try:
            ioctl(self._fd, api.KVM_SET_XCRS, bytearray(api.XCRS.pack(1, 0, 0, 0, value, *(0,) * 45)))
        except OSError:
            return False
        return True

    def set_xcr0(self, value: int) -> None:
        """Load XCR0 with a value that the hypervisor has checked against `Engine.xcr0_mask`."""
        self._xcr0 = value
        if self._engine.traits.xcr0_settable and not self.try_xcr0(value):
            raise EngineError(f"KVM refuses XCR0 = {value:#x}")

    def code_written(self, mfn: int) -> None:
        """Nothing: the processor sees writes to code by itself."""

    def executable_mapped(self, mfn: int) -> None:
        """Nothing, likewise."""

    # --- the fast path --------------------------------------------------------------------------------

    def follow(self, modes: GuestModes | None) -> None:
        if self._fast_path is not None:
            self._fast_path.follow(modes)
        handler = modes.native_handler if modes is not None and self._native is not None else 0
        self._shared.handler = handler
        self._shared.vcpu = modes.address if modes is not None and handler else 0

    def _info_moved(self) -> None:
        """An entry of the area changed, which this vCPU alone uses: have KVM drop all it knows of its table."""
        if self._shared.shadows:
            self._rewrite_apart([], [self._pages.info_table])
        else:
            self._shared.flush = True

    def _leave_fast_path(self, stopped_in_it: bool) -> int | None:
        """The guest has stopped, its registers are in the register file: take over what the fast path did.

        `stopped_in_it`: it was in its code.  The trap that the stop counts as: TRAP_SYSCALL, TRAP_NOTHING or None.
        """
        fast_path, run_q = self._fast_path, self._run_q
        assert fast_path is not None
        l4_mfn = run_q[_RUN_CR3] >> PAGE_SHIFT
        trap = None
        if stopped_in_it:
            l4_mfn, trap = fast_path.roll_back(l4_mfn)
            self.regs[RFLAGS] = self.regs[RFLAGS] & ENTRY_FLAGS | ALWAYS_SET
            run_q[_RUN_CR3] = l4_mfn << PAGE_SHIFT
        kernel_mode = fast_path.leave(l4_mfn)
        if kernel_mode is not None:
            self._shared.l4_mfn = l4_mfn
            self._shared.user = not kernel_mode
        return trap

    # --- ticks ----------------------------------------------------------------------------------------

    def set_timer(self, first: int, length: int) -> None:
        """An interrupt in `first` ns and then every `length` ns, where the engine `has_ticks`; off if `length` is 0."""
        for register, value in ((api.LAPIC_INITIAL_COUNT, length), (api.LAPIC_CURRENT_COUNT, first)):
            pack_into("<I", self._lapic, register, value)
        ioctl(self._fd, api.KVM_SET_LAPIC, self._lapic)

    def _stop_ticks(self) -> None:
        """The guest has stopped: no interrupt of the local timer may be left."""
        assert self._fast_path is not None
        self._shared.ticking = False
        self.set_timer(0, 0)
        self._run[_RUN_INTERRUPTS] = bytes(_RUN_INTERRUPTS.stop - _RUN_INTERRUPTS.start)
        if self._run[_RUN_EVENTS][api.EVENTS_INTERRUPT_INJECTED]:
            self._clear_events(api.EVENTS_INTERRUPT_INJECTED)
        self._fast_path.stop_ticks()

    def _tick(self, on_trap: TrapHandler) -> bool:
        """The local timer has interrupted something that is not for the fast path; the registers are in the file."""
        _, rip, selector, flags, rsp, _ = self._pages.frame
        regs = self.regs
        if not selector & 3:
            if rip & _PAGE != area.SYSCALL_PAGE:
                raise EngineError(f"a tick in the engine's own code at {rip:#x}")
            regs[RIP], regs[RSP], regs[RFLAGS] = regs[RCX], rsp, regs[R11] & ENTRY_FLAGS | ALWAYS_SET
            self._leave_fast_path(False)
            return on_trap(TRAP_SYSCALL, 0, 0)
        regs[RIP], regs[RSP], regs[RFLAGS] = rip, rsp, flags & ENTRY_FLAGS | ALWAYS_SET
        if selector != self._hardware_cs:
            self._code_segment_changed(selector)
        trap = self._leave_fast_path(rip & _PAGE == self._syscall_page)
        return on_trap(TRAP_NOTHING if trap is None else trap, 0, 0)

    # --- running ------------------------------------------------------------------------------------

    def run(self, on_trap: TrapHandler) -> None:
        self._enter_thread()
        try:
            if self._shared.kicked:
                self._shared.kicked = False
                return
            self._loop(on_trap)
        finally:
            with self._kick_lock:
                self._running_thread = None

    def _loop(self, on_trap: TrapHandler) -> None:
        regs, file = self.regs, self._file
        run, run_q, run_d, run_h = self._run, self._run_q, self._run_d, self._run_h
        frame = self._pages.frame
        rewritten = self._engine.changes.rewritten
        fast_path, syscall_page = self._fast_path, self._syscall_page
        fd, native, shared = self._fd, self._native, self._shared
        shared_address = ctypes.addressof(shared)
        unpack_first, pack_first = _FIRST.unpack_from, _FIRST.pack_into
        unpack_selectors = _SELECTORS.unpack_from
        while True:
            if shared.rewriting:
                rewritten[shared.number], shared.rewriting = shared.rewriting, 0
            if fast_path is not None:
                fast_path.enter()
            rip = regs[RIP]
            if 0x0000_8000_0000_0000 <= rip < 0xFFFF_8000_0000_0000:
                # No processor can go there; the jump, or the return, faults.
                if not on_trap(VECTOR_GP, 0, 0):
                    return
                continue
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi = unpack_first(file)
            pack_first(run, _RUN_FIRST, rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp)
            run_q[_RUN_R8 : _RUN_R8 + 8] = regs[R8 : R15 + 1]
            run_q[_RUN_RIP] = rip
            run_q[_RUN_RFLAGS] = regs[RFLAGS]
            run_q[_RUN_FS_BASE] = regs[FS_BASE]
            run_q[_RUN_GS_BASE] = regs[GS_BASE]
            run[_RUN_CS] = self._cs
            run[_RUN_SS] = self._ss
            if shared.flush:
                self._divert_to_stubs()
            run_q[_RUN_DIRTY] = api.KVM_SYNC_X86_REGS | api.KVM_SYNC_X86_SREGS
            status = native.run(shared_address) if native is not None and shared.vcpu else run_ioctl(fd, api.KVM_RUN, 0)
            if shared.ticking:
                self._stop_ticks()
            if status > native_run.RAN:
                if status == native_run.TRAPPED:
                    more = on_trap(shared.vector, shared.error_code, shared.address)
                elif status == native_run.LOOK_NOW:
                    more = on_trap(TRAP_NOTHING, 0, 0)
                else:
                    more = status == native_run.AGAIN
                if shared.kicked:
                    shared.kicked = False
                    return
                if not more:
                    return
                continue
            if status:
                if self._interrupted():
                    if self._shared.kicked:
                        self._shared.kicked = False
                        return
                    if fast_path is not None and fast_path.timer_told:
                        fast_path.timer_told = False
                        if not on_trap(TRAP_NOTHING, 0, 0):
                            return
                    continue
            elif run_d[_RUN_EXIT_REASON] != api.KVM_EXIT_IO:
                self._unexpected_exit()
                if fast_path is not None:
                    self._leave_fast_path(False)
                if not on_trap(VECTOR_UD, 0, 0):
                    return
                continue

            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp = unpack_first(run, _RUN_FIRST)
            regs[R8 : R15 + 1] = run_q[_RUN_R8 : _RUN_R8 + 8]
            regs[FS_BASE] = run_q[_RUN_FS_BASE]
            regs[GS_BASE] = run_q[_RUN_GS_BASE]
            if unpack_selectors(run, _RUN_SELECTORS) != self._selectors:
                self._selectors_changed()
            vector = run_h[_RUN_PORT]
            if vector < area.TRAP_VECTORS:
                error_code, rip, selector, regs[RFLAGS], rsp, _ = frame
                regs[RIP] = rip
                pack_first(file, 0, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi)
                trap = None if fast_path is None else self._leave_fast_path(rip & _PAGE == syscall_page)
                if trap is not None:
                    more = on_trap(trap, 0, 0)
                elif vector == VECTOR_PF:
                    more = on_trap(VECTOR_PF, error_code, run_q[_RUN_CR2])
                else:
                    more = self._exception(on_trap, vector, error_code, selector)
            else:
                pack_first(file, 0, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi)
                if vector == area.PORT_SYSCALL and run_q[_RUN_RIP] & _PAGE == syscall_page:
                    if self._cs is not _FLAT_CODE:
                        self._code_segment_changed(area.USER_CODE64)
                    trap = TRAP_SYSCALL
                    if fast_path is None:
                        regs[RIP] = rcx
                        regs[RFLAGS] = run_q[_RUN_R8 + 3] & ENTRY_FLAGS | ALWAYS_SET
                    else:
                        regs[RIP] = run_q[_RUN_RIP]
                        trap = self._leave_fast_path(True) or TRAP_NOTHING
                    more = on_trap(trap, 0, 0)
                elif vector == area.PORT_TICK and not run[_RUN_CPL] & 3:
                    more = self._tick(on_trap)
                else:
                    if fast_path is not None:
                        self._leave_fast_path(False)
                    more = self._other_port(on_trap, vector)
            if not more:
                return
            if self._shared.kicked:
                self._shared.kicked = False
                return

    # --- entering by way of the stubs -----------------------------------------------------------------

    def _divert_to_stubs(self) -> None:
        """Make the entry that kvm_run holds go through the stubs that forget translations first."""
        run_q, stubs, shared = self._run_q, self._stubs, self._shared
        shared.flush = False
        if shared.shadows:  # KVM's shadow follows the tables, but for the entries that are noted
            noted, entries, tables = self._engine.changes.pending()
            while len(entries) > stubs.MOST or len(tables) > stubs.MOST:
                self._rewrite_apart(entries[: stubs.MOST], tables[: stubs.MOST])
                del entries[: stubs.MOST], tables[: stubs.MOST]
            pieces = self._rewriting(entries, tables)
            shared.rewriting = noted
        else:
            pieces = [(stubs.flush, [run_q[_RUN_CR3]])]
        if not pieces:
            return
        frame = [run_q[_RUN_RIP], area.USER_CODE64, run_q[_RUN_RFLAGS], run_q[_RUN_RSP], area.USER_DATA]
        if self._cs is not _FLAT_CODE:  # IRETQ would look for a descriptor
            saved = bytes(self._run[_RUN_GUEST])
            self._start_stubs(pieces + [(stubs.done, [])])
            self._run_stubs()
            self._run[_RUN_GUEST] = saved
            return
        self._start_stubs(pieces + [(stubs.go, [run_q[_RUN_RDI], *frame])])

    def _rewriting(self, entries: list[int], tables: list[int]) -> list[tuple[int, list[int]]]:
        """What rewrites these entries and whole tables, as stubs and their operands."""
        pieces, stubs = [], self._stubs
        if tables:
            pieces.append((stubs.rewrite_tables(len(tables)), [area.ALIAS + (mfn << PAGE_SHIFT) + 1 for mfn in tables]))
        if entries:
            pieces.append((stubs.rewrite_entries(len(entries)), [area.ALIAS + (index << 3) for index in entries]))
        return pieces

    def _start_stubs(self, pieces: list[tuple[int, list[int]]]) -> None:
        """Write the list and point the virtual processor at its first piece."""
        run_q = self._run_q
        run_q[_RUN_RIP], words = pieces[0]
        words = list(words)
        for stub, operands in pieces[1:]:
            words.append(stub)
            words += operands
        self._pages.list[: len(words)] = array("Q", words)
        run_q[_RUN_RSP] = self._pages.list_va
        run_q[_RUN_RFLAGS] = EFLAGS_RESERVED_ONE
        self._run[_RUN_CS] = _CODE0
        self._run[_RUN_SS] = _DATA0

    def _rewrite_apart(self, entries: list[int], tables: list[int]) -> None:
        """Rewrite these in an entry of its own; what kvm_run holds of the guest stays."""
        saved = bytes(self._run[_RUN_GUEST])
        self._start_stubs(self._rewriting(entries, tables) + [(self._stubs.done, [])])
        self._run_stubs()
        self._run[_RUN_GUEST] = saved

    def _run_stubs(self, done: int = area.PORT_ENTRY_DONE) -> None:
        """Run the stubs until they say, by this port, that they are done."""
        run_q = self._run_q
        run_q[_RUN_DIRTY] = api.KVM_SYNC_X86_REGS | api.KVM_SYNC_X86_SREGS
        while run_ioctl(self._fd, api.KVM_RUN, 0):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise EngineError(f"KVM_RUN failed: {os.strerror(number)}")
            while signal.sigtimedwait((KICK_SIGNAL,), 0):
                self._interrupted_in_stubs = True
            run_q[_RUN_DIRTY] = 0
        if self._run_d[_RUN_EXIT_REASON] != api.KVM_EXIT_IO or self._run_h[_RUN_PORT] != done:
            raise EngineError(
                f"the engine's entry code stopped at {run_q[_RUN_RIP]:#x}, {self._run_d[_RUN_EXIT_REASON]}"
            )
        if self._interrupted_in_stubs:
            self._interrupted_in_stubs = False
            signal.pthread_kill(threading.get_ident(), KICK_SIGNAL)

    def take_selectors(self) -> None:
        """Find out which data-segment selectors guest code has loaded by itself, and leave null ones behind.

        For a vCPU that goes elsewhere, where KVM does not tell (`traits.keeps_selectors`): guest code could load
        and unload the flat segment that hardware has, unseen.  A Linux kernel does when a program starts, with a
        hypercall in between, and it forgets the FS base of a program whose selector is not null.
        """
        traits = self._engine.traits
        if traits.keeps_selectors or traits.syscall_cpl != 3:
            return
        run_q = self._run_q
        saved = bytes(self._run[_RUN_GUEST])
        run_q[_RUN_RIP] = area.HypervisorArea.TAKE_SELECTORS
        run_q[_RUN_RFLAGS] = ALWAYS_SET
        self._run[_RUN_CS] = _FLAT_CODE
        self._run[_RUN_SS] = _FLAT_STACK
        self._run_stubs(area.PORT_SYSCALL)
        rax, rbx, rcx, rdx = run_q[_RUN_FIRST // 8 : _RUN_FIRST // 8 + 4]
        self._run[_RUN_GUEST] = saved
        for index, selector in ((FS, rax), (GS, rcx), (DS, rdx), (ES, rbx)):
            if selector & 0xFFFC or self.regs[index] & 0xFFFC == area.USER_DATA & 0xFFFC:
                self.regs[index] = selector & 0xFFFF

    # --- rare exits -----------------------------------------------------------------------------------

    def _exception(self, on_trap: TrapHandler, vector: int, error_code: int, selector: int) -> bool:
        """An exception other than a page fault; `selector` is the hardware CS it came from."""
        if not selector & 3:
            raise EngineError(f"exception {vector} (error code {error_code:#x}) in the engine's own entry code")
        if selector != self._hardware_cs:
            self._code_segment_changed(selector)
        regs = self.regs
        if vector == VECTOR_UD:
            vector, error_code = self._undefined_opcode()
        elif vector == VECTOR_GP and error_code & ~7 and not error_code & _ERROR_IDT:
            va = self._descriptor_va(error_code)
            if va is not None and self.read_memory(va, 8) is None:
                return on_trap(VECTOR_PF, 0, va)  # the processor's own read of the table
            if segment_loads.carry_out(self):
                return True
        address = 0
        if vector in (VECTOR_BP, VECTOR_OF):
            self._forget_vector()
        if vector == VECTOR_DB:
            registers = bytearray(api.DEBUGREGS.size)
            ioctl(self._fd, api.KVM_GET_DEBUGREGS, registers)
            address = self._debug[6] = api.DEBUGREGS.unpack(registers)[4]
            regs[RFLAGS] &= ~EFLAGS_RF
        return on_trap(vector, error_code if vector in _WITH_ERROR_CODE else 0, address)

    def _undefined_opcode(self) -> tuple[int, int]:
        """What a #UD really is: some hosts raise it for INT n and, in compatibility mode, INT3 and INTO."""
        regs = self.regs
        code = self.fetch(2)
        if code[:1] == b"\xcc" and self._cs is not _FLAT_CODE:
            regs[RIP] = advanced(regs[RIP], 1)
            return VECTOR_BP, 0
        if code[:1] == b"\xce" and self._cs is not _FLAT_CODE:
            if regs[RFLAGS] & EFLAGS_OF:
                regs[RIP] = advanced(regs[RIP], 1)
                return VECTOR_OF, 0
        elif code[:1] == b"\xcd" and len(code) == 2:
            if code[1] in (VECTOR_BP, VECTOR_OF):
                regs[RIP] = advanced(regs[RIP], 2)
                return code[1], 0
            return VECTOR_GP, code[1] << 3 | _ERROR_IDT
        return VECTOR_UD, 0

    def _other_port(self, on_trap: TrapHandler, port: int) -> bool:
        """An OUT of no trap stub: SYSCALL from compatibility mode, or the guest's own, to the one port it can reach."""
        regs, run_q = self.regs, self._run_q
        rip = run_q[_RUN_RIP]
        flags = run_q[_RUN_RFLAGS]
        if self._run[_RUN_CPL] & 3 == 0:
            if port not in (area.PORT_SYSCALL32, area.PORT_SYSCALL):
                raise EngineError(f"the engine's own code at {rip:#x} wrote to port {port:#x}")
            regs[RIP] = regs[RCX]
            regs[RFLAGS] = regs[R11] & ENTRY_FLAGS | ALWAYS_SET
            return on_trap(TRAP_SYSCALL, 0, 0)
        rax = regs[RAX]
        if self._run[api.RUN_DETAIL] == _DIRECTION_IN:  # the kernel wants to finish the instruction first
            self._finish_io()
        regs[RAX] = rax
        regs[RIP] = self._start_of_io(rip)
        regs[RFLAGS] = flags & ENTRY_FLAGS | ALWAYS_SET
        return on_trap(VECTOR_GP, 0, 0)

    def _finish_io(self) -> None:
        """Let the kernel complete an IN whose result nobody wants, without executing anything more."""
        self._run[api.RUN_IMMEDIATE_EXIT] = 1
        self._run_q[_RUN_DIRTY] = 0
        run_ioctl(self._fd, api.KVM_RUN, 0)
        self._run[api.RUN_IMMEDIATE_EXIT] = 0

    def _start_of_io(self, rip: int) -> int:
        """The address of the I/O instruction that ends at `rip` (or starts there, where KVM has not advanced RIP)."""
        read, l4_mfn = page_walk.read, self.l4_mfn
        last = read(self._memory, l4_mfn, rip - 1 & _MASK64, 1) or b"\0"
        if last in _IO_BY_DX:
            return advanced(rip, -1)
        before = read(self._memory, l4_mfn, rip - 2 & _MASK64, 1) or b"\0"
        if before[0] & 0xFC == 0xE4 and last[0] == area.PORT_SYSCALL:
            return advanced(rip, -2)
        return rip

    def _interrupted(self) -> bool:
        """KVM_RUN was interrupted. True: the guest's state is in the register file; False: a trap came up meanwhile.

        A trap that is half delivered must be finished first: an exception that KVM holds queued would hit whatever
        code runs next, and inside a stub the registers are the stub's.
        """
        run_q = self._run_q
        while True:
            number = ctypes.get_errno()
            if number not in (errno.EINTR, errno.EAGAIN):
                raise EngineError(f"KVM_RUN failed: {os.strerror(number)}")
            while signal.sigtimedwait((KICK_SIGNAL,), 0):
                pass
            self._shared.look = 0  # one may have been the alarm, before the guest had set its timer
            if self._fast_path is not None and self._interrupted_in_fast_path():
                return True
            in_stub = self._run[_RUN_CPL] & 3 == 0 or run_q[_RUN_RIP] & _PAGE in (area.SYSCALL_PAGE, self._syscall_page)
            queued = in_stub or self._exception_queued()
            if queued is False:
                self._read_registers()
                if self._fast_path is not None:
                    self._leave_fast_path(False)
                return True
            if queued is None or run_q[_RUN_RIP] & _PAGE == area.ENTRY_STUBS:
                threading.Timer(LOOK_AGAIN, self._interrupt).start()  # it may go on in guest code without a trap
            run_q[_RUN_DIRTY] = 0
            if not run_ioctl(self._fd, api.KVM_RUN, 0):
                if self._run_d[_RUN_EXIT_REASON] == api.KVM_EXIT_IO:
                    return False
                self._unexpected_exit()

    def _interrupted_in_fast_path(self) -> bool:
        """If it was: it is as if it had been interrupted before its SYSCALL, or behind its return."""
        fast_path, run, run_q, regs = self._fast_path, self._run, self._run_q, self.regs
        assert fast_path is not None
        rip = run_q[_RUN_RIP]
        if run[_RUN_CPL] & 3 == 0:
            if rip & _PAGE != area.GATES:
                return False
            self._read_general_registers()
            l4_mfn = fast_path.finish_gate(rip)
            if l4_mfn is None:
                return False
            regs[RFLAGS] = regs[RFLAGS] & ENTRY_FLAGS | ALWAYS_SET
            run_q[_RUN_CR3] = l4_mfn << PAGE_SHIFT
        elif rip & _PAGE != self._syscall_page:
            return False
        else:
            self._forget_exception()  # of an instruction that counts as not executed
            self._read_registers()
        if self._leave_fast_path(regs[RIP] & _PAGE == self._syscall_page) == TRAP_SYSCALL:
            regs[RIP] = regs[RIP] - 2 & _MASK64
        return True

    def _exception_queued(self) -> bool | None:
        """Whether KVM holds an exception that it has not delivered; None: it may.

        It does not own up to a queued #BP or #OF (api.rst: they are expected to happen again, which they do not, with
        RIP after the instruction), but the number is there; `_forget_vector` takes it away after each delivery.  A
        gate of the fast path leaves it, too; then only the next interruption can tell.
        """
        events = self._run[_RUN_EVENTS]
        queued = events[api.EVENTS_EXCEPTION_INJECTED] or events[api.EVENTS_EXCEPTION_PENDING]
        if queued or events[api.EVENTS_EXCEPTION_VECTOR] not in (VECTOR_BP, VECTOR_OF):
            return bool(queued)
        if self._fast_path is None:
            return True
        return None if self._may_be_breakpoint(self._run_q[_RUN_RIP]) else False

    def _may_be_breakpoint(self, rip: int) -> bool:
        """Whether the instruction that ends at `rip` may have been one that raises #BP or #OF."""
        l4_mfn = self._run_q[_RUN_CR3] >> PAGE_SHIFT
        before, last = (page_walk.read(self._memory, l4_mfn, rip - back & _MASK64, 1) for back in (2, 1))
        if last in (None, _INT3) or (last == _INTO and self._cs is not _FLAT_CODE):
            return True
        return last in (bytes((VECTOR_BP,)), bytes((VECTOR_OF,))) and before in (None, _INT_N)

    def _forget_vector(self) -> None:
        """Clear KVM's memory of the last exception's number."""
        self._clear_events(api.EVENTS_EXCEPTION_VECTOR)

    def _forget_exception(self) -> None:
        """Take back an exception that KVM holds queued."""
        self._clear_events(api.EVENTS_EXCEPTION_INJECTED, api.EVENTS_EXCEPTION_PENDING, api.EVENTS_EXCEPTION_VECTOR)

    def _clear_events(self, *offsets: int) -> None:
        """Clear these bytes of struct kvm_vcpu_events."""
        events = bytearray(api.VCPU_EVENTS_SIZE)
        ioctl(self._fd, api.KVM_GET_VCPU_EVENTS, events)
        for offset in offsets:
            events[offset] = 0
        ioctl(self._fd, api.KVM_SET_VCPU_EVENTS, events)

    def _read_registers(self) -> None:
        """Everything from kvm_run to the register file, where guest code itself was interrupted."""
        self._read_general_registers()
        selector = unpack_from("<H", self._run, api.RUN_SREGS + api.SREGS_CS + 12)[0]
        if selector != self._hardware_cs:
            self._code_segment_changed(selector)

    def _read_general_registers(self) -> None:
        regs, run, run_q = self.regs, self._run, self._run_q
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp = _FIRST.unpack_from(run, _RUN_FIRST)
        _FIRST.pack_into(self._file, 0, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi)
        regs[R8 : RFLAGS + 1] = run_q[_RUN_R8 : _RUN_RFLAGS + 1]
        regs[RFLAGS] = regs[RFLAGS] & ENTRY_FLAGS | ALWAYS_SET
        regs[FS_BASE] = run_q[_RUN_FS_BASE]
        regs[GS_BASE] = run_q[_RUN_GS_BASE]
        if _SELECTORS.unpack_from(run, _RUN_SELECTORS) != self._selectors:
            self._selectors_changed()

    def _unexpected_exit(self) -> None:
        """An exit that no stub asked for: EngineError, or guest code that KVM cannot emulate, which counts as #UD."""
        reason = self._run_d[_RUN_EXIT_REASON]
        if self._run[_RUN_CPL] & 3 == 3 and reason == api.KVM_EXIT_INTERNAL_ERROR:
            self._read_registers()
            return
        first, second = unpack_from("<QQ", self._run, api.RUN_DETAIL)
        name = api.EXIT_NAMES.get(reason, "?")
        rip = self._run_q[_RUN_RIP]
        raise EngineError(f"KVM stopped for reason {reason} ({name}; {first:#x} {second:#x}) at {rip:#x}")

    # --- segments -------------------------------------------------------------------------------------

    @property
    def _hardware_cs(self) -> int:
        return area.USER_CODE64 if self._cs is _FLAT_CODE else area.USER_CODE32

    @property
    def cpl_at_exit(self) -> int:
        """The privilege level at which the virtual processor left guest code last."""
        return self._run[_RUN_CPL] & 3

    @property
    def runs_64_bit_code(self) -> bool:
        return self._cs is _FLAT_CODE

    def read_memory(self, va: int, size: int) -> bytes | None:
        """Guest memory at a linear address; None where it is not mapped."""
        return page_walk.read(self._memory, self.l4_mfn, va, size)

    def fetch(self, size: int) -> bytes:
        """Up to `size` bytes of code at RIP."""
        rip = self.regs[RIP] + (0 if self._cs is _FLAT_CODE else self.regs[CS + SEGMENT_BASE])
        for length in (size, 0x1000 - (rip & 0xFFF)):
            code = page_walk.read(self._memory, self.l4_mfn, rip, min(length, size))
            if code is not None:
                return code
        return b""

    def _descriptor_va(self, selector: int) -> int | None:
        """Where the descriptor of a selector lies; None if that is outside of its table."""
        va, limit = self._ldt if selector & segments.SELECTOR_TI else self._gdt
        offset = selector & 0xFFF8
        return va + offset if va and offset + 7 <= limit else None

    def _descriptor(self, selector: int) -> bytes | None:
        va = self._descriptor_va(selector)
        return None if va is None else self.read_memory(va, 8)

    def load_selector(self, segment: int, selector: int) -> None:
        """Like `set_segment`, but a register that cannot be loaded stays as it is."""
        self._write_segment(segment, selector, segments.data_segment(selector, self._descriptor))

    def _write_segment(self, index: int, selector: int, segment: Segment) -> None:
        regs = self.regs
        regs[index] = selector
        regs[index + 1] = segment.base
        regs[index + 2] = segment.limit | segment.flags << 32
        image = _image(segment, selector) if selector & ~3 else _NULL_IMAGE
        start = api.RUN_SREGS + _SEGMENT_OFFSETS[index]
        self._run[start : start + len(image)] = image
        self._note_selectors()

    def _load_code_stack(self, cs: int, ss: int) -> None:
        """For `load`: Xen's flat pair where the saved selectors are no good any more."""
        try:
            self.set_code_stack(cs | 3, ss)
        except ValueError:
            self.set_code_stack(layout.FLAT_RING3_CS64, layout.FLAT_RING3_SS64)

    def _selectors_changed(self) -> None:
        """Guest code loaded a segment register by itself: a null selector, or the flat one that hardware has."""
        for index in _DATA_SEGMENTS:
            start = api.RUN_SREGS + _SEGMENT_OFFSETS[index]
            base, limit, selector, *_ = api.SEGMENT.unpack_from(self._run, start)
            if selector != self.regs[index] & 0xFFFF:
                self.regs[index] = selector
                self.regs[index + 1] = base
                self.regs[index + 2] = limit
        self._note_selectors()

    def _note_selectors(self) -> None:
        self._selectors = _SELECTORS.unpack_from(self._run, _RUN_SELECTORS)
        self._shared.selectors[:] = self._selectors

    def _code_segment_changed(self, selector: int) -> None:
        """Guest code loaded CS by itself, by a far jump between the hardware's own 64-bit and 32-bit segments."""
        flags = FLAT_CODE64 if selector == area.USER_CODE64 else FLAT_CODE32
        code = Segment(0, 0xFFFF_FFFF, flags)
        if selector == area.USER_CODE64:
            self._cs, self._ss = _FLAT_CODE, _FLAT_STACK
        else:
            self._cs = _image(code, area.USER_CODE32)
            self._ss = _FLAT_STACK
        self._shared.flat = self._cs is _FLAT_CODE
        self.regs[CS] = selector
        self.regs[CS + 1] = 0
        self.regs[CS + 2] = code.limit | flags << 32

    # --- state outside of kvm_run -----------------------------------------------------------------------

    def _set_up(self) -> None:
        """Bring the virtual processor into long mode, on the hypervisor area."""
        engine = self._engine
        ioctl(self._fd, api.KVM_SET_CPUID2, engine.cpuid_table())
        cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
        if engine.kvm_xsave:
            cr4 |= CR4_OSXSAVE
        sregs = bytearray(api.SREGS_SIZE)
        ioctl(self._fd, api.KVM_GET_SREGS, sregs)
        for offset in _SEGMENT_OFFSETS.values():
            sregs[offset : offset + api.SEGMENT.size] = _NULL_IMAGE
        pack = api.SEGMENT.pack_into
        pack(sregs, api.SREGS_CS, *api.SEGMENT.unpack(_FLAT_CODE))
        pack(sregs, api.SREGS_SS, *api.SEGMENT.unpack(_FLAT_STACK))
        pack(sregs, api.SREGS_TR, self._pages.tss_va, area.TSS_LIMIT, area.TSS_SELECTOR, 0xB, 1, 0, 0, 0, 0, 0, 0, 0)
        pack(sregs, api.SREGS_LDT, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1)
        api.DTABLE.pack_into(sregs, api.SREGS_GDT, area.GDT, area.GDT_LIMIT)
        api.DTABLE.pack_into(sregs, api.SREGS_IDT, area.IDT, area.IDT_LIMIT)
        for offset, value in (
            (api.SREGS_CR0, _CR0),
            (api.SREGS_CR3, 0),
            (api.SREGS_CR4, cr4),
            (api.SREGS_EFER, _EFER),
        ):
            pack_into("<Q", sregs, offset, value)
        if engine.has_ticks:  # guests must not find the local APIC in memory, whatever frames they have
            (base,) = unpack_from("<Q", sregs, api.SREGS_APIC_BASE)
            pack_into("<Q", sregs, api.SREGS_APIC_BASE, base | api.X2APIC)
        try:
            ioctl(self._fd, api.KVM_SET_SREGS, sregs)
        except OSError as error:
            raise EngineError(f"KVM refuses the processor state of a 64-bit guest: {error.strerror}") from error
        self._run[api.RUN_SREGS : api.RUN_SREGS + api.SREGS_SIZE] = sregs
        self._note_selectors()
        self._run_q[api.RUN_VALID_REGS // 8] = api.KVM_SYNC_X86_REGS | api.KVM_SYNC_X86_SREGS | api.KVM_SYNC_X86_EVENTS
        # STAR: SYSCALL loads CS and SS from bits 47..32; SYSRET is never executed.
        flags_cleared = EFLAGS_TF | EFLAGS_DF | EFLAGS_IOPL | EFLAGS_NT | EFLAGS_AC
        if self._fast_path is None:  # which is at CPL 3 and cannot set it again: the local timer would stay silent
            flags_cleared |= EFLAGS_IF
        entries = (
            (MSR_STAR, area.CODE0 << 32 | area.USER_CODE32 << 48),
            (_MSR_LSTAR, self._syscall_page),
            (_MSR_CSTAR, area.HypervisorArea.SYSCALL32_STUB),
            (_MSR_SFMASK, flags_cleared),
        )
        table = api.MSRS_HEADER.pack(len(entries), 0)
        table += b"".join(api.MSR_ENTRY.pack(index, 0, value) for index, value in entries)
        if ioctl(self._fd, api.KVM_SET_MSRS, bytearray(table)) != len(entries):
            raise EngineError("KVM refuses the system-call registers of a 64-bit guest")

    def _set_up_ticks(self) -> None:
        """Bring the local APIC into the state in which start_ticks of run.c needs to set but times."""
        fd, lapic = self._fd, self._lapic
        ioctl(fd, api.KVM_SET_MP_STATE, bytearray(4))  # runs: only vCPU 0 does by itself
        ioctl(fd, api.KVM_GET_LAPIC, lapic)
        for register, value in (
            (api.LAPIC_SPURIOUS, api.LAPIC_ENABLED),
            (api.LAPIC_TIMER, api.LAPIC_PERIODIC | area.VECTOR_TICK),
            (api.LAPIC_DIVIDE, api.LAPIC_DIVIDE_BY_1),
        ):
            pack_into("<I", lapic, register, value)
        self.set_timer(0, 0)
        self._shared.lapic = buffer_address(lapic)

    def _load_debug(self) -> None:
        db0, db1, db2, db3, _, _, dr6, dr7 = self._debug
        registers = api.DEBUGREGS.pack(db0, db1, db2, db3, dr6 or 0xFFFF_0FF0, dr7 or 0x400, 0)
        ioctl(self._fd, api.KVM_SET_DEBUGREGS, bytearray(registers))

    def _load_extended(self, state: CpuState) -> None:
        """The XSAVE image: x87, SSE and what else the host has."""
        image = bytearray(api.XSAVE_SIZE)
        image[: len(state.xsave)] = state.xsave
        (components,) = unpack_from("<Q", image, _XSTATE_BV)
        unknown = components & ~self._engine.xcr0_mask
        if unknown:
            raise EngineError(f"the vCPU has extended state that this host lacks (XSAVE components {unknown:#x})")
        ioctl(self._fd, api.KVM_SET_XSAVE, image)
        self.set_xcr0(state.xcr0)

    # --- threads --------------------------------------------------------------------------------------

    def kick(self) -> None:
        if self._shared.kicked:
            return
        self._shared.kicked = True
        self._interrupt()

    def _interrupt(self) -> None:
        with self._kick_lock:
            if self._running_thread is not None:
                signal.pthread_kill(self._running_thread, KICK_SIGNAL)

    def _enter_thread(self) -> None:
        """Make the calling thread the one that kicks go to.

        The signal stays blocked but inside KVM_RUN, so none is lost between a check and the entry: one that is
        pending makes KVM_RUN return at once.
        """
        thread = threading.get_ident()
        if not getattr(_thread, "blocks_kicks", False):
            signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
            _thread.blocks_kicks = True
        if thread != self._masked_for:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {KICK_SIGNAL}
            mask = sum(1 << number - 1 for number in blocked)
            ioctl(self._fd, api.KVM_SET_SIGNAL_MASK, bytearray(api.SIGNAL_MASK.pack(8, mask)))
            self._masked_for = thread
            if self._fast_path is not None:
                self._alarm.follow_thread()
                self._fast_path.alarm_is_off()
        with self._kick_lock:
            self._running_thread = thread

    def close(self) -> None:
        """Give the virtual processor back. It is not running."""
        self._run_q.release()
        self._run_d.release()
        self._run_h.release()
        self._run.release()
        self._map.close()
        os.close(self._fd)
        if self._fast_path is not None:
            self._alarm.close()


def _image(segment: Segment, selector: int) -> bytes:
    """A segment in the form of struct kvm_segment."""
    flags = segment.flags
    return api.SEGMENT.pack(
        segment.base,
        segment.limit,
        selector,
        flags >> 8 & 15,
        flags >> 15 & 1,
        flags >> 13 & 3,
        flags >> 22 & 1,
        flags >> 12 & 1,
        flags >> 21 & 1,
        flags >> 23 & 1,
        flags >> 20 & 1,
        0,
    )
