"""Loads from the machine-to-physical table at the address that the ABI fixes, where an engine cannot reach it.

Every guest may read the table (public/arch-x86/xen-x86_64.h, MACH2PHYS_VIRT_START), and its page tables say so.  But
some KVMs keep that part of the address space to themselves, so there a load from it faults all the same, and is carried
out here: with the guest's rights, by the guest's tables.  What loads no general register is the guest's own fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from iced_x86 import ConditionCode, Instruction, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from xenolith.abi.layout import MACH2PHYS_VIRT_END, MACH2PHYS_VIRT_START
from xenolith.abi.x86 import EFLAGS_CF, EFLAGS_DF, EFLAGS_STATUS, MASK64, RAX, RCX, RDI, RIP, RSI, RSP, advanced
from xenolith.machine import status_flags
from xenolith.machine.operands import HIGH_BYTES, GuestFault, GuestView, decode, effective_address

if TYPE_CHECKING:
    from iced_x86 import ConditionCode_, Register_

    from xenolith.hypervisor.domain import Vcpu
    from xenolith.machine.engines.protocol import Cpu

REPETITIONS: Final = 1024  # of a string instruction in one trap
_EXTENDING: Final = {Mnemonic.MOVZX: False, Mnemonic.MOVSX: True, Mnemonic.MOVSXD: True}
_STRINGS: Final = {
    Mnemonic.LODSB: 1,
    Mnemonic.LODSW: 2,
    Mnemonic.LODSD: 4,
    Mnemonic.LODSQ: 8,
    Mnemonic.MOVSB: 1,
    Mnemonic.MOVSW: 2,
    Mnemonic.MOVSD: 4,
    Mnemonic.MOVSQ: 8,
}
_Flags = Callable[[int, int, int], int]
# What they leave in the destination, and in the flags; by left and right operand and the operands' mask.
_ARITHMETIC: Final[dict[int, tuple[Callable[[int, int], int] | None, _Flags]]] = {
    Mnemonic.CMP: (None, status_flags.of_subtraction),
    Mnemonic.TEST: (None, lambda left, right, mask: status_flags.of_result(left & right, mask)),
    Mnemonic.ADD: (lambda left, right: left + right, status_flags.of_addition),
    Mnemonic.SUB: (lambda left, right: left - right, status_flags.of_subtraction),
    Mnemonic.AND: (
        lambda left, right: left & right,
        lambda left, right, mask: status_flags.of_result(left & right, mask),
    ),
    Mnemonic.OR: (
        lambda left, right: left | right,
        lambda left, right, mask: status_flags.of_result(left | right, mask),
    ),
    Mnemonic.XOR: (
        lambda left, right: left ^ right,
        lambda left, right, mask: status_flags.of_result(left ^ right, mask),
    ),
}


def is_in_table(address: int) -> bool:
    """Whether the table may be there."""
    return MACH2PHYS_VIRT_START <= address < MACH2PHYS_VIRT_END


def carry_out(vcpu: Vcpu, cpu: Cpu) -> bool:
    """Carry out the instruction at RIP if it loads from the table; False: the fault is the guest's own."""
    if vcpu.compatibility:
        return False
    try:
        return _Load(vcpu, cpu).carry_out()
    except GuestFault:
        return False


