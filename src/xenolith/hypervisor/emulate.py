"""Privileged instructions of a guest kernel (paper 3.2.1; Xen: arch/x86/pv/emul-priv-op.c, emul-inv-op.c).

A guest kernel runs at CPL 3, so privileged instructions raise #GP.  Those that have a meaning for a
paravirtual guest are carried out here; all others are the guest's own fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi import layout, x86
from xenolith.abi.x86 import (
    FS_BASE,
    GS_BASE,
    MASK32,
    PAGE_MASK,
    PAGE_SIZE,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    advanced,
    is_canonical,
)
from xenolith.hypervisor import cpuid as cpuid_policy
from xenolith.hypervisor.bounce import inject_page_fault
from xenolith.hypervisor.guest_memory import copy_from_guest, copy_to_guest
from xenolith.hypervisor.hypercalls import misc, mmu
from xenolith.machine.tsc import read_tsc

if TYPE_CHECKING:
    from collections.abc import Callable

    from xenolith.hypervisor.domain import Vcpu
    from xenolith.machine.engines.protocol import Cpu

# A timer whose counters stand still: Linux, on processors without CPUID leaf 0x16, calibrates the TSC against them, and
# would read one that is all ones 100,000 times before it gives up.
PIT_COUNTERS: Final = range(0x40, 0x43)
PAT_RESET: Final = 0x0000_0501_0007_0406
CR0_GUEST: Final = x86.CR0_PE | x86.CR0_MP | x86.CR0_ET | x86.CR0_NE | x86.CR0_WP | x86.CR0_AM | x86.CR0_PG
CR4_BASE: Final = x86.CR4_PAE | x86.CR4_OSFXSR | x86.CR4_OSXMMEXCPT | x86.CR4_OSXSAVE
CR4_GUEST: Final = x86.CR4_TSD | x86.CR4_DE | x86.CR4_OSXSAVE | x86.CR4_FSGSBASE
GUEST_EFER: Final = x86.EFER_SCE | x86.EFER_LME | x86.EFER_LMA | x86.EFER_NX
FORCED_PREFIX: Final = b"\x0f\x0bxen"
PREFIXES: Final = frozenset(b"\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65")
INSTRUCTION_LIMIT: Final = 15  # bytes (SDM vol. 2, 2.3.11)
STRING_IO_BATCH: Final = 1024  # repetitions of INS or OUTS in one trap
NOT_FINISHED: Final = -1  # instead of a length: RIP is as it should be


def fetch(vcpu: Vcpu, va: int, size: int) -> bytes:
    """Up to `size` bytes of code at `va`: as many as are readable."""
    data = copy_from_guest(vcpu, va, size)
    if data is None:
        data = copy_from_guest(vcpu, va, min(size, PAGE_SIZE - (va & PAGE_MASK))) or b""
    return data


def forced_invalid_opcode(vcpu: Vcpu, cpu: Cpu) -> bool:
    """Xen's forced-emulation prefix before CPUID: true if that was it."""
    regs = cpu.regs
    if fetch(vcpu, regs[RIP], 7) != FORCED_PREFIX + b"\x0f\xa2":
        return False
    regs[RIP] = advanced(regs[RIP], 7)
    cpuid(vcpu, regs)
    return True


def cpuid(vcpu: Vcpu, regs: memoryview) -> None:
    """Answer CPUID from the domain's policy."""
    question = cpuid_policy.asked(regs[RAX] & MASK32, regs[RCX] & MASK32)
    answer = vcpu.cpuid_answers.get(question)
    if answer is None:
        answer = cpuid_policy.answer(vcpu, *question)
        vcpu.know_cpuid(question, answer)
    regs[RAX], regs[RBX], regs[RCX], regs[RDX] = answer


def io_allowed(vcpu: Vcpu) -> bool:
    """Whether the vCPU's I/O privilege level allows CLI, STI and port instructions (Xen: iopl_ok)."""
    if vcpu.kernel_mode:
        return vcpu.iopl > 0 or vcpu.architectural_iopl  # as in ring 1, or in ring 0
    return vcpu.iopl == 3


def privileged_instruction(vcpu: Vcpu, cpu: Cpu) -> bool:
    """Carry out the instruction at RIP; False if it is the guest's own #GP."""
    regs = cpu.regs
    start = regs[RIP]
    code = fetch(vcpu, start, INSTRUCTION_LIMIT)
    position, operand16, repeated, rex = 0, False, False, 0
    while position < len(code) and code[position] in PREFIXES:
        operand16 |= code[position] == 0x66
        repeated |= code[position] in (0xF2, 0xF3)
        position += 1
    if position < len(code) and code[position] & 0xF0 == 0x40:
        rex = code[position]
        position += 1
    if position >= len(code):
        return False
    opcode = code[position]
    position += 1
    if opcode == x86.OPCODE_TWO_BYTES:
        if position >= len(code):
            return False
        length = _two_byte(vcpu, cpu, code, position, rex)
    else:
        length = _one_byte(vcpu, cpu, code, position, opcode, operand16, repeated)
    if length == 0:
        return False
    if length == NOT_FINISHED:
        return True
    regs[RIP] = advanced(start, length)
    return True


