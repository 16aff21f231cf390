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
import functools
from collections.abc import Callable
from typing import Final

from xenolith.abi.layout import FLAT_RING3_CS64, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CS,
    DS,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    ES,
    FS,
    GS,
    MSR_EFER,
    PAGE_SHIFT,
    PAGE_SIZE,
    REGISTER_WORDS,
    RFLAGS,
    RIP,
    SEGMENT_BASE,
    SS,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_OF,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.protocol import (
    TRAP_CPUID,
    TRAP_SYSCALL,
    TRAP_SYSENTER,
    CpuState,
    EngineError,
    TrapHandler,
)
from xenolith.machine.engines.unicorn import layout, library, paging, segments, xsave
from xenolith.machine.engines.unicorn.library import Library
from xenolith.machine.memory import MachineMemory

CODE_BUFFER_BYTES: Final = 32 << 20  # of translated code; QEMU's default would reserve 1 GiB of addresses
CPU_MODEL: Final = 25  # Icelake-Client: of QEMU's models the one with the most instructions that TCG executes
GATE: Final = 0x8000_0000_0000_0000  # not canonical: fetching there faults at once, see `run`
SETTABLE_FLAGS: Final = 0x254FD5  # ID AC RF NT DF IF TF and the status flags; IOPL and VM stay 0
INT_ERROR: Final = 2  # in an error code: the fault came from INT n
MASK64: Final = (1 << 64) - 1

CR0: Final = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG
CR4: Final = CR4_DE | CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE | CR4_OSXSAVE

_CR3: Final = layout.CR // 8 + 3
_FAULT: Final = layout.ERROR_CODE // 8  # error code, and above it whether INT n raised it
_CR2: Final = layout.CR // 8 + 2


