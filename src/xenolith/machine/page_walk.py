"""Walking page tables from outside, as the processor does (Intel SDM vol. 3, 4.5).

`read` looks at presence only: what is read this way is what the processor reads with its own rights (descriptors).
What an instruction reads and writes is operands.GuestView's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from xenolith.abi.x86 import (
    L2_SHIFT,
    L3_SHIFT,
    L4_SHIFT,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_A,
    PTE_ADDRESS,
    PTE_NX,
    PTE_P,
    PTE_PSE,
    PTE_US,
    is_canonical,
    is_canonical_range,
)
from xenolith.machine.atomic import compare_exchange_32
from xenolith.machine.memory import MachineMemory

SOURCE: Final = Path(__file__).with_name("page_walk.c")  # `permitted` in C, for the engines' native code
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


def executable(memory: MachineMemory, l4_mfn: int, va: int) -> int | None:
    """The same, if CPL 3 can fetch code there."""
    entries = path(memory, l4_mfn, va)
    if entries is None or any(entry & (PTE_P | PTE_US | PTE_NX) != PTE_P | PTE_US for _, entry in entries):
        return None
    return _end(memory, entries, va)


def accessed(memory: MachineMemory, l4_mfn: int, va: int, needed: int, bits: int) -> int | None:
    """As `permitted`, and the entries get PTE_A and the last one PTE_D, as far as in `bits`, as the processor has it.

    The tables may change meanwhile, by other vCPUs; an entry that did is looked at again.
    """
    while True:
        entries = path(memory, l4_mfn, va)
        if entries is None or any(entry & needed != needed for _, entry in entries):
            return None
        *upper, leaf = entries
        wanted = [(index, entry, entry | bits & PTE_A) for index, entry in upper] + [(*leaf, leaf[1] | bits)]
        if all(new == entry or _replace(memory, index, entry, new) for index, entry, new in wanted):
            return _end(memory, entries, va)


def path(memory: MachineMemory, l4_mfn: int, va: int) -> list[tuple[int, int]] | None:
    """The entries on the way to `va`: index in words of machine memory, and value. None if the last is not present."""
    if not is_canonical(va):
        return None
    entries = []
    table = l4_mfn << PAGE_SHIFT
    for shift in _LEVELS:
        if table >= memory.size:
            return None
        index = (table >> 3) + (va >> shift & _INDEX)
        entry = memory.q[index]
        if not entry & PTE_P:
            return None
        entries.append((index, entry))
        if entry & PTE_PSE and shift in (L3_SHIFT, L2_SHIFT):
            break
        table = entry & PTE_ADDRESS
    return entries


def _end(memory: MachineMemory, entries: list[tuple[int, int]], va: int) -> int | None:
    """The machine address that such a path leads to."""
    inside = (1 << _LEVELS[len(entries) - 1]) - 1
    address = entries[-1][1] & PTE_ADDRESS & ~inside | va & inside
    return address if address < memory.size else None


def _replace(memory: MachineMemory, index: int, old: int, new: int) -> bool:
    """Set bits in the lower half of an entry, unless it has changed."""
    low = old & 0xFFFF_FFFF
    return compare_exchange_32(memory.address + 8 * index, low, new & 0xFFFF_FFFF) == low


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