def _one_byte(vcpu: Vcpu, cpu: Cpu, code: bytes, position: int, opcode: int, operand16: bool, repeated: bool) -> int:
    """The instruction's length, 0 if it is not emulated. `position` is after the opcode."""
    regs = cpu.regs
    if opcode in (x86.OPCODE_CLI, x86.OPCODE_STI):  # allowed, without effect: the guest's own flag is the upcall mask
        return position if io_allowed(vcpu) else 0
    if opcode in (0x6C, 0x6D, 0x6E, 0x6F):  # INS, OUTS
        size = 1 if opcode in (0x6C, 0x6E) else 2 if operand16 else 4
        return _string_io(vcpu, cpu, opcode < 0x6E, size, repeated, position)
    if opcode in (0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF):  # IN, OUT: no such device
        if not io_allowed(vcpu):
            return 0
        port = regs[RDX] & 0xFFFF
        if opcode < 0xE8:
            port = code[position] if position < len(code) else 0
            position += 1
        if opcode in (0xE4, 0xEC):
            regs[RAX] = regs[RAX] & ~0xFF if port in PIT_COUNTERS else regs[RAX] | 0xFF
        elif opcode in (0xE5, 0xED):
            regs[RAX] = regs[RAX] | 0xFFFF if operand16 else MASK32
        return position if position <= len(code) else 0
    return 0


def _string_io(vcpu: Vcpu, cpu: Cpu, inward: bool, size: int, repeated: bool, length: int) -> int:
    """INS stores ones, OUTS goes nowhere. A long repetition is done in parts: RIP stays and the guest faults again."""
    if not io_allowed(vcpu):
        return 0
    regs = cpu.regs
    pointer = RDI if inward else RSI
    step = -size if cpu.get_rflags() & x86.EFLAGS_DF else size
    count = regs[RCX] if repeated else 1
    for _ in range(min(count, STRING_IO_BATCH)):
        address = regs[pointer]
        reached = copy_to_guest(vcpu, address, b"\xff" * size) if inward else copy_from_guest(vcpu, address, size)
        if not reached:
            inject_page_fault(vcpu, cpu, x86.PFEC_WRITE if inward else 0, address)
            return NOT_FINISHED
        regs[pointer] = advanced(address, step)
        if repeated:
            regs[RCX] -= 1
    return NOT_FINISHED if repeated and regs[RCX] else length


def _two_byte(vcpu: Vcpu, cpu: Cpu, code: bytes, position: int, rex: int) -> int:
    """As _one_byte, for opcodes after 0F. `position` is at the second opcode byte."""
    regs = cpu.regs
    opcode = code[position]
    position += 1
    modrm = code[position] if position < len(code) else 0
    if opcode == x86.OPCODE_CPUID:  # where the processor makes it fault
        cpuid(vcpu, regs)
        return position
    if not vcpu.kernel_mode:
        return 0
    if opcode == 0x30:  # WRMSR
        value = (regs[RDX] & MASK32) << 32 | regs[RAX] & MASK32
        return position if write_msr(vcpu, regs[RCX] & MASK32, value) else 0
    if opcode == 0x32:  # RDMSR
        value_read = read_msr(vcpu, regs[RCX] & MASK32)
        if value_read is None:
            return 0
        regs[RAX], regs[RDX] = value_read & MASK32, value_read >> 32
        return position
    if opcode in (0x20, 0x21, 0x22, 0x23):  # MOV to and from control and debug registers
        number = modrm >> 3 & 7 | (rex & 4) << 1
        register = modrm & 7 | (rex & 1) << 3
        return position + 1 if _special_register(vcpu, cpu, opcode, number, register) else 0
    if opcode == 0x06:  # CLTS
        vcpu.task_switched = False
        cpu.set_task_switched(False)
        return position
    if opcode == 0x09:  # WBINVD: no device memory, nothing to do
        return position
    if opcode == 0x31:  # RDTSC under CR4.TSD
        return 0
    if opcode == 0x01 and modrm == 0xD1:  # XSETBV
        return position + 1 if _write_xcr0(vcpu, regs) else 0
    if opcode == 0x01 and modrm >> 3 & 7 == 7 and modrm < 0xC0:  # INVLPG [base]
        address = _simple_address(regs, modrm, rex)
        if address is None:
            return 0
        cpu.flush_page(address)
        return position + 1
    return 0


def _simple_address(regs: memoryview, modrm: int, rex: int) -> int | None:
    """The address of a [register] operand; None for other forms."""
    if modrm >> 6 or modrm & 7 in (4, 5):
        return None
    return regs[modrm & 7 | (rex & 1) << 3]