class _Load:
    def __init__(self, vcpu: Vcpu, cpu: Cpu) -> None:
        self._cpu = cpu
        self._regs = regs = cpu.regs
        self._view = GuestView(vcpu.domain.memory, vcpu.kernel_l4 if vcpu.kernel_mode else vcpu.user_l4)
        self._instruction = decode(self._view.fetch(regs[RIP]), regs[RIP], wide=True)

    def carry_out(self) -> bool:
        instruction = self._instruction
        if instruction.has_lock_prefix:
            return False
        if instruction.mnemonic in _STRINGS and instruction.op1_kind in (OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_ESI):
            return self._string(_STRINGS[instruction.mnemonic])
        if OpKind.MEMORY not in (instruction.op0_kind, instruction.op1_kind):
            return False
        size = MemorySizeExt.size(instruction.memory_size)
        va = effective_address(self._regs, instruction, wide=True)
        if size not in (1, 2, 4, 8) or not is_in_table(va):
            return False
        value = int.from_bytes(self._view.load(va, size), "little")
        if not self._execute(instruction, value, size):
            return False
        self._regs[RIP] = instruction.next_ip
        return True

    def _execute(self, instruction: Instruction, value: int, size: int) -> bool:
        mnemonic = instruction.mnemonic
        condition = instruction.condition_code
        if mnemonic == Mnemonic.PUSH:
            self._view.store(advanced(self._regs[RSP], -size), value.to_bytes(size, "little"), of_stack=True)
            self._regs[RSP] = advanced(self._regs[RSP], -size)
        elif mnemonic in _ARITHMETIC:
            return self._calculate(instruction, value, (1 << 8 * size) - 1)
        elif instruction.op0_kind != OpKind.REGISTER or not RegisterExt.is_gpr(instruction.op0_register):
            return False
        elif mnemonic == Mnemonic.MOV:
            self._write(instruction.op0_register, value)
        elif mnemonic in _EXTENDING:
            negative = _EXTENDING[mnemonic] and value >> 8 * size - 1
            self._write(instruction.op0_register, value - (1 << 8 * size) if negative else value)
        elif condition != ConditionCode.NONE and mnemonic not in _ARITHMETIC:
            held = self._read(instruction.op0_register)
            self._write(instruction.op0_register, value if _holds(condition, self._cpu.get_rflags()) else held)
        else:
            return False
        return True

    def _calculate(self, instruction: Instruction, value: int, mask: int) -> bool:
        combine, flags_of = _ARITHMETIC[instruction.mnemonic]
        if instruction.op0_kind == OpKind.MEMORY:
            if combine is not None:
                return False  # it would store to the table
            left, right = value, self._other(instruction, 1) & mask
        else:
            left, right = self._other(instruction, 0) & mask, value
        if combine is not None:
            self._write(instruction.op0_register, combine(left, right))
        flags = self._cpu.get_rflags() & ~EFLAGS_STATUS
        self._cpu.set_rflags(flags | flags_of(left, right, mask))
        return True

    def _other(self, instruction: Instruction, operand: int) -> int:
        """The operand that is not in memory."""
        if instruction.op_kind(operand) == OpKind.REGISTER:
            return self._read(instruction.op_register(operand))
        return instruction.immediate(operand)

    def _string(self, size: int) -> bool:
        """LODS or MOVS; as many repetitions as one trap may take, then the guest faults again."""
        instruction, regs = self._instruction, self._regs
        if instruction.op1_kind == OpKind.MEMORY_SEG_ESI or instruction.op0_kind == OpKind.MEMORY_ESEDI:
            return False
        moves = instruction.op0_kind == OpKind.MEMORY_ESRDI
        repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
        step = -size if self._cpu.get_rflags() & EFLAGS_DF else size
        done = 0
        while done < (min(regs[RCX], REPETITIONS) if repeated else 1):
            if not is_in_table(regs[RSI]):
                break
            try:
                data = self._view.load(regs[RSI], size)
                if moves:
                    self._view.store(regs[RDI], data)
            except GuestFault:
                break  # the guest meets it by itself
            if moves:
                regs[RDI] = advanced(regs[RDI], step)
            else:
                self._write(instruction.op0_register, int.from_bytes(data, "little"))
            regs[RSI] = advanced(regs[RSI], step)
            if repeated:
                regs[RCX] -= 1
            done += 1
        if not done:
            return False
        if not repeated or not regs[RCX]:
            regs[RIP] = instruction.next_ip
        return True

    def _read(self, register: Register_) -> int:
        shift = 8 if register in HIGH_BYTES else 0
        size = RegisterExt.size(register)
        return self._regs[_number(register)] >> shift & (1 << 8 * size) - 1

    def _write(self, register: Register_, value: int) -> None:
        """Write a general register: 32 bits clear the upper half, fewer leave the rest as it is."""
        number, size = _number(register), RegisterExt.size(register)
        mask = (1 << 8 * size) - 1
        if size >= 4:
            self._regs[number] = value & mask
            return
        shift = 8 if register in HIGH_BYTES else 0
        self._regs[number] = self._regs[number] & ~(mask << shift) & MASK64 | (value & mask) << shift


def _number(register: Register_) -> int:
    """In instruction-encoding order, whatever its width."""
    return int(RegisterExt.full_register(register)) - Register.RAX + RAX


def _holds(condition: ConditionCode_, flags: int) -> bool:
    """Whether a condition is true (SDM vol. 1, appendix B)."""
    carry, zero = bool(flags & EFLAGS_CF), bool(flags & status_flags.ZF)
    sign, overflow, parity = (bool(flags & bit) for bit in (status_flags.SF, status_flags.OF, status_flags.PF))
    return {
        ConditionCode.O: overflow,
        ConditionCode.NO: not overflow,
        ConditionCode.B: carry,
        ConditionCode.AE: not carry,
        ConditionCode.E: zero,
        ConditionCode.NE: not zero,
        ConditionCode.BE: carry or zero,
        ConditionCode.A: not (carry or zero),
        ConditionCode.S: sign,
        ConditionCode.NS: not sign,
        ConditionCode.P: parity,
        ConditionCode.NP: not parity,
        ConditionCode.L: sign != overflow,
        ConditionCode.GE: sign == overflow,
        ConditionCode.LE: zero or sign != overflow,
        ConditionCode.G: not zero and sign == overflow,
    }[condition]
