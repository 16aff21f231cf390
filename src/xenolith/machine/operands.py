"""Memory operands of instructions that ring 0 or an engine carries out in the guest's stead (Intel SDM vol. 3, 4.6).

Guest code runs at CPL 3 in both its modes, and so do these accesses: every entry on the way must be present and for
CPL 3, writable for a store, and executable for a fetch.  Where the processor would fault, GuestFault says how.

An instruction is fetched once, into a buffer that is then decoded.  Another vCPU may have changed it since the trap;
what the buffer holds is judged by itself, and gets no more than the guest could do with it.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Decoder, Instruction, MemorySizeExt, OpKind, Register, RegisterExt

from xenolith.abi.x86 import (
    CS,
    DS,
    ES,
    FS,
    GS,
    MASK32,
    MASK64,
    PAGE_MASK,
    PAGE_SIZE,
    PFEC_INSN,
    PFEC_PRESENT,
    PFEC_USER,
    PFEC_WRITE,
    PTE_A,
    PTE_D,
    PTE_P,
    PTE_RW,
    PTE_US,
    RSP,
    SEGMENT_BASE,
    SS,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_SS,
    advanced,
    is_canonical_range,
)
from xenolith.machine import page_walk
from xenolith.machine.memory import MachineMemory

LONGEST_INSTRUCTION: Final = 15
HIGH_BYTES: Final = frozenset((Register.AH, Register.CH, Register.DH, Register.BH))
SEGMENTS: Final = {
    Register.ES: ES,
    Register.CS: CS,
    Register.SS: SS,
    Register.DS: DS,
    Register.FS: FS,
    Register.GS: GS,
}
_READ: Final = PTE_P | PTE_US
_WRITE: Final = PTE_P | PTE_US | PTE_RW


class GuestFault(ValueError):
    """The exception that the processor would raise; `address` is a page fault's."""

    def __init__(self, vector: int, error_code: int, address: int = 0, why: str = "") -> None:
        super().__init__(f"{why or 'an operand'}: exception {vector}, error code {error_code:#x}, address {address:#x}")
        self.vector = vector
        self.error_code = error_code
        self.address = address


class GuestView:
    """Memory as guest code at CPL 3 sees it through one page table."""

    def __init__(self, memory: MachineMemory, l4_mfn: int) -> None:
        self._memory = memory
        self._l4_mfn = l4_mfn

    def fetch(self, va: int, size: int = LONGEST_INSTRUCTION) -> bytes:
        """Code: as many of these bytes as can be executed.  Raises GuestFault if that is none."""
        code = b""
        for start, length in _pages(va, size):
            address = page_walk.executable(self._memory, self._l4_mfn, start)
            if address is None:
                if not code:
                    raise self._fault(start, _READ, PFEC_INSN)
                break
            code += bytes(self._memory.b[address : address + length])
        return code

    def load(self, va: int, size: int, *, of_stack: bool = False) -> bytes:
        """These bytes. Raises GuestFault."""
        return b"".join(bytes(self._memory.b[piece]) for piece in self._pieces(va, size, _READ, of_stack))

    def store(self, va: int, data: bytes, *, of_stack: bool = False) -> None:
        """Store all of it or, with GuestFault, nothing."""
        done = 0
        pieces = self._pieces(va, len(data), _WRITE, of_stack)
        for piece in pieces:
            length = piece.stop - piece.start
            self._memory.b[piece] = data[done : done + length]
            done += length

    def _pieces(self, va: int, size: int, rights: int, of_stack: bool) -> list[slice]:
        if not is_canonical_range(va, size):
            raise GuestFault(VECTOR_SS if of_stack else VECTOR_GP, 0)
        pieces = []
        bits = PTE_A | PTE_D if rights & PTE_RW else PTE_A
        for start, length in _pages(va, size):
            address = page_walk.accessed(self._memory, self._l4_mfn, start, rights, bits)
            if address is None:
                raise self._fault(start, rights, PFEC_WRITE if rights & PTE_RW else 0)
            pieces.append(slice(address, address + length))
        return pieces

    def _fault(self, va: int, rights: int, kind: int) -> GuestFault:
        if not is_canonical_range(va, 1):
            return GuestFault(VECTOR_GP, 0)
        present = page_walk.machine_address(self._memory, self._l4_mfn, va) is not None
        return GuestFault(VECTOR_PF, PFEC_USER | kind | (PFEC_PRESENT if present else 0), va)


def _pages(va: int, size: int) -> list[tuple[int, int]]:
    """An operand's parts, by page: where each begins, and how long it is."""
    parts = []
    while size:
        length = min(size, PAGE_SIZE - (va & PAGE_MASK))
        parts.append((va, length))
        va += length
        size -= length
    return parts


def decode(code: bytes, rip: int, wide: bool) -> Instruction:
    """The instruction that these bytes begin with; `wide`: they are 64-bit code."""
    return Decoder(64 if wide else 32, code, ip=rip).decode()


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
    address &= _address_mask(instruction)
    segment = instruction.memory_segment
    if segment in (Register.FS, Register.GS) or not wide:
        address += regs[SEGMENTS[segment] + SEGMENT_BASE]
    return address & (MASK64 if wide else MASK32)


def of_stack(instruction: Instruction) -> bool:
    """Whether a bad address of its memory operand is #SS, not #GP."""
    return instruction.memory_segment == Register.SS


def is_stack_fault(regs: memoryview, instruction: Instruction, wide: bool) -> bool:
    """Whether an instruction that raised a fault without an error code was refused a stack address: #SS, not #GP.

    64-bit code alone: that its stack pointer, or a memory operand by way of RSP or RBP, is not canonical.
    """
    if not wide or not instruction:
        return False
    moved = instruction.stack_pointer_increment
    if moved and not is_canonical_range(advanced(regs[RSP], min(moved, 0)), abs(moved)):
        return True
    if not of_stack(instruction) or OpKind.MEMORY not in (instruction.op0_kind, instruction.op1_kind):
        return False
    size = MemorySizeExt.size(instruction.memory_size) or 1
    return not is_canonical_range(effective_address(regs, instruction, wide), size)


def _address_mask(instruction: Instruction) -> int:
    registers = (instruction.memory_base, instruction.memory_index)
    sizes = [RegisterExt.size(register) for register in registers if register != Register.NONE]
    return (1 << 8 * max(sizes, default=instruction.memory_displ_size)) - 1