def _special_register(vcpu: Vcpu, cpu: Cpu, opcode: int, number: int, register: int) -> bool:
    regs = cpu.regs
    if opcode == 0x20:
        value = read_cr(vcpu, number)
        if value is None:
            return False
        regs[register] = value
        return True
    if opcode == 0x22:
        return write_cr(vcpu, cpu, number, regs[register])
    if opcode == 0x21:
        value = misc.do_get_debugreg(vcpu, number)
        if value < 0:
            return False
        regs[register] = value
        return True
    return misc.do_set_debugreg(vcpu, number, regs[register]) == 0


def read_cr(vcpu: Vcpu, number: int) -> int | None:
    """A control register as the guest kernel sees it; None where there is none."""
    if number == 0:
        return CR0_GUEST | (x86.CR0_TS if vcpu.task_switched else 0)
    if number == 2:
        address = vcpu.info + layout.VCPU_INFO_ARCH_CR2
        return int(layout.U64.unpack_from(vcpu.domain.memory.b, address)[0])
    if number == 3:
        return vcpu.kernel_l4 << 12
    if number == 4:
        return CR4_BASE | vcpu.cr4 & CR4_GUEST
    return None


def write_cr(vcpu: Vcpu, cpu: Cpu, number: int, value: int) -> bool:
    """Write a control register; False where the guest may not."""
    if number == 0:
        if (value ^ CR0_GUEST) & ~x86.CR0_TS:
            return False
        vcpu.task_switched = bool(value & x86.CR0_TS)
        cpu.set_task_switched(vcpu.task_switched)
        return True
    if number == 2:
        address = vcpu.info + layout.VCPU_INFO_ARCH_CR2
        layout.U64.pack_into(vcpu.domain.memory.b, address, value)
        return True
    if number == 3:
        if mmu.new_base(vcpu, value >> 12):
            return False
        cpu.switch_mode(vcpu.kernel_l4, False)
        cpu.flush_tlb()
        return True
    if number == 4:
        vcpu.cr4 = value & (CR4_GUEST if cpuid_policy.has_fsgsbase(vcpu) else CR4_GUEST & ~x86.CR4_FSGSBASE)
        return True
    return False


def _write_xcr0(vcpu: Vcpu, regs: memoryview) -> bool:
    value = (regs[RDX] & MASK32) << 32 | regs[RAX] & MASK32
    engine = vcpu.domain.engine
    return bool(
        engine is not None
        and regs[RCX] & MASK32 == 0
        and x86.is_legal_xcr0(value)
        and not value & ~engine.xcr0_mask
        and vcpu.set_xcr0(value)
    )


# --- MSRs ------------------------------------------------------------------------------------------

_READABLE: Final[dict[int, Callable[[Vcpu], int]]] = {
    x86.MSR_FS_BASE: lambda vcpu: int(vcpu.regs[FS_BASE]),
    x86.MSR_GS_BASE: lambda vcpu: int(vcpu.regs[GS_BASE]),
    x86.MSR_KERNEL_GS_BASE: lambda vcpu: vcpu.other_gs_base,
    x86.MSR_EFER: lambda vcpu: GUEST_EFER,
    x86.MSR_PAT: lambda vcpu: PAT_RESET,
    x86.MSR_MISC_ENABLE: lambda vcpu: 1,
    x86.MSR_APIC_BASE: lambda vcpu: 0xFEE0_0000 | 1 << 11 | (1 << 8 if vcpu.vcpu_id == 0 else 0),
    x86.MSR_BIOS_SIGN_ID: lambda vcpu: 0,
    x86.MSR_PLATFORM_ID: lambda vcpu: 0,
    x86.MSR_TSC: lambda vcpu: x86.advanced(read_tsc(), vcpu.cpu.tsc_offset if vcpu.cpu is not None else 0),
}


def read_msr(vcpu: Vcpu, number: int) -> int | None:
    """An MSR as the guest kernel sees it; None where reading raises #GP."""
    reader = _READABLE.get(number)
    return None if reader is None else reader(vcpu)


def write_msr(vcpu: Vcpu, number: int, value: int) -> bool:
    """Write an MSR; False where that raises #GP."""
    if number in (x86.MSR_FS_BASE, x86.MSR_GS_BASE, x86.MSR_KERNEL_GS_BASE):
        if not is_canonical(value):
            return False
        if number == x86.MSR_FS_BASE:
            vcpu.regs[FS_BASE] = value
        elif number == x86.MSR_GS_BASE:
            vcpu.regs[GS_BASE] = value
        else:
            vcpu.other_gs_base = value
        return True
    if number == x86.MSR_BIOS_SIGN_ID:
        return True  # writing 0 and CPUID 1 is how the microcode revision is asked for
    if number == x86.MSR_EFER:
        return value | GUEST_EFER == GUEST_EFER
    return False
