"""The rarer ways out of the guest: exceptions other than page faults, ports that no trap stub uses, KVM's refusals."""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final

from iced_x86 import CpuidFeature, OpKind

from xenolith.abi.x86 import (
    EFLAGS_RF,
    R11,
    RAX,
    RCX,
    RFLAGS,
    RIP,
    RSP,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_OF,
    VECTOR_PF,
    VECTOR_UD,
    VECTORS_WITH_ERROR_CODE,
    advanced,
    is_canonical,
)
from xenolith.machine.engines import segment_loads
from xenolith.machine.engines.kvm import api, area, processor, run_page
from xenolith.machine.engines.kvm.api import run_ioctl
from xenolith.machine.engines.kvm.interruptions import INT3, INT_N, INTO
from xenolith.machine.engines.protocol import (
    ALWAYS_SET,
    ENTRY_FLAGS,
    TRAP_NOTHING,
    TRAP_SYSCALL,
    EngineError,
    TrapHandler,
)
from xenolith.machine.operands import LONGEST_INSTRUCTION, GuestFault, decode

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.cpu import KvmCpu
    from xenolith.machine.engines.kvm.fast_path import FastPath
    from xenolith.machine.engines.kvm.native_run import KvmFields
    from xenolith.machine.engines.kvm.processor import DebugRegisters
    from xenolith.machine.engines.kvm.run_page import RunPage
    from xenolith.machine.engines.kvm.segment_registers import SegmentRegisters

EFLAGS_OF: Final = 1 << 11
_SYSCALL32: Final = area.SYSCALL32_STUB, area.SYSCALL32_STUB & 0xFFFF_FFFF
_DIRECTION_IN: Final = 0
_ERROR_IDT: Final = 2  # error code of a fault that INT n caused
_FEATURES: Final = {  # that every processor with SMEP has
    CpuidFeature.FXSR,
    CpuidFeature.SSE,
    CpuidFeature.SSE2,
    CpuidFeature.SSE3,
    CpuidFeature.SSSE3,
    CpuidFeature.SSE4_1,
    CpuidFeature.SSE4_2,
    CpuidFeature.XSAVE,
}
_IO_BY_DX: Final = b"\xec\xed\xee\xef\x6c\x6d\x6e\x6f"


