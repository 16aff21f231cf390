"""Guest memory by guest linear address: how hypercalls copy their arguments (Xen: copy_from_guest and friends).

A linear address is walked through the page table that the vCPU runs on, with the rights of guest code:
present and user bits at every level, the write bit for writing.  Page tables hold only validated entries, so
whatever a walk yields is a frame that the domain may reach.  Xen's own range is refused.  An access may cross
pages; nothing is written unless all of it can be.  The caller holds the domain's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenolith.abi.layout import HYPERVISOR_VIRT_END
from xenolith.abi.x86 import LOWER_HALF_END, PAGE_MASK, PAGE_SIZE, PTE_ADDRESS, PTE_P, PTE_RW, PTE_US

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

READ = PTE_P | PTE_US
WRITE = PTE_P | PTE_US | PTE_RW
COPY_LIMIT = 1 << 20  # bytes in one copy; no hypercall argument is larger


def translate(vcpu: Vcpu, va: int, rights: int) -> int:
    """The machine address behind a guest linear address, or -1 where guest code has not these rights.

    `rights` is READ or WRITE.  Hypervisor-reserved and non-canonical addresses give -1.
    """
    if (va >= LOWER_HALF_END and not HYPERVISOR_VIRT_END <= va < 1 << 64) or va < 0:
        return -1
    q = vcpu.domain.memory.q
    table = vcpu.kernel_l4 if vcpu.kernel_mode else vcpu.user_l4
    entry = q[table << 9 | va >> 39 & 511]
    if entry & rights != rights:
        return -1
    entry = q[(entry & PTE_ADDRESS) >> 3 | va >> 30 & 511]
    if entry & rights != rights:
        return -1
    entry = q[(entry & PTE_ADDRESS) >> 3 | va >> 21 & 511]
    if entry & rights != rights:
        return -1
    entry = q[(entry & PTE_ADDRESS) >> 3 | va >> 12 & 511]
    if entry & rights != rights:
        return -1
    return entry & PTE_ADDRESS | va & PAGE_MASK


def address_ok(va: int) -> bool:
    """Whether an address may be the guest's at all, mapped or not (Xen: guest_handle_okay)."""
    return 0 <= va < LOWER_HALF_END or HYPERVISOR_VIRT_END <= va < 1 << 64


def copy_from_guest(vcpu: Vcpu, va: int, size: int) -> bytes | None:
    """`size` bytes at a guest linear address; None where they cannot be read (the hypercall answers -EFAULT)."""
    offset = va & PAGE_MASK
    if offset + size <= PAGE_SIZE:
        address = translate(vcpu, va, READ)
        return None if address < 0 else bytes(vcpu.domain.memory.b[address : address + size])
    if size > COPY_LIMIT:
        return None
    parts = []
    while size:
        address = translate(vcpu, va, READ)
        if address < 0:
            return None
        count = min(PAGE_SIZE - (va & PAGE_MASK), size)
        parts.append(bytes(vcpu.domain.memory.b[address : address + count]))
        va += count
        size -= count
    return b"".join(parts)


def copy_to_guest(vcpu: Vcpu, va: int, data: bytes | bytearray | memoryview) -> bool:
    """Write bytes at a guest linear address; False, and nothing written, where the guest itself could not."""
    size = len(data)
    offset = va & PAGE_MASK
    if offset + size <= PAGE_SIZE:
        address = translate(vcpu, va, WRITE)
        if address < 0:
            return False
        vcpu.domain.memory.b[address : address + size] = data
        return True
    if size > COPY_LIMIT:
        return False
    pieces = []
    done = 0
    while done < size:
        address = translate(vcpu, va + done, WRITE)
        if address < 0:
            return False
        count = min(PAGE_SIZE - (va + done & PAGE_MASK), size - done)
        pieces.append((address, done, count))
        done += count
    memory = vcpu.domain.memory.b
    for address, start, count in pieces:
        memory[address : address + count] = data[start : start + count]
    return True


def read_u64(vcpu: Vcpu, va: int) -> int | None:
    """One 64-bit word at a guest linear address; None where it cannot be read."""
    if not va & 7:
        address = translate(vcpu, va, READ)
        return None if address < 0 else vcpu.domain.memory.q[address >> 3]
    data = copy_from_guest(vcpu, va, 8)
    return None if data is None else int.from_bytes(data, "little")
