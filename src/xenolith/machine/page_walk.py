"""Walking page tables from outside, as the processor does (Intel SDM vol. 3, 4.5).

`read` looks at presence only: what is read this way is what the processor reads with its own rights (descriptors), or
instructions that it has just fetched.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi.x86 import (
    L2_SHIFT,
    L3_SHIFT,
    L4_SHIFT,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_ADDRESS,
    PTE_P,
    PTE_PSE,
    is_canonical,
    is_canonical_range,
)
from xenolith.machine.memory import MachineMemory

_INDEX: Final = 511
_LEVELS: Final = (L4_SHIFT, L3_SHIFT, L2_SHIFT, PAGE_SHIFT)


def machine_address(memory: MachineMemory, l4_mfn: int, va: int) -> int | None:
    """The machine address that linear address `va` maps to; None if it maps to nothing in the machine."""
    return permitted(memory, l4_mfn, va, PTE_P)


def permitted(memory: MachineMemory, l4_mfn: int, va: int, needed: int, needed_of_leaf: int = 0) -> int | None:
    """The same, if all entries on the way have these bits set, and the last one those."""
    if not is_canonical(va):
        return None
    q, size = memory.q, memory.size
    table = l4_mfn << PAGE_SHIFT
    for shift in _LEVELS:
        if table >= size:
            return None
        entry = q[(table >> 3) + (va >> shift & _INDEX)]
        if entry & needed != needed:
            return None
        table = entry & PTE_ADDRESS
        if entry & PTE_PSE and shift < L4_SHIFT and shift != PAGE_SHIFT:
            table &= -(1 << shift)
            break
    else:
        shift = PAGE_SHIFT
    address = table + (va & (1 << shift) - 1)
    return address if address < size and entry & needed_of_leaf == needed_of_leaf else None


def read(memory: MachineMemory, l4_mfn: int, va: int, size: int) -> bytes | None:
    """`size` bytes (at most a page) from linear address `va`; None if any of them is not mapped.

    Nothing is beyond the end of the address space.
    """
    if not is_canonical_range(va, size):
        return None
    here = min(size, PAGE_SIZE - (va & PAGE_MASK))
    address = machine_address(memory, l4_mfn, va)
    if address is None:
        return None
    data = bytes(memory.b[address : address + here])
    if here == size:
        return data
    rest = read(memory, l4_mfn, va + here, size - here)
    return None if rest is None else data + rest
