"""Segment loads that the hardware cannot do, carried out from the guest's own descriptors.

The hardware descriptor table is the engine's and knows only two flat selectors, so a guest's MOV or POP to a segment
register, or LES, LDS, LFS, LGS, LSS, of any other selector faults.  The instruction is decoded here and done with
the descriptor that the guest means, checked as the processor would (Intel SDM vol. 2, MOV; vol. 3, 5.5).
"""

from __future__ import annotations

from struct import unpack
from typing import TYPE_CHECKING, Final

from iced_x86 import Decoder, Instruction, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from xenolith.abi.x86 import CS, DS, ES, FS, GS, RIP, RSP, SEGMENT_BASE, SS

if TYPE_CHECKING:
    from xenolith.machine.engines.kvm.cpu import KvmCpu

_SEGMENTS: Final = {Register.ES: ES, Register.SS: SS, Register.DS: DS, Register.FS: FS, Register.GS: GS}
_FAR_POINTER_LOADS: Final = {
    Mnemonic.LES: ES,
    Mnemonic.LDS: DS,
    Mnemonic.LSS: SS,
    Mnemonic.LFS: FS,
    Mnemonic.LGS: GS,
}
_LONGEST: Final = 15
_MASK64: Final = (1 << 64) - 1


def carry_out(cpu: KvmCpu) -> bool:
    """If the instruction at RIP loads a data segment register with a good selector: do it, with RIP after it.

    False: it is none, or the processor would refuse it as well; nothing is changed then.
    """
    bits = 64 if cpu.runs_64_bit_code else 32
    instruction = Decoder(bits, cpu.fetch(_LONGEST), ip=cpu.regs[RIP]).decode()
    if not instruction:
        return False
    mnemonic = instruction.mnemonic
    if mnemonic == Mnemonic.MOV and instruction.op0_register in _SEGMENTS:
        done = _move(cpu, instruction)
    elif mnemonic == Mnemonic.POP and instruction.op0_register in _SEGMENTS:
        done = _pop(cpu, instruction)
    elif mnemonic in _FAR_POINTER_LOADS:
        done = _load_far_pointer(cpu, instruction)
    else:
        return False
    if done:
        cpu.regs[RIP] = instruction.next_ip
    return done


def _move(cpu: KvmCpu, instruction: Instruction) -> bool:
    if instruction.op1_kind == OpKind.REGISTER:
        selector = cpu.regs[RegisterExt.number(instruction.op1_register)]
    else:
        data = cpu.read_memory(effective_address(cpu.regs, instruction, cpu.runs_64_bit_code), 2)
        if data is None:
            return False
        (selector,) = unpack("<H", data)
    return _load(cpu, _SEGMENTS[instruction.op0_register], selector & 0xFFFF)


def _pop(cpu: KvmCpu, instruction: Instruction) -> bool:
    regs = cpu.regs
    stack = regs[RSP] if cpu.runs_64_bit_code else regs[RSP] + regs[SS + SEGMENT_BASE] & 0xFFFF_FFFF
    data = cpu.read_memory(stack, 2)
    if data is None or not _load(cpu, _SEGMENTS[instruction.op0_register], unpack("<H", data)[0]):
        return False
    regs[RSP] = regs[RSP] + instruction.stack_pointer_increment & (_MASK64 if cpu.runs_64_bit_code else 0xFFFF_FFFF)
    return True


def _load_far_pointer(cpu: KvmCpu, instruction: Instruction) -> bool:
    size = MemorySizeExt.size(instruction.memory_size) - 2
    data = cpu.read_memory(effective_address(cpu.regs, instruction, cpu.runs_64_bit_code), size + 2)
    if data is None or not _load(cpu, _FAR_POINTER_LOADS[instruction.mnemonic], unpack("<H", data[size:])[0]):
        return False
    register = RegisterExt.number(instruction.op0_register)
    value = int.from_bytes(data[:size], "little")
    cpu.regs[register] = value if size > 2 else cpu.regs[register] & ~0xFFFF | value
    return True


def _load(cpu: KvmCpu, segment: int, selector: int) -> bool:
    try:
        if segment == SS:
            cpu.set_code_stack(cpu.regs[CS] & 0xFFFF, selector)
        else:
            cpu.load_selector(segment, selector)
    except ValueError:
        return False
    return True


def effective_address(regs: memoryview, instruction: Instruction, wide: bool) -> int:
    """The linear address of the memory operand; `wide`: of 64-bit code."""
    address = instruction.memory_displacement
    if not instruction.is_ip_rel_memory_operand:  # else the displacement is the address itself
        for register, scale in (
            (instruction.memory_base, 1),
            (instruction.memory_index, instruction.memory_index_scale),
        ):
            if register != Register.NONE:
                address += regs[RegisterExt.number(register)] * scale
    address &= _MASK64 if wide and not _has_32_bit_address(instruction) else 0xFFFF_FFFF
    segment = instruction.memory_segment
    if segment in (Register.FS, Register.GS) or not wide:
        address += regs[(CS if segment == Register.CS else _SEGMENTS[segment]) + SEGMENT_BASE]
    return address & (_MASK64 if wide else 0xFFFF_FFFF)


def _has_32_bit_address(instruction: Instruction) -> bool:
    return any(
        register != Register.NONE and RegisterExt.size(register) == 4
        for register in (instruction.memory_base, instruction.memory_index)
    )