class UnicornCpu:
    """See the protocol's Cpu; every trap's address is 0 but #PF's (CR2) and #DB's (DR6)."""

    regs: memoryview
    get_rflags: Callable[[], int]
    set_rflags: Callable[[int], None]

    def __init__(self, lib: Library, memory: MachineMemory) -> None:
        self._lib = lib
        self._memory = memory
        self._uc = _open(lib, memory)
        self._find_state()
        self._protect_mode()
        self._user = False
        self._l4_of_tlb = [0, 0]  # which page table the TLB of kernel and user mode holds
        self._on_trap: TrapHandler = _no_handler
        self._kicked = False
        self._inside = False  # guest code is running, or a stop now ends `run`
        self._failure: BaseException | None = None
        self._return_address = 0
        self._add_hooks()

    # --- state --------------------------------------------------------------------------------------

    def load(self, state: CpuState) -> None:
        """Make this state the one that runs. Raises ValueError if its CS or SS could not be returned to at CPL 3."""
        self.switch_mode(state.l4_mfn, state.user)
        regs = self.regs
        regs[: RIP + 1] = state.regs[: RIP + 1]
        self._q[layout.GDT // 8 + 1] = state.gdt_va
        self._d[layout.GDT // 4 + 4] = state.gdt_limit
        self.set_ldt(state.ldt_va, state.ldt_limit)
        for segment in (ES, DS, FS, GS):
            with contextlib.suppress(ValueError):  # changed since: a null segment, as after a load that faults
                self.set_segment(segment, state.regs[segment])
            if segment in (FS, GS):
                regs[segment + SEGMENT_BASE] = state.regs[segment + SEGMENT_BASE]
        self.set_code_stack(state.regs[CS], state.regs[SS])
        self.set_rflags(state.regs[RFLAGS])
        self.set_task_switched(state.task_switched)
        for number in (0, 1, 2, 3, 6, 7):
            self.set_debug(number, state.debug[number])
        xsave.restore(state.xsave, self._b)
        self._lib.update_fp_status(self._env)
        self._lib.update_mxcsr_status(self._env)
        self._d[layout.OLD_EXCEPTION // 4] = 0xFFFF_FFFF

    def store(self, state: CpuState) -> None:
        """Write the loaded state back, complete. It stays loaded."""
        q = self._q
        state.regs[: GS + 3] = self.regs[: GS + 3]
        state.regs[RFLAGS] = self.get_rflags()
        state.l4_mfn = q[_CR3] >> PAGE_SHIFT
        state.user = self._user
        state.task_switched = bool(q[layout.CR // 8] & CR0_TS)
        state.debug[:] = q[layout.DR // 8 : layout.DR // 8 + 8].tolist()
        state.gdt_va, state.gdt_limit = q[layout.GDT // 8 + 1], self._d[layout.GDT // 4 + 4]
        state.ldt_va, state.ldt_limit = q[layout.LDT // 8 + 1], self._d[layout.LDT // 4 + 4]
        xsave.save(self._b, state.xsave)

    def switch_mode(self, l4_mfn: int, user: bool) -> None:
        """Go on in guest-kernel or guest-user mode on this page table."""
        self._q[_CR3] = l4_mfn << PAGE_SHIFT
        if user != self._user:
            self._exchange_tlbs()
            self._user = user
        if self._l4_of_tlb[user] != l4_mfn:
            self._l4_of_tlb[user] = l4_mfn
            self._flush(1 << layout.MMU_USER | 1 << layout.MMU_SYSTEM)
        elif self._system_tlb_used():
            self._flush(1 << layout.MMU_SYSTEM)

    def flush_tlb(self) -> None:
        """Forget every cached translation, of both modes."""
        self._flush(7)

    def flush_page(self, va: int) -> None:
        """Forget cached translations of the page at linear address `va`, of both modes."""
        self._lib.tlb_flush_page(self._cpu, va)

    def set_segment(self, segment: int, selector: int) -> None:
        """Load ES, DS, FS or GS. Raises ValueError where the instruction would fault; it is null then."""
        try:
            value = segments.data_segment(selector, self._descriptor)
        except ValueError:
            self._load_segment(segment, 0, segments.NULL)
            raise
        self._load_segment(segment, selector, value)

    def set_code_stack(self, cs: int, ss: int) -> None:
        """Load CS and SS. Raises ValueError, and changes nothing, where a return to them at CPL 3 would fault."""
        code = segments.code_segment(cs, self._descriptor)
        stack = segments.stack_segment(ss, self._descriptor)
        self._load_segment(CS, cs, code)
        self._load_segment(SS, ss, stack)

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS."""
        hflags = self._d[layout.HFLAGS // 4] & ~layout.HF_TS
        self._d[layout.HFLAGS // 4] = hflags | layout.HF_TS if on else hflags
        self._q[layout.CR // 8] = CR0 | CR0_TS if on else CR0

    def set_debug(self, number: int, value: int) -> None:
        """Load DR0-3, 6 or 7."""
        if self._q[layout.DR // 8 + number] != value:
            self._lib.set_dr(self._env, number, value)

    def set_ldt(self, va: int, limit: int) -> None:
        """The LDT's linear address and limit (0: none)."""
        self._q[layout.LDT // 8 + 1] = va
        self._d[layout.LDT // 4 + 4] = limit
        self._d[layout.LDT // 4 + 5] = layout.DESC_P | 2 << 8 if limit else 0

    def code_written(self, mfn: int) -> None:
        """Ring 0 wrote to this frame: code translated from it is stale."""
        start = mfn << PAGE_SHIFT
        self._lib.tb_invalidate_phys_range(self._uc, start, start + PAGE_SIZE)

    def executable_mapped(self, mfn: int) -> None:
        """An executable mapping of this frame was made, or a writable one withdrawn: its code may have changed."""
        self.code_written(mfn)

    # --- running ------------------------------------------------------------------------------------

    def run(self, on_trap: TrapHandler) -> None:
        """Execute until `on_trap` returns False or the Cpu is kicked.

        A stop that comes before Unicorn's loop has begun is lost.  So execution starts at an address which
        cannot be fetched from: the fault proves that the loop runs, and only then is the kick looked at.
        """
        while not self._kicked:
            self._return_address = self.regs[RIP]
            self._next_handler = on_trap
            self._on_trap = self._entered
            error = self._lib.emu_start(self._uc, GATE, 0, 0, 0)
            stopped, self._inside = not self._inside, False
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if error:
                raise EngineError(f"guest code stopped the engine: {self._lib.strerror(error).decode()}")
            if stopped:
                return
        self._kicked = False

    def kick(self) -> None:
        """Make `run` return soon. From any thread, at any time."""
        self._kicked = True
        if self._inside:
            self._lib.emu_stop(self._uc)

    def close(self) -> None:
        """Give everything back to the host."""
        self._lib.close(self._uc)

    def _entered(self, vector: int, error_code: int, address: int) -> bool:
        """The fault at the gate: from here on a stop is heard."""
        if vector != VECTOR_GP:
            raise EngineError(f"the Unicorn engine entered the guest with trap {vector}, not by its gate")
        self.regs[RIP] = self._return_address
        self._on_trap = self._next_handler
        self._inside = True
        if self._kicked:
            self._lib.emu_stop(self._uc)
        return True

    def _leave(self) -> None:
        self._inside = False
        self._lib.emu_stop(self._uc)

    def _add_hooks(self) -> None:
        """Register the callbacks; they stay referenced here as long as Unicorn may call them."""
        q, d, regs = self._q, self._d, self.regs
        old_exception = layout.OLD_EXCEPTION // 4

        def interrupt(_: bool, vector: int) -> None:
            d[old_exception] = 0xFFFF_FFFF  # else the next page fault would count as a double fault
            try:
                fault = q[_FAULT]
                if fault > 0xFFFF_FFFF and vector != VECTOR_BP and vector != VECTOR_OF:
                    regs[RIP] = regs[RIP] - 2 & MASK64
                    go_on = self._on_trap(VECTOR_GP, vector << 3 | INT_ERROR, 0)
                elif vector == VECTOR_PF:
                    go_on = self._on_trap(VECTOR_PF, fault, q[_CR2])
                elif vector == VECTOR_DB:
                    go_on = self._on_trap(VECTOR_DB, 0, q[layout.DR // 8 + 6])
                else:
                    go_on = self._on_trap(vector, fault & 0xFFFF_FFFF, 0)
                if not go_on:
                    self._leave()
            except BaseException as failure:
                self._failure = failure
                self._leave()

        def invalid(_: bool) -> bool:
            d[old_exception] = 0xFFFF_FFFF
            try:
                if q[_FAULT] > 0xFFFF_FFFF:
                    go_on = self._on_trap(VECTOR_GP, VECTOR_UD << 3 | INT_ERROR, 0)
                else:
                    go_on = self._on_trap(VECTOR_UD, 0, 0)
                if not go_on:
                    self._leave()
            except BaseException as failure:
                self._failure = failure
                self._leave()
            return True

        def trap_after(trap: int) -> Callable[[bool], None]:
            def instruction(_: bool) -> None:
                try:
                    regs[RIP] += 2
                    if not self._on_trap(trap, 0, 0):
                        self._leave()
                except BaseException as failure:
                    self._failure = failure
                    self._leave()
                regs[RIP] = regs[RIP] - 2 & MASK64  # Unicorn adds the instruction's length now

            return instruction

        def cpuid(_: bool) -> int:
            try:
                regs[RIP] += 2
                if not self._on_trap(TRAP_CPUID, 0, 0):
                    self._leave()
            except BaseException as failure:
                self._failure = failure
                self._leave()
            return 1

        self._callbacks = (
            (library.UC_HOOK_INTR, library.InterruptCallback(interrupt), 0),
            (library.UC_HOOK_INSN_INVALID, library.InvalidCallback(invalid), 0),
            (
                library.UC_HOOK_INSN,
                library.InstructionCallback(trap_after(TRAP_SYSCALL)),
                library.UC_X86_INS_SYSCALL,
            ),
            (
                library.UC_HOOK_INSN,
                library.InstructionCallback(trap_after(TRAP_SYSENTER)),
                library.UC_X86_INS_SYSENTER,
            ),
            (library.UC_HOOK_INSN, library.CpuidCallback(cpuid), library.UC_X86_INS_CPUID),
        )
        for kind, callback, instruction in self._callbacks:
            handle = ctypes.c_void_p()
            self._lib.check(
                self._lib.hook_add(
                    self._uc,
                    ctypes.byref(handle),
                    kind,
                    ctypes.cast(callback, ctypes.c_void_p),
                    None,
                    1,
                    0,
                    instruction,
                ),
                "adding a hook",
            )

    # --- the private state --------------------------------------------------------------------------

    def _find_state(self) -> None:
        """Views of CPUX86State and of the TLBs in front of it."""
        cpu = ctypes.c_uint64.from_address(self._uc + layout.UC_CPU).value
        self._cpu = ctypes.c_void_p(cpu)
        env = cpu - layout.CPU_STATE
        self._env = ctypes.c_void_p(env)
        self._b = _view(env, layout.ENV_SIZE)
        self._q, self._d = self._b.cast("Q"), self._b.cast("I")
        self.regs = self._q[:REGISTER_WORDS]
        self.get_rflags = functools.partial(self._lib.read_eflags, self._env)
        write = self._lib.defaulting(
            "helper_write_eflags_x86_64",
            (ctypes.c_void_p, None),
            (ctypes.c_uint64, None),
            (ctypes.c_uint32, SETTABLE_FLAGS),
        )
        self.set_rflags = functools.partial(write, self._env)
        tlb = _view(env + layout.TLB_AREA, -layout.TLB_AREA)
        first = layout.TLB_DESCRIPTION - layout.TLB_AREA
        self._tlb_descriptions = [
            tlb[first + i * layout.TLB_DESCRIPTION_SIZE : first + (i + 1) * layout.TLB_DESCRIPTION_SIZE]
            for i in range(3)
        ]
        first = layout.TLB_FAST - layout.TLB_AREA
        self._tlb_fast = [
            tlb[first + i * layout.TLB_FAST_SIZE : first + (i + 1) * layout.TLB_FAST_SIZE] for i in range(3)
        ]
        self._tlb_dirty = tlb[:2].cast("H")
        self._system_description = self._tlb_descriptions[layout.MMU_SYSTEM].cast("Q")

    def _protect_mode(self) -> None:
        """Long mode, paging, CPL 3, on page table 0."""
        lib = self._lib
        _view(self._uc + layout.UC_NO_EXIT_REQUEST, 1)[0] = 1  # a stop must not split a read-modify-write
        lib.update_cr4(self._env, CR4)
        efer = (ctypes.c_uint64 * 2)(MSR_EFER, EFER_SCE | EFER_LME | EFER_NX)
        lib.check(lib.reg_write(self._uc, library.UC_X86_REG_MSR, efer), "setting EFER")
        lib.update_cr3(self._env, 0)
        lib.update_cr0(self._env, CR0)
        self._d[layout.HFLAGS // 4] |= layout.HF_CPL | layout.HF_KERNEL
        self._q[layout.XCR0 // 8] = xsave.X87 | xsave.SSE
        for table in (layout.LDT, layout.TR, layout.GDT, layout.IDT):
            self._b[table : table + 24] = bytes(24)
        self.set_code_stack(FLAT_RING3_CS64, FLAT_RING3_SS64)
        for segment in (ES, DS, FS, GS):
            self._load_segment(segment, 0, segments.NULL)

    def _exchange_tlbs(self) -> None:
        for views in (self._tlb_descriptions, self._tlb_fast):
            used, parked = views[layout.MMU_USER], views[layout.MMU_PARKED]
            saved = bytes(used)
            used[:] = parked
            parked[:] = saved
        self._d[layout.HFLAGS // 4] ^= layout.HF_KERNEL

    def _system_tlb_used(self) -> bool:
        return bool(self._system_description[layout.TLB_DESCRIPTION_USED // 8])

    def _flush(self, indices: int) -> None:
        self._tlb_dirty[0] = 7  # the exchange moves TLBs but not their bits
        self._lib.tlb_flush_by_mmuidx(self._cpu, indices)

    def _descriptor(self, selector: int) -> bytes | None:
        table = layout.LDT if selector & segments.SELECTOR_TI else layout.GDT
        base, limit = self._q[table // 8 + 1], self._d[table // 4 + 4]
        offset = selector & ~7
        if offset + 7 > limit:
            return None
        return paging.read(self._memory, self._q[_CR3] >> PAGE_SHIFT, base + offset & MASK64, 8)

    def _load_segment(self, segment: int, selector: int, value: segments.Segment) -> None:
        """What cpu_x86_load_seg_cache does: fill the cache, and derive the flags that translation depends on."""
        regs, d = self.regs, self._d
        regs[segment] = selector
        regs[segment + SEGMENT_BASE] = value.base
        regs[segment + 2] = value.flags << 32 | value.limit
        hflags = d[layout.HFLAGS // 4] & ~(layout.HF_SS32 | layout.HF_ADDSEG)
        code, stack = regs[CS + 2] >> 32, regs[SS + 2] >> 32
        if code & layout.DESC_L:
            hflags |= layout.HF_CS64 | layout.HF_CS32 | layout.HF_SS32
        else:
            hflags &= ~(layout.HF_CS64 | layout.HF_CS32)
            hflags |= layout.HF_CS32 if code & layout.DESC_B else layout.HF_ADDSEG
            hflags |= layout.HF_SS32 if stack & layout.DESC_B else 0
            if any(regs[register + SEGMENT_BASE] for register in (ES, SS, DS)):
                hflags |= layout.HF_ADDSEG
        d[layout.HFLAGS // 4] = hflags


def _no_handler(vector: int, error_code: int, address: int) -> bool:
    raise EngineError(f"trap {vector} outside run")


def _open(lib: Library, memory: MachineMemory) -> int:
    """A Unicorn instance over all of machine memory; the address of its uc_struct."""
    handle = ctypes.c_void_p()
    lib.check(lib.open(library.UC_ARCH_X86, library.UC_MODE_64, ctypes.byref(handle)), "opening an instance")
    uc = handle.value
    assert uc is not None
    for control, value in (
        (library.UC_CTL_CPU_MODEL, CPU_MODEL),
        (library.UC_CTL_TCG_BUFFER_SIZE, CODE_BUFFER_BYTES),
        (library.UC_CTL_USE_EXITS, 1),  # and none given: no address stops execution
    ):
        lib.check(lib.ctl(uc, control | 1 << 26 | 1 << 30, value), f"setting option {control}")
    lib.check(lib.mem_map_ptr(uc, 0, memory.size, library.UC_PROT_ALL, memory.address), "mapping machine memory")
    return uc


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
