"""Walking page tables from outside, as the processor does (Intel SDM vol. 3, 4.5).

Only presence is looked at: what is read this way is what the processor reads with its own rights (descriptors), or
instructions that it has just fetched.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi.x86 import L2_SHIFT, L3_SHIFT, L4_SHIFT, PAGE_MASK, PTE_ADDRESS, PTE_P, PTE_PSE
from xenolith.machine.memory import MachineMemory

_INDEX: Final = 511
_LEVELS: Final = (L4_SHIFT, L3_SHIFT, L2_SHIFT)


def machine_address(memory: MachineMemory, l4_mfn: int, va: int) -> int | None:
    """The machine address that linear address `va` maps to; None if it maps to nothing in the machine."""
    q = memory.q
    table = l4_mfn << 12
    for shift in _LEVELS:
        if table >= memory.size:
            return None
        entry = q[(table >> 3) + (va >> shift & _INDEX)]
        if not entry & PTE_P:
            return None
        table = entry & PTE_ADDRESS
        if entry & PTE_PSE and shift != L4_SHIFT:
            offset = va & (1 << shift) - 1
            address = (table & -(1 << shift)) + offset
            return address if address < memory.size else None
    if table >= memory.size:
        return None
    entry = q[(table >> 3) + (va >> 12 & _INDEX)]
    address = (entry & PTE_ADDRESS) + (va & PAGE_MASK)
    return address if entry & PTE_P and address < memory.size else None


def read(memory: MachineMemory, l4_mfn: int, va: int, size: int) -> bytes | None:
    """`size` bytes (at most a page) from linear address `va`; None if any of them is not mapped."""
    data = b""
    while len(data) < size:
        start = va + len(data) & (1 << 64) - 1
        address = machine_address(memory, l4_mfn, start)
        if address is None:
            return None
        end = min(size - len(data), PAGE_MASK + 1 - (start & PAGE_MASK))
        data += bytes(memory.b[address : address + end])
    return data
