"""Direct writes to page tables (paper 3.3.3 "writable page tables"; Xen: arch/x86/pv/ro-page-fault.c).

A guest that asked for it (VMASST_TYPE_writable_pagetables) may write to an L1 table that it has mapped read-only: the
write faults and is carried out here as a validated update.  Instructions are decoded with iced-x86.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Instruction, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from xenolith.abi.hypercalls import VMASST_TYPE_writable_pagetables
from xenolith.abi.x86 import EFLAGS_CF, EFLAGS_STATUS, MASK64, PTE_ADDRESS, PTE_P, PTE_RW, RAX, RIP
from xenolith.hypervisor import paging
from xenolith.hypervisor.emulate import fetch
from xenolith.hypervisor.frames import TYPE_COUNT, TYPE_L1, TYPE_MASK, VALIDATED
from xenolith.hypervisor.hypercalls.mmu import l1_entry_index
from xenolith.machine import status_flags
from xenolith.machine.operands import HIGH_BYTES, LONGEST_INSTRUCTION, decode, effective_address

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu
    from xenolith.machine.engines.protocol import Cpu

ENABLED: Final = 1 << VMASST_TYPE_writable_pagetables

_IMMEDIATES: Final = frozenset(
    (
        OpKind.IMMEDIATE8,
        OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
        OpKind.IMMEDIATE8TO16,
        OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64,
        OpKind.IMMEDIATE32TO64,
    )
)


def emulate_write(vcpu: Vcpu, cpu: Cpu, va: int) -> bool:
    """Carry out the faulting write to `va` if it hits an L1 table of the guest's; False: it is the guest's fault."""
    domain = vcpu.domain
    if not domain.vm_assist & ENABLED:
        return False
    mapping = l1_entry_index(vcpu, va)
    if mapping < 0:
        return False
    q = domain.memory.q
    entry = q[mapping]
    mfn = (entry & PTE_ADDRESS) >> 12
    if not entry & PTE_P or entry & PTE_RW or domain.frames.owner[mfn] != domain.domid:
        return False
    info = domain.frames.type_info[mfn]
    if info & TYPE_MASK != TYPE_L1 or not info & VALIDATED or not info & TYPE_COUNT:
        return False
    domain.work_left = domain.work_limit
    if not paging.undo(domain):
        return True  # the guest tries it again
    return _carry_out(vcpu, cpu, va, mfn << 9 | va >> 3 & 511)


def _carry_out(vcpu: Vcpu, cpu: Cpu, va: int, index: int) -> bool:
    instruction = decode(fetch(vcpu, cpu.regs[RIP], LONGEST_INSTRUCTION), cpu.regs[RIP], wide=True)
    if not instruction or (instruction.op0_kind != OpKind.MEMORY and instruction.op1_kind != OpKind.MEMORY):
        return False
    size = MemorySizeExt.size(instruction.memory_size)
    if size not in (1, 2, 4, 8) or va & size - 1 or effective_address(cpu.regs, instruction, wide=True) != va:
        return False
    q = vcpu.domain.memory.q
    whole = q[index]
    shift = (va & 7) * 8
    mask = (1 << size * 8) - 1
    old = whole >> shift & mask
    outcome = _new_value(cpu, instruction, old, mask)
    if outcome is None:
        return False
    new, write_back, flags = outcome
    merged = whole & ~(mask << shift) & MASK64 | (new & mask) << shift
    if merged != whole and paging.modify_l1(vcpu.domain, index, merged):
        return False
    for register, value in write_back:
        # Writing 32 bits of a register clears the upper half, writing fewer leaves the rest as it is.
        cpu.regs[register] = value if size >= 4 else cpu.regs[register] & ~mask & MASK64 | value
    if flags is not None:
        cpu.set_rflags(cpu.get_rflags() & ~flags[0] | flags[1])
    cpu.regs[RIP] = instruction.next_ip
    return True


def _general_register(register: int) -> int:
    """Its number in instruction-encoding order, whatever its width; -1 for AH to BH and for others."""
    full = int(RegisterExt.full_register(register))  # type: ignore[arg-type]
    return full - Register.RAX if Register.RAX <= full <= Register.R15 and register not in HIGH_BYTES else -1


_Outcome = tuple[int, list[tuple[int, int]], tuple[int, int] | None]


def _new_value(cpu: Cpu, instruction: Instruction, old: int, mask: int) -> _Outcome | None:
    """The value to store, registers to write, and (flags to clear, flags to set); None if not understood."""
    regs = cpu.regs
    mnemonic = instruction.mnemonic
    source_operand = 0 if instruction.op1_kind == OpKind.MEMORY else 1
    kind = instruction.op_kind(source_operand)
    register = -1
    if kind == OpKind.REGISTER:
        register = _general_register(instruction.op_register(source_operand))
        if register < 0:
            return None
        source = regs[register] & mask
    elif kind in _IMMEDIATES:
        source = instruction.immediate(source_operand) & mask
    else:
        return None
    if mnemonic == Mnemonic.MOV:
        return source, [], None
    if mnemonic == Mnemonic.XCHG and register >= 0:
        return source, [(register, old)], None
    if mnemonic in (Mnemonic.BTR, Mnemonic.BTS, Mnemonic.BTC):
        bits = mask.bit_length()
        if register >= 0 and source >= bits:
            return None  # a bit string reaches beyond the operand
        bit = 1 << source % bits
        new = {Mnemonic.BTR: old & ~bit, Mnemonic.BTS: old | bit, Mnemonic.BTC: old ^ bit}[mnemonic]
        return new, [], (EFLAGS_CF, EFLAGS_CF if old & bit else 0)
    if mnemonic == Mnemonic.CMPXCHG and register >= 0:
        accumulator = regs[RAX] & mask
        if accumulator == old:
            return source, [], (EFLAGS_STATUS, status_flags.of_subtraction(accumulator, old, mask))
        return old, [(RAX, old)], (EFLAGS_STATUS, status_flags.of_subtraction(accumulator, old, mask))
    if mnemonic == Mnemonic.AND:
        return old & source, [], (EFLAGS_STATUS, status_flags.of_result(old & source, mask))
    if mnemonic == Mnemonic.OR:
        return old | source, [], (EFLAGS_STATUS, status_flags.of_result(old | source, mask))
    if mnemonic == Mnemonic.XOR:
        return old ^ source, [], (EFLAGS_STATUS, status_flags.of_result(old ^ source, mask))
    if mnemonic == Mnemonic.XADD and register >= 0:
        flags = status_flags.of_addition(old, source, mask)
        return old + source & mask, [(register, old)], (EFLAGS_STATUS, flags)
    return None
