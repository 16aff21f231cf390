"""One virtual processor of KVM as an execution context (`Cpu` of the engine protocol).

The path of a trap: KVM_RUN returns with KVM_EXIT_IO because a stub of the hypervisor area executed OUT; the kernel
has left the general and system registers in the shared kvm_run page, the processor has left RIP, CS, RFLAGS and RSP on
the trap stack.  Both are read as plain memory into the register file, the trap handler runs, and the registers go back
the same way.  No ioctl but KVM_RUN takes part.

The loop is here, and what the protocol asks for; `entry` is the way in by the stubs, `exits` and `interruptions` are
the rarer ways out.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from xenolith.abi.x86 import (
    CR0_TS,
    CS,
    ES,
    FS_BASE,
    GS,
    GS_BASE,
    PAGE_SHIFT,
    PAGE_SIZE,
    RCX,
    RFLAGS,
    RIP,
    RSP,
    SEGMENT_BASE,
    SS,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
    advanced,
    is_canonical,
)
from xenolith.machine import page_walk
from xenolith.machine import segments as machine_segments
from xenolith.machine.engines import segment_loads
from xenolith.machine.engines.kvm import api, area, native_run, processor, run_page
from xenolith.machine.engines.kvm.alarm import Alarm
from xenolith.machine.engines.kvm.api import run_ioctl
from xenolith.machine.engines.kvm.changes import Changes
from xenolith.machine.engines.kvm.entry import Entry
from xenolith.machine.engines.kvm.exits import Exits
from xenolith.machine.engines.kvm.fast_path import FastPath
from xenolith.machine.engines.kvm.fast_path_code import NOTHING
from xenolith.machine.engines.kvm.interruptions import Interruptions
from xenolith.machine.engines.kvm.kicks import KICK_SIGNAL, Kicks
from xenolith.machine.engines.kvm.local_timer import LocalTimer
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.kvm.processor import DebugRegisters, ExtendedState
from xenolith.machine.engines.kvm.run_page import RunPage
from xenolith.machine.engines.kvm.segment_registers import (
    CODE0,
    DATA0,
    DATA_SEGMENTS,
    FLAT_CODE,
    FLAT_STACK,
    SegmentRegisters,
)
from xenolith.machine.engines.kvm.traits import Counter
from xenolith.machine.engines.kvm.vm import VirtualMachine
from xenolith.machine.engines.native_state import EngineCalls
from xenolith.machine.engines.protocol import (
    ALWAYS_SET,
    ENTRY_FLAGS,
    TRAP_NOTHING,
    TRAP_SYSCALL,
    Cpu,
    CpuState,
    EngineError,
    ModeSwitchState,
    TrapHandler,
    register_file,
)
from xenolith.machine.native import buffer_address
from xenolith.machine.operands import GuestFault, GuestView


class KvmCpu(Cpu):
    """A vCPU of KVM. See the engine protocol for the methods that are not explained here.

    `regs`: where to keep the register file; words that abi.x86 does not name are left alone.
    """

    def __init__(
        self,
        vm: VirtualMachine,
        hypervisor_area: area.HypervisorArea,
        changes: Changes,
        number: int,
        regs: memoryview | None = None,
    ) -> None:
        self._traits = vm.traits
        self._memory = vm.memory
        self._changes = changes
        self._pages = hypervisor_area.cpu_pages(number)
        self._fd = vm.create_vcpu(number)
        self.regs = register_file() if regs is None else regs
        self._page = RunPage(self._fd, vm.run_size, self.regs)
        self.get_rflags: Callable[[], int] = partial(self.regs.__getitem__, RFLAGS)
        self.set_rflags: Callable[[int], None] = self._set_rflags
        self._shared = shared = self._share(number, hypervisor_area)
        self._segments = SegmentRegisters(vm.memory, self.regs, self._page, shared)
        self._kicks = Kicks(self._fd, shared)
        self._debug = DebugRegisters(self._fd)
        self._extended = ExtendedState(self._fd, vm)
        self._entry = Entry(self._fd, self._page, self._pages, hypervisor_area.stubs, self._segments, changes, shared)
        self._native = native_run.library()
        self._calls = EngineCalls(regs=shared.regs, context=ctypes.addressof(shared))
        if self._native is not None:
            for name, address in self._native.calls.items():
                setattr(self._calls, name, address)
        self.calls = ctypes.addressof(self._calls) if self._native is not None else 0
        self._task_switched = False
        self.modes: ModeSwitchState | None = None
        self.kernels_far_transfers = 0
        if vm.traits.syscall_cpl == 3:
            self._pages.allow_syscall_port()
        self._fast_path: FastPath | None = None
        shared.syscall_page = area.SYSCALL_PAGE
        if hypervisor_area.has_views:
            self._alarm = Alarm(KICK_SIGNAL)
            self._fast_path = FastPath(
                vm.memory,
                self._pages,
                self.regs,
                self._page,
                hypervisor_area.has_view,
                self._entry.info_moved,
                self._alarm,
                shared,
            )
            shared.syscall_page = self._pages.code_va
        self._exits = Exits(
            self._fd, self, self._page, self._pages, self._segments, self._debug, self._fast_path, shared
        )
        self._interruptions = Interruptions(
            self._fd,
            vm.memory,
            hypervisor_area.bare_l4,
            self.regs,
            self._page,
            self._segments,
            shared,
            self._fast_path,
            self._kicks,
            self._exits.unexpected,
        )
        has_fast_path = self._fast_path is not None
        sregs = processor.set_up(self._fd, vm, self._pages.tss_va, shared.syscall_page, has_fast_path)
        self._page.b[api.RUN_SREGS : api.RUN_SREGS + api.SREGS_SIZE] = sregs
        self._page.q[api.RUN_VALID_REGS // 8] = run_page.WRITTEN | api.KVM_SYNC_X86_EVENTS
        self.tsc_offset = processor.set_counter(self._fd, vm.traits.counter)
        self._segments.note_selectors()
        self._timer = LocalTimer(self._fd, self._page, shared) if vm.has_ticks else None

    def _share(self, number: int, hypervisor_area: area.HypervisorArea) -> KvmFields:
        """The state that native code works on, too, and what ring 0 calls of it."""
        pages, stubs = self._pages, hypervisor_area.stubs
        shared = KvmFields(
            regs=buffer_address(self.regs),
            run=buffer_address(self._page.b),
            frame=buffer_address(pages.frame),
            list=buffer_address(pages.list),
            list_va=pages.list_va,
            memory=self._memory.address,
            memory_size=self._memory.size,
            changes=ctypes.addressof(self._changes),
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
            shadows=self._traits.shadows_page_tables,
        )
        shared.view_entries[:] = hypervisor_area.l4_entry, hypervisor_area.kernel_l4_entry
        shared.flat_code[:], shared.flat_stack[:] = FLAT_CODE, FLAT_STACK
        shared.code0[:], shared.data0[:] = CODE0, DATA0
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
        segments = self._segments
        self.regs[: RIP + 1] = state.regs[: RIP + 1]
        self.set_rflags(state.regs[RFLAGS])
        segments.gdt = (state.gdt_va, state.gdt_limit)
        segments.ldt = (state.ldt_va, state.ldt_limit)
        self.switch_mode(state.l4_mfn, state.user)
        for index in DATA_SEGMENTS:
            with suppress(ValueError):  # null then: the descriptor is gone
                self.set_segment(index, state.regs[index] & 0xFFFF)
        for base in (FS_BASE, GS_BASE):  # as WRMSR may have set them
            self.regs[base] = state.regs[base] if is_canonical(state.regs[base]) else 0
        segments.restore_code_stack(state.regs[CS] & 0xFFFF, state.regs[SS] & 0xFFFF)
        self.set_task_switched(state.task_switched)
        self._debug.load(state.debug)
        self._extended.load(state)
        self._shared.flush = True

    def store(self, state: CpuState) -> None:
        state.regs[: RFLAGS + 1] = self.regs[: RFLAGS + 1]
        state.regs[ES : GS + 3] = self.regs[ES : GS + 3]
        state.l4_mfn = self.l4_mfn
        state.user = self._shared.user
        state.task_switched = self._task_switched
        state.gdt_va, state.gdt_limit = self._segments.gdt
        state.ldt_va, state.ldt_limit = self._segments.ldt
        state.debug = self._debug.stored()
        state.xsave = self.extended_image()
        state.xcr0 = self._extended.xcr0

    def switch_mode(self, l4_mfn: int, user: bool) -> None:
        self._shared.l4_mfn = l4_mfn
        self._shared.user = user
        self._page.q[run_page.CR3] = l4_mfn << PAGE_SHIFT

    def flush_tlb(self) -> None:
        self._shared.flush = True

    def flush_page(self, va: int) -> None:
        self._shared.flush = True

    def set_segment(self, segment: int, selector: int) -> None:
        try:
            self._segments.load(segment, selector)
        except ValueError:
            self._segments.load_null(segment)
            raise

    def load_selector(self, segment: int, selector: int) -> None:
        """Like `set_segment`, but a register that cannot be loaded stays as it is."""
        self._segments.load(segment, selector)

    def set_code_stack(self, cs: int, ss: int) -> None:
        self._segments.load_code_stack(cs, ss)

    def set_task_switched(self, on: bool) -> None:
        self._task_switched = on
        self._page.q[run_page.CR0] = processor.CR0 | (CR0_TS if on else 0)

    def set_debug(self, number: int, value: int) -> None:
        self._debug.set(number, value)

    def set_ldt(self, va: int, limit: int) -> None:
        self._segments.ldt = (va, limit)

    def extended_image(self) -> bytearray:
        """The XSAVE image, in the standard format."""
        return self._extended.image()

    def try_xcr0(self, value: int) -> bool:
        """Whether KVM takes this XCR0."""
        return self._extended.try_xcr0(value)

    def try_counter(self, how: Counter) -> bool:
        """Whether the host can set the time stamp counter in this way; it did then."""
        try:
            self.tsc_offset = processor.set_counter(self._fd, how)
        except EngineError:
            return False
        return True

    def set_xcr0(self, value: int) -> None:
        self._extended.set_xcr0(value)

    def set_timer(self, first: int, length: int) -> None:
        """An interrupt in `first` ns and then every `length` ns, where the engine `has_ticks`; off if `length` is 0."""
        assert self._timer is not None
        self._timer.set(first, length)

    def take_selectors(self) -> None:
        """For a vCPU that goes elsewhere: find out which selectors guest code has loaded, where KVM does not tell."""
        if self._traits.syscall_cpl == 3 and not self._traits.keeps_selectors:
            self._entry.take_selectors(self.regs)

    def code_written(self, mfn: int) -> None:
        """Nothing: the processor sees writes to code by itself."""

    def executable_mapped(self, mfn: int) -> None:
        """Nothing, likewise."""

    def attach(self, modes: ModeSwitchState | None) -> None:
        self.modes = modes
        if self._fast_path is not None:
            self._fast_path.attach(modes)
        handler = modes.native_handler if modes is not None and self._native is not None else 0
        self._shared.handler = handler
        self._shared.vcpu = modes.address if modes is not None and handler else 0

    # --- what others may ask -----------------------------------------------------------------------------

    @property
    def cpl_at_exit(self) -> int:
        """The privilege level at which the virtual processor left guest code last."""
        return self._page.cpl

    @property
    def runs_64_bit_code(self) -> bool:
        return self._segments.is_flat

    def runs_pages_of_cpl3(self) -> bool:
        """Whether there is no SMEP: see Entry."""
        return self._entry.runs_pages_of_cpl3()

    def read_memory(self, va: int, size: int) -> bytes | None:
        """Guest memory at a linear address; None where it is not mapped."""
        return page_walk.read(self._memory, self.l4_mfn, va, size)

    @property
    def view(self) -> GuestView:
        return GuestView(self._memory, self.l4_mfn)

    def code_segment(self, selector: int) -> int:
        return machine_segments.code_segment(selector, self._segments.descriptor).flags

    def fetch(self, size: int) -> bytes:
        """Up to `size` bytes of code at RIP."""
        base = 0 if self._segments.is_flat else self.regs[CS + SEGMENT_BASE]
        try:
            return self.view.fetch(advanced(self.regs[RIP], base), size)
        except GuestFault:
            return b""

    def segment_loaded(self, on_trap: TrapHandler, done: segment_loads.Done) -> bool:
        """A segment register was loaded in the processor's stead: go on."""
        if done.far:
            segment_loads.note_far_transfer(self)
        if done.steps:
            return on_trap(*segment_loads.STEPPED)
        return on_trap(TRAP_NOTHING, 0, 0) if done.far else True

    # --- running ------------------------------------------------------------------------------------

    def kick(self) -> None:
        self._kicks.kick()

    def _enter_thread(self) -> None:
        """Make the calling thread the one that kicks and the alarm go to."""
        if self._kicks.enter_thread() and self._fast_path is not None:
            self._alarm.follow_thread()
            self._fast_path.alarm_is_off()

    def run(self, on_trap: TrapHandler) -> None:
        self._enter_thread()
        try:
            if not self._kicks.taken():
                self._loop(on_trap)
        finally:
            self._kicks.leave_thread()

    def _loop(self, on_trap: TrapHandler) -> None:
        page, segments, shared, fast_path = self._page, self._segments, self._shared, self._fast_path
        regs, b, q = self.regs, page.b, page.q
        rewritten = self._changes.rewritten
        fd, native, shared_address = self._fd, self._native, ctypes.addressof(shared)
        while True:
            if shared.rewriting:
                rewritten[shared.number], shared.rewriting = shared.rewriting, 0
            if fast_path is not None:
                fast_path.enter()
            if not is_canonical(regs[RIP]):
                # No processor can go there; the jump, or the return, faults.
                if not on_trap(VECTOR_GP, 0, 0):
                    return
                continue
            page.write_registers()
            b[run_page.CS_IMAGE] = segments.cs
            b[run_page.SS_IMAGE] = segments.ss
            if shared.flush:
                self._entry.divert()
            q[run_page.DIRTY] = run_page.WRITTEN
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
            elif status and self._interruptions.in_guest_code():
                if self._kicks.taken():
                    return
                more = not self._timer_told() or on_trap(TRAP_NOTHING, 0, 0)
            else:
                more = self._exit(on_trap)
            if not more or self._kicks.taken():
                return

    def _exit(self, on_trap: TrapHandler) -> bool:
        """KVM_RUN returned by itself: handle what kvm_run says."""
        page, segments, fast_path, regs = self._page, self._segments, self._fast_path, self.regs
        if page.d[run_page.EXIT_REASON] != api.KVM_EXIT_IO:
            self._exits.unexpected()
            if fast_path is not None:
                fast_path.take_over(False)
            return on_trap(VECTOR_UD, 0, 0)
        page.read_registers()
        segments.look_for_loads()
        port = page.h[run_page.PORT]
        if port < area.TRAP_VECTORS:
            error_code, rip, selector, regs[RFLAGS], regs[RSP], _ = self._pages.frames[port]
            regs[RIP] = rip
            if not selector & 3:
                return self._exits.at_cpl0(on_trap, port, error_code)
            in_fast_path = fast_path is not None and fast_path.contains(rip)
            trap = None if fast_path is None else fast_path.take_over(in_fast_path)
            if in_fast_path and (trap is not None or port != VECTOR_DB):  # no guest's: it goes on elsewhere
                return on_trap(trap or TRAP_NOTHING, 0, 0)
            if port == VECTOR_PF:
                return on_trap(VECTOR_PF, error_code, page.q[run_page.CR2])
            return self._exits.exception(on_trap, port, error_code, selector)
        rip = page.q[run_page.WORD_RIP]
        if port == area.PORT_SYSCALL and rip & -PAGE_SIZE == self._shared.syscall_page:
            segments.look_for_far_jump(area.USER_CODE64)
            if fast_path is None:
                regs[RIP] = regs[RCX]
                regs[RFLAGS] = page.q[run_page.WORD_R11] & ENTRY_FLAGS | ALWAYS_SET
                return on_trap(TRAP_SYSCALL, 0, 0)
            regs[RIP] = rip
            return on_trap(fast_path.take_over(True) or TRAP_NOTHING, 0, 0)
        if port == area.PORT_TICK and page.cpl == 0:
            return self._exits.tick(on_trap)
        if fast_path is not None:
            fast_path.take_over(False)
        return self._exits.other_port(on_trap, port)

    def _timer_told(self) -> bool:
        """Whether the fast path has told the hypervisor of a timer since this was last asked."""
        fast_path = self._fast_path
        told = fast_path is not None and fast_path.timer_told
        if told and fast_path is not None:
            fast_path.timer_told = False
        return told

    def _stop_ticks(self) -> None:
        assert self._timer is not None and self._fast_path is not None
        self._timer.stop()
        self._fast_path.stop_ticks()

    def close(self) -> None:
        """Give the virtual processor back. It is not running."""
        self._page.close()
        os.close(self._fd)
        if self._fast_path is not None:
            self._alarm.close()
