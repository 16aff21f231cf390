"""Unicorn's execution context: a processor at CPL 3 whose every trap calls Python.

`regs` lies directly over the beginning of QEMU's CPUX86State, so reading or changing a register costs no call.

Guest kernel and guest user both run at CPL 3 with exactly ring 3's rights, but each has a software TLB of its own:
code at CPL 3 always uses MMU index 1, and `switch_mode` exchanges that TLB with the one parked at index 0, which
QEMU would use only with SMAP on.  Flushes thus reach both.  Translated blocks are looked up by address and flags; a
flag bit which QEMU leaves unused tells the two modes' blocks apart.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any, Final

from xenolith.abi.layout import FLAT_RING3_CS64, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    CR0_TS,
    CS,
    DS,
    ES,
    FS,
    GS,
    MASK64,
    PAGE_SHIFT,
    REGISTER_WORDS,
    RFLAGS,
    RIP,
    SEGMENT_BASE,
    SS,
    VECTOR_PF,
    advanced,
)
from xenolith.machine import page_walk, segments
from xenolith.machine.engines.native_state import EngineCalls
from xenolith.machine.engines.protocol import (
    CpuState,
    EngineError,
    ModeSwitchState,
    TrapHandler,
)
from xenolith.machine.engines.unicorn import layout, stubs, watchpoints, xsave
from xenolith.machine.engines.unicorn.callbacks import Callbacks
from xenolith.machine.engines.unicorn.deliver import Hook
from xenolith.machine.engines.unicorn.instance import CR0, Instance
from xenolith.machine.memory import MachineMemory
from xenolith.machine.native import buffer_address, function_address
from xenolith.machine.operands import GuestFault, GuestView
from xenolith.machine.tsc import scale

GATE: Final = 0x8000_0000_0000_0000  # not canonical: fetching there faults at once, see `run`
LDT_DESCRIPTOR: Final = layout.DESC_P | 2 << 8  # present, of type LDT

_CR0: Final = layout.CR // 8
_CR3: Final = _CR0 + 3
_DR: Final = layout.DR // 8
_HFLAGS: Final = layout.HFLAGS // 4
_FS_BASE: Final = FS + SEGMENT_BASE
_GS_BASE: Final = GS + SEGMENT_BASE
_GDT_BASE, _GDT_LIMIT = layout.GDT // 8 + 1, layout.GDT // 4 + 4
_LDT_BASE, _LDT_LIMIT = layout.LDT // 8 + 1, layout.LDT // 4 + 4
_HF_64_BIT: Final = layout.HF_CS64 | layout.HF_CS32 | layout.HF_SS32
_FLAT_CODE64: Final = layout.FLAT_CODE64 << 32 | 0xFFFF_FFFF
_FLAT_DATA: Final = layout.FLAT_DATA << 32 | 0xFFFF_FFFF
_SEGMENTS_END: Final = GS + 3


class UnicornCpu:
    """See the protocol's Cpu; every trap's address is 0 but #PF's (CR2) and #DB's (DR6)."""

    tsc_offset = 0
    regs: memoryview
    get_rflags: Callable[[], int]
    set_rflags: Callable[[int], None]
    flush_tlb: Callable[[], None]
    flush_page: Callable[[int], None]
    switch_mode: Callable[[int, bool], None]
    code_written: Callable[[int], None]
    executable_mapped: Callable[[int], None]

    def __init__(self, instance: Instance, memory: MachineMemory) -> None:
        self._instance = instance
        self._lib = instance.lib
        self._memory = memory
        self._b, self._d, self._q = instance.b, instance.d, instance.q
        self.regs = self._q[:REGISTER_WORDS]
        self._general = self.regs[: RIP + 1]
        self._registers = self.regs[:_SEGMENTS_END]
        self._debug = self._q[_DR : _DR + 8]
        self._block = self._b[: layout.VCPU_BLOCK]
        word = ctypes.c_uint64
        self.get_rflags = instance.call(stubs.GET_RFLAGS, word)
        self.set_rflags = instance.call(stubs.SET_RFLAGS, None, word)
        self.flush_tlb = instance.call(stubs.FLUSH_TLB, None)
        self.flush_page = instance.call(stubs.FLUSH_PAGE, None, word)
        self.switch_mode = instance.call(stubs.SWITCH_MODE, None, word, ctypes.c_bool)
        self.code_written = instance.call(stubs.CODE_WRITTEN, None, word)
        self.executable_mapped = instance.call(stubs.EXECUTABLE_MAPPED, None, word)
        self.set_code_stack(FLAT_RING3_CS64, FLAT_RING3_SS64)
        for segment in (ES, DS, FS, GS):
            self._load_segment(segment, 0, segments.NULL)
        self._parked: dict[int, tuple[CpuState, bytearray]] = {}  # by id: see `swap`
        self._spare_block = bytearray(layout.VCPU_BLOCK)
        self._hook = Hook(regs=buffer_address(self.regs), memory=memory.address, memory_size=memory.size)
        self._hook.env = instance.env
        self._watcher = watchpoints.Watcher(self._lib, instance.cpu, self._hook)
        self._hook.get_rflags, self._hook.set_rflags = map(function_address, (self.get_rflags, self.set_rflags))
        self.modes: ModeSwitchState | None = None
        self._vcpu = 0  # address of the vCPU that native code may handle traps of; 0: none
        self._kicked = False
        self._inside = False  # a stop is heard now
        self._callbacks = Callbacks(self, instance, self._hook, self._watcher, self._code)
        instance.seal()
        self._calls = EngineCalls(
            buffer_address(self.regs),
            0,
            *map(
                function_address,
                (
                    self.get_rflags,
                    self.set_rflags,
                    self.switch_mode,
                    self.flush_tlb,
                    self.flush_page,
                    self.executable_mapped,
                ),
            ),
        )
        self.calls = ctypes.addressof(self._calls)

    # --- a vCPU's state -----------------------------------------------------------------------------

    def load(self, state: CpuState) -> None:
        """Make this state the one that runs. Raises ValueError if its CS or SS could not be returned to at CPL 3."""
        self._parked.pop(id(state), None)
        regs = self.regs
        self.switch_mode(state.l4_mfn, state.user)
        self._set_tables(state)
        self.set_code_stack(state.regs[CS], state.regs[SS])
        for segment in (ES, DS, FS, GS):
            with contextlib.suppress(ValueError):  # changed since: a null segment, as after a load that faults
                self.set_segment(segment, state.regs[segment])
        regs[_FS_BASE], regs[_GS_BASE] = state.regs[_FS_BASE], state.regs[_GS_BASE]
        self.load_extended(state.xsave)
        self._load_common(state)

    def load_extended(self, image: bytearray) -> None:
        """Load x87 and SSE state from an XSAVE image."""
        xsave.restore(image, self._b)
        self._lib.update_fp_status(self._instance.env)
        self._lib.update_mxcsr_status(self._instance.env)

    def store_extended(self, image: bytearray) -> None:
        """Write x87 and SSE state, and a header that tells of nothing else, over the start of an XSAVE image."""
        xsave.save(self._b, image)

    def store(self, state: CpuState) -> None:
        """Write the state back, complete: the loaded one, which stays loaded, or one that `swap` took off.

        With the loaded one come all those that `swap` took off.
        """
        parked = self._parked.get(id(state))
        if parked is not None:
            xsave.save(memoryview(parked[1]), state.xsave)
            return
        self._store_common(state)
        xsave.save(self._b, state.xsave)
        for other, block in self._parked.values():
            xsave.save(memoryview(block), other.xsave)

    def swap(self, old: CpuState, new: CpuState) -> None:
        """Take `old`, which is loaded, off, and put `new` on: `store(old)` and `load(new)`, but cheap.

        `old` gets back everything but `xsave`, which is kept here in QEMU's own form until `store(old)` asks for it.
        If `new` was taken off in the same way, its general registers, RIP, RFLAGS, FS and GS bases, page table, mode,
        TS, debug registers and tables may have been changed meanwhile; for other changes call `store`, change, `load`.
        """
        self._store_common(old)
        block = self._spare_block
        block[:] = self._block
        parked = self._parked.pop(id(new), None)
        self._parked[id(old)] = (old, block)
        if parked is None:
            self._spare_block = bytearray(layout.VCPU_BLOCK)
            self.load(new)
            return
        self._spare_block = parked[1]
        d, regs, saved = self._d, self.regs, new.regs
        mode = d[_HFLAGS] & layout.HF_KERNEL
        self._block[:] = parked[1]
        d[_HFLAGS] = d[_HFLAGS] & ~layout.HF_KERNEL | mode  # goes with the TLBs as they lie
        self.switch_mode(new.l4_mfn, new.user)
        self._set_tables(new)
        regs[_FS_BASE], regs[_GS_BASE] = saved[_FS_BASE], saved[_GS_BASE]
        self._load_common(new)

    def set_segment(self, segment: int, selector: int) -> None:
        """Load ES, DS, FS or GS. Raises ValueError where the instruction would fault; it is null then."""
        if selector <= segments.SELECTOR_RPL and self._d[_HFLAGS] & layout.HF_CS64:
            regs = self.regs
            regs[segment], regs[segment + 1], regs[segment + 2] = selector, 0, 0
            return
        try:
            value = segments.data_segment(selector, self._descriptor)
        except ValueError:
            self._load_segment(segment, 0, segments.NULL)
            raise
        self._load_segment(segment, selector, value)

    def set_code_stack(self, cs: int, ss: int) -> None:
        """Load CS and SS. Raises ValueError, and changes nothing, where a return to them at CPL 3 would fault."""
        if cs == FLAT_RING3_CS64 and ss == FLAT_RING3_SS64:
            regs = self.regs
            regs[CS], regs[CS + 1], regs[CS + 2] = cs, 0, _FLAT_CODE64
            regs[SS], regs[SS + 1], regs[SS + 2] = ss, 0, _FLAT_DATA
            self._d[_HFLAGS] = self._d[_HFLAGS] & ~layout.HF_ADDSEG | _HF_64_BIT
            return
        code = segments.code_segment(cs, self._descriptor)
        stack = segments.stack_segment(ss, self._descriptor)
        self._load_segment(CS, cs, code)
        self._load_segment(SS, ss, stack)

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS."""
        hflags = self._d[_HFLAGS] & ~layout.HF_TS
        self._d[_HFLAGS] = hflags | layout.HF_TS if on else hflags
        self._q[_CR0] = CR0 | CR0_TS if on else CR0

    def set_debug(self, number: int, value: int) -> None:
        """Load DR0-3, 6 or 7."""
        if self._q[_DR + number] != value:
            self._lib.set_dr(self._instance.env, number, value)
            self._watch()

    def set_ldt(self, va: int, limit: int) -> None:
        """The LDT's linear address and limit (0: none)."""
        self._q[_LDT_BASE], self._d[_LDT_LIMIT] = va, limit
        self._d[_LDT_LIMIT + 1] = LDT_DESCRIPTOR if limit else 0

    def set_xcr0(self, value: int) -> None:
        """Nothing: Unicorn has no more than x87 and SSE, and their bits are always set."""

    # --- running ------------------------------------------------------------------------------------

    def attach(self, modes: ModeSwitchState | None) -> None:
        """Every change of mode is the hypervisor's, but it may have native code for that."""
        self.modes = modes
        self._hook.vcpu = 0
        self._hook.handler = modes.native_handler if modes is not None else 0
        self._vcpu = modes.address if modes is not None and modes.native_handler else 0

    def run(self, on_trap: TrapHandler) -> None:
        """Execute until `on_trap` returns False or the Cpu is kicked.

        A stop that comes before Unicorn's loop has begun is lost.  So execution starts at an address which
        cannot be fetched from: the fault proves that the loop runs, and only then is the kick looked at.
        """
        if not self._kicked:
            self._execute(on_trap)
        self._kicked = False

    def _execute(self, on_trap: TrapHandler) -> None:
        """The same, but a kick stays known."""
        start, callbacks = self.regs[RIP], self._callbacks

        def entered(vector: int, error_code: int, address: int) -> bool:
            self.regs[RIP] = start
            callbacks.handler = on_trap
            self._hook.vcpu = self._vcpu
            self._inside = True
            return not self._kicked

        callbacks.handler = entered
        self._hook.vcpu = 0
        error = self._lib.emu_start(self._instance.uc, GATE, 0, 0, 0)
        self._inside = False
        if callbacks.failure is not None:
            failure, callbacks.failure = callbacks.failure, None
            self._kicked = False
            raise failure
        if error:
            self._kicked = False
            raise EngineError(f"guest code stopped the engine: {self._lib.strerror(error).decode()}")

    def kick(self) -> None:
        """Make `run` return soon. From any thread, at any time."""
        self._kicked = True
        if self._inside:
            self._lib.emu_stop(self._instance.uc)

    @property
    def translation_ns(self) -> int:
        """How long translation has taken so far; 0 where that is not known."""
        state = self._instance.softmmu
        return scale().nanoseconds(state.translating) if state is not None else 0

    def note_code(self) -> None:
        """Somebody else executes the guest from now on, until `distrust_code`."""
        if self._instance.softmmu is None:  # which keeps the checksums that it needs
            self._instance.distrust_code(self.executable_mapped)

    def distrust_code(self) -> None:
        """Somebody else has executed the guest, and perhaps changed code. The TLB is to be flushed."""
        self._instance.distrust_code(self.executable_mapped)

    @property
    def kernels_far_transfers(self) -> int:
        """How many were carried out in guest-kernel mode."""
        return self._hook.kernels_far_transfers

    @kernels_far_transfers.setter
    def kernels_far_transfers(self, count: int) -> None:
        self._hook.kernels_far_transfers = count

    @property
    def serializes(self) -> bool:
        """Whether it has executed so many far transfers in a row that they are to serialize, and nothing else."""
        return self._hook.serializes

    def leave_cpuid_to_python(self) -> None:
        """Every CPUID is a TRAP_CPUID of Python's handler, also one that the native handler has an answer for."""
        self._hook.cpuid_is_pythons = True

    def carry_out_extended(self, extended: int, carry_out: int) -> None:
        """Call this function with this argument at undefined opcodes: it tells whether it executed the instruction."""
        self._hook.extended, self._hook.carry_out = extended, carry_out

    @property
    def extended_calls(self) -> dict[str, Any]:
        """Functions for that: what QEMU derives from FCW and MXCSR, and `code_written`."""
        return {
            "update_fp_status": self._lib.update_fp_status,
            "update_mxcsr_status": self._lib.update_mxcsr_status,
            "code_written": self.code_written,
        }

    @property
    def env(self) -> int:
        """Address of CPUX86State."""
        return self._instance.env

    @property
    def words(self) -> memoryview:
        """CPUX86State by 64-bit words."""
        return self._q

    def frames_with_code(self) -> list[int]:
        """MFNs of the frames of which there may be translated blocks."""
        return self._instance.frames_with_code()

    def close(self) -> None:
        """Give everything back to the host."""
        self._watcher.close()
        for view in (self._general, self._registers, self.regs, self._debug, self._block):
            view.release()
        self._instance.close()

    def _code(self, size: int, offset: int = 0) -> bytes | None:
        """Bytes of the instruction at RIP."""
        linear = self.regs[RIP] + self.regs[CS + SEGMENT_BASE] + offset & MASK64
        return page_walk.read(self._memory, self._q[_CR3] >> PAGE_SHIFT, linear, size)

    def _watch(self) -> None:
        """Have the breakpoints on data that are armed now noticed."""
        if self._watcher.set(watchpoints.armed(self._debug.tolist())):
            if self._instance.softmmu is not None:
                self._instance.softmmu.watched = self._hook.watches
            self.flush_tlb()
            self._step_if_watching()

    def _step_if_watching(self) -> None:
        hflags = self._d[_HFLAGS] & ~layout.HF_TF
        self._d[_HFLAGS] = hflags | layout.HF_TF if self._hook.watches else hflags

    # --- parts of load and store --------------------------------------------------------------------

    def _set_tables(self, state: CpuState) -> None:
        q, d = self._q, self._d
        q[_GDT_BASE], d[_GDT_LIMIT] = state.gdt_va, state.gdt_limit
        q[_LDT_BASE], d[_LDT_LIMIT] = state.ldt_va, state.ldt_limit
        d[_LDT_LIMIT + 1] = LDT_DESCRIPTOR if state.ldt_limit else 0

    def _load_common(self, state: CpuState) -> None:
        """What is cheap to load."""
        self._general[:] = state.regs[: RIP + 1]
        self.set_rflags(state.regs[RFLAGS])
        self.set_task_switched(state.task_switched)
        if self._debug.tolist() != state.debug:
            for number in (0, 1, 2, 3, 6, 7):
                self.set_debug(number, state.debug[number])
        self._step_if_watching()

    def _store_common(self, state: CpuState) -> None:
        """What is cheap to store."""
        q, d = self._q, self._d
        state.regs[:_SEGMENTS_END] = self._registers
        state.regs[RFLAGS] = self.get_rflags()
        state.l4_mfn = q[_CR3] >> PAGE_SHIFT
        state.user = not d[_HFLAGS] & layout.HF_KERNEL
        state.task_switched = bool(q[_CR0] & CR0_TS)
        state.debug[:] = self._debug.tolist()
        state.gdt_va, state.gdt_limit = q[_GDT_BASE], d[_GDT_LIMIT]
        state.ldt_va, state.ldt_limit = q[_LDT_BASE], d[_LDT_LIMIT]

    @property
    def runs_64_bit_code(self) -> bool:
        return bool(self._d[_HFLAGS] & layout.HF_CS64)

    @property
    def view(self) -> GuestView:
        return GuestView(self._memory, self._q[_CR3] >> PAGE_SHIFT)

    def load_selector(self, segment: int, selector: int) -> None:
        """Like `set_segment`, but a register that cannot be loaded stays as it is."""
        self._load_segment(segment, selector, segments.data_segment(selector, self._descriptor))

    def code_segment(self, selector: int) -> int:
        return segments.code_segment(selector, self._descriptor).flags

    def _descriptor(self, selector: int) -> bytes | None:
        if selector & segments.SELECTOR_TI:
            base, limit = self._q[_LDT_BASE], self._d[_LDT_LIMIT]
        else:
            base, limit = self._q[_GDT_BASE], self._d[_GDT_LIMIT]
        offset = selector & ~7
        if offset + 7 > limit:
            return None
        va = advanced(base, offset)
        descriptor = page_walk.read(self._memory, self._q[_CR3] >> PAGE_SHIFT, va, 8)
        if descriptor is None:
            raise GuestFault(VECTOR_PF, 0, va)  # by the processor's own read of the table
        return descriptor

    def _load_segment(self, segment: int, selector: int, value: segments.Segment) -> None:
        """What cpu_x86_load_seg_cache does: fill the cache, and derive the flags that translation depends on."""
        regs = self.regs
        regs[segment] = selector
        regs[segment + SEGMENT_BASE] = value.base
        regs[segment + 2] = value.flags << 32 | value.limit
        hflags = self._d[_HFLAGS] & ~(layout.HF_CS64 | layout.HF_CS32 | layout.HF_SS32 | layout.HF_ADDSEG)
        code = regs[CS + 2] >> 32
        if code & layout.DESC_L:
            hflags |= _HF_64_BIT
        else:
            if code & layout.DESC_B:
                hflags |= layout.HF_CS32
            if regs[SS + 2] >> 32 & layout.DESC_B:
                hflags |= layout.HF_SS32
            if not code & layout.DESC_B or any(regs[register + SEGMENT_BASE] for register in (ES, SS, DS)):
                hflags |= layout.HF_ADDSEG
        self._d[_HFLAGS] = hflags