class Exits:
    """Those of one vCPU. Its general registers are in the register file already."""

    def __init__(
        self,
        fd: int,
        cpu: KvmCpu,
        page: RunPage,
        pages: area.CpuPages,
        segments: SegmentRegisters,
        debug: DebugRegisters,
        fast_path: FastPath | None,
        shared: KvmFields,
    ) -> None:
        self._fd = fd
        self._cpu = cpu
        self._regs = cpu.regs
        self._page = page
        self._pages = pages
        self._segments = segments
        self._debug = debug
        self._fast_path = fast_path
        self._shared = shared

    def exception(self, on_trap: TrapHandler, vector: int, error_code: int, selector: int) -> bool:
        """An exception other than a page fault; `selector` is the hardware CS it came from."""
        self._segments.look_for_far_jump(selector)
        regs = self._regs
        if vector == VECTOR_UD:
            vector, error_code = self._undefined_opcode()
        elif vector == VECTOR_GP and error_code & _ERROR_IDT:
            error_code = self._software_interrupt() or error_code
        elif vector in (VECTOR_GP, VECTOR_NP) and error_code & ~7:  # IRETQ finds our empty descriptors not present
            try:
                done = segment_loads.carry_out(self._cpu, error_code & 0xFFFC)
            except GuestFault as fault:
                return on_trap(fault.vector, fault.error_code, fault.address)
            if done is not None:
                return self._cpu.segment_loaded(on_trap, done)
        address = 0
        if vector in (VECTOR_BP, VECTOR_OF):
            processor.forget_vector(self._fd)
        if vector == VECTOR_DB:
            address = self._debug.read_status()
            regs[RFLAGS] &= ~EFLAGS_RF
        return on_trap(vector, error_code if vector in VECTORS_WITH_ERROR_CODE else 0, address)

    def at_cpl0(self, on_trap: TrapHandler, vector: int, error_code: int) -> bool:
        """An exception in the engine's own code, for which a guest can be the reason in three ways only.

        - SYSCALL has just been executed: by KVM's instruction emulator, where the processor would have stayed at CPL 3,
          or of 32-bit code, for which the emulator cuts CSTAR to 32 bits: SMEP keeps CPL 0 from what comes next; or
          behind a MOV SS, whose #DB comes now.
        - Such a #DB in a trap stub, of an INT3 behind a MOV SS: the #BP's frame is on a stack of its own.
        - A gate of the fast path that cannot return: a tick of 32-bit code.
        """
        regs, fast_path = self._regs, self._fast_path
        rip = regs[RIP]
        if rip in (self._shared.syscall_page, *_SYSCALL32):
            return self._syscall(on_trap)
        if fast_path is not None and fast_path.finish_gate(rip):
            self._segments.look_for_far_jump(self._pages.gate_frame[2])
            return on_trap(fast_path.take_over(fast_path.contains(regs[RIP])) or TRAP_NOTHING, 0, 0)
        trap, within = divmod(rip - area.TRAP_STUBS, area.STUB_SIZE)
        if vector == VECTOR_DB and 0 <= trap < area.TRAP_VECTORS and not within:
            error_code, regs[RIP], selector, regs[RFLAGS], regs[RSP], _ = self._pages.frames[trap]
            if selector & 3 and trap == VECTOR_PF:
                return on_trap(VECTOR_PF, error_code, self._page.q[run_page.CR2])
            if selector & 3 and trap != VECTOR_DB:
                return self.exception(on_trap, trap, error_code, selector)
        raise EngineError(f"exception {vector} (error code {error_code:#x}) in the engine's own code at {rip:#x}")

    def _syscall(self, on_trap: TrapHandler) -> bool:
        """SYSCALL has been executed, and the vCPU stopped at CPL 0 before it could say so."""
        regs = self._regs
        regs[RIP], regs[RFLAGS] = regs[RCX], regs[R11] & ENTRY_FLAGS | ALWAYS_SET
        if self._fast_path is not None:
            self._fast_path.take_over(False)
        return on_trap(TRAP_SYSCALL, 0, 0)

    def _undefined_opcode(self) -> tuple[int, int]:
        """What a #UD really is: where KVM emulates guest code it raises it for INT n, INT3 and INTO."""
        regs = self._regs
        code = self._cpu.fetch(2)
        compatibility = not self._segments.is_flat
        if code[:1] == INT3:
            regs[RIP] = advanced(regs[RIP], 1)
            return VECTOR_BP, 0
        if code[:1] == INTO and compatibility and regs[RFLAGS] & EFLAGS_OF:
            regs[RIP] = advanced(regs[RIP], 1)
            return VECTOR_OF, 0
        error_code = self._software_interrupt()
        number = error_code >> 3
        if error_code and number in (VECTOR_BP, VECTOR_OF):
            regs[RIP] = advanced(regs[RIP], 2)
            return number, 0
        return (VECTOR_GP, error_code) if error_code or self._was_refused() else (VECTOR_UD, 0)

    def _was_refused(self) -> bool:
        """Whether the processor has the instruction at RIP: then KVM's emulator made nothing of its #GP.

        That was for reserved bits in MXCSR, or an operand that is not aligned.
        """
        rip, wide = self._regs[RIP], self._segments.is_flat
        if not wide or not is_canonical(self._regs[RSP]):
            return False
        instruction = decode(self._cpu.fetch(LONGEST_INSTRUCTION), rip, wide)
        features = set(instruction.cpuid_features())
        accesses = OpKind.MEMORY in (instruction.op0_kind, instruction.op1_kind)
        return accesses and bool(features) and features <= _FEATURES

    def _software_interrupt(self) -> int:
        """The error code of the #GP that the INT n at RIP raises, 0 if it is none: some emulated processors err."""
        code = self._cpu.fetch(2)
        return code[1] << 3 | _ERROR_IDT if code[:1] == INT_N and len(code) == 2 else 0

    def tick(self, on_trap: TrapHandler) -> bool:
        """The local timer has interrupted something that is not for the fast path."""
        _, rip, selector, flags, rsp, _ = self._pages.gate_frame
        regs, fast_path = self._regs, self._fast_path
        assert fast_path is not None
        if not selector & 3:
            if rip not in (self._shared.syscall_page, *_SYSCALL32):
                raise EngineError(f"a tick in the engine's own code at {rip:#x}")
            regs[RSP] = rsp
            return self._syscall(on_trap)
        regs[RIP], regs[RSP], regs[RFLAGS] = rip, rsp, flags & ENTRY_FLAGS | ALWAYS_SET
        self._segments.look_for_far_jump(selector)
        trap = fast_path.take_over(fast_path.contains(rip))
        return on_trap(TRAP_NOTHING if trap is None else trap, 0, 0)

    def other_port(self, on_trap: TrapHandler, port: int) -> bool:
        """An OUT of no trap stub: SYSCALL from compatibility mode, or the guest's own, to the one port it can reach."""
        regs, page = self._regs, self._page
        rip = page.q[run_page.WORD_RIP]
        flags = page.q[run_page.WORD_RFLAGS]
        if page.cpl == 0:
            if port not in (area.PORT_SYSCALL32, area.PORT_SYSCALL):
                raise EngineError(f"the engine's own code at {rip:#x} wrote to port {port:#x}")
            return self._syscall(on_trap)
        rax = regs[RAX]
        if page.b[api.RUN_DETAIL] == _DIRECTION_IN:  # the kernel wants to finish the instruction first
            self._finish_io()
        regs[RAX] = rax
        regs[RIP] = self._start_of_io(rip)
        regs[RFLAGS] = flags & ENTRY_FLAGS | ALWAYS_SET
        return on_trap(VECTOR_GP, 0, 0)

    def _finish_io(self) -> None:
        """Let the kernel complete an IN whose result nobody wants, without executing anything more."""
        self._page.b[api.RUN_IMMEDIATE_EXIT] = 1
        self._page.q[run_page.DIRTY] = 0
        run_ioctl(self._fd, api.KVM_RUN, 0)
        self._page.b[api.RUN_IMMEDIATE_EXIT] = 0

    def _start_of_io(self, rip: int) -> int:
        """The address of the I/O instruction that ends at `rip` (or starts there, where KVM has not advanced RIP)."""
        read = self._cpu.read_memory
        last = read(advanced(rip, -1), 1) or b"\0"
        if last in _IO_BY_DX:
            return advanced(rip, -1)
        before = read(advanced(rip, -2), 1) or b"\0"
        if before[0] & 0xFC == 0xE4 and last[0] == area.PORT_SYSCALL:
            return advanced(rip, -2)
        return rip

    def unexpected(self) -> None:
        """An exit that no stub asked for: EngineError, or guest code that KVM cannot emulate, which counts as #UD."""
        page = self._page
        reason = page.d[run_page.EXIT_REASON]
        if page.cpl == 3 and reason == api.KVM_EXIT_INTERNAL_ERROR:
            page.read_all_registers()
            self._segments.look_for_loads()
            self._segments.look_for_far_jump(page.hardware_cs)
            return
        first, second = unpack_from("<QQ", page.b, api.RUN_DETAIL)
        name = api.EXIT_NAMES.get(reason, "?")
        rip = page.q[run_page.WORD_RIP]
        raise EngineError(f"KVM stopped for reason {reason} ({name}; {first:#x} {second:#x}) at {rip:#x}")
