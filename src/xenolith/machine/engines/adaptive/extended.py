"""XSAVE, XSAVEOPT, XSAVEC, XRSTOR and XGETBV, carried out by Python (Intel SDM vol. 1, 13.4 and 13.6 to 13.10).

For a vCPU on Unicorn, which has x87 and SSE only, while the other components wait in an image in the standard format.
A kernel executes these at every switch of tasks; to move to KVM for each would cost more than everything else.

Only what succeeds is done here: False, with nothing changed, sends the instruction to a processor, which
knows all the ways in which it can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import pack_into, unpack_from
from typing import Final, NamedTuple

from iced_x86 import Mnemonic

from xenolith.abi.x86 import (
    INITIAL_MXCSR,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PFEC_PRESENT,
    PFEC_USER,
    PFEC_WRITE,
    PTE_A,
    PTE_D,
    PTE_P,
    PTE_RW,
    PTE_US,
    XSAVE_EXTENDED,
    XSAVE_HEADER,
    XSTATE_AVX,
    XSTATE_SSE,
    XSTATE_X87,
    is_canonical_range,
)
from xenolith.machine import page_walk
from xenolith.machine.engines.unicorn.layout import MXCSR_DEFINED
from xenolith.machine.memory import MachineMemory

LEGACY: Final = slice(0, 512)
MXCSR: Final = slice(24, 32)  # with its mask
X87_PARTS: Final = (slice(0, 24), slice(32, 160))
SSE_PART: Final = slice(160, 416)
BOTH_HAVE: Final = XSTATE_X87 | XSTATE_SSE  # Unicorn and the processor
COMPACTED: Final = 1 << 63
INITIAL_X87: Final = (b"\x7f\x03" + bytes(22), bytes(128))
ALIGNMENT: Final = 64
STORABLE: Final = PTE_P | PTE_RW | PTE_US | PTE_A
LOADABLE: Final = PTE_P | PTE_US | PTE_A

SAVES: Final = (Mnemonic.XSAVE64, Mnemonic.XSAVEOPT64, Mnemonic.XSAVEC64)


class Component(NamedTuple):
    """An extended component: its bytes in the standard format, and whether the compacted one aligns it."""

    number: int
    start: int
    size: int
    aligned: bool


def components(xcr0: int, cpuid: Callable[[int, int], tuple[int, int, int, int]]) -> list[Component]:
    """The extended components of an XCR0, from CPUID leaf 13."""
    found = []
    for number in range(2, 63):
        if xcr0 >> number & 1:
            size, start, flags, _ = cpuid(0xD, number)
            found.append(Component(number, start, size, bool(flags & 2)))
    return found


def _placed(extended: list[Component], present: int, compacted: bool) -> Iterator[tuple[Component, int]]:
    """The components of `present`, each with where it lies in an image."""
    offset = XSAVE_EXTENDED
    for component in extended:
        if not present >> component.number & 1:
            continue
        if compacted and component.aligned:
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
        yield component, offset if compacted else component.start
        offset += component.size


def _end(extended: list[Component], present: int, compacted: bool) -> int:
    return max((start + part.size for part, start in _placed(extended, present, compacted)), default=XSAVE_EXTENDED)


def bring_up_to_date(image: bytearray, store: Callable[[bytearray], None]) -> bytearray:
    """The image, with what Unicorn has of the state, which `store` writes; that counts as not in its initial state."""
    others = int.from_bytes(image[XSAVE_HEADER : XSAVE_HEADER + 8], "little") & ~BOTH_HAVE
    store(image)
    image[XSAVE_HEADER : XSAVE_HEADER + 8] = (others | BOTH_HAVE).to_bytes(8, "little")
    return image


def save(mnemonic: int, image: bytearray, xcr0: int, requested: int, extended: list[Component], area: Area) -> bool:
    """Carry out one of SAVES: from `image`, in the standard format, to memory."""
    requested &= xcr0
    compacted = mnemonic == Mnemonic.XSAVEC64
    size = _end(extended, requested, compacted)
    data = area.read(size, writable=True)
    if data is None:
        return False
    (used,) = unpack_from("<Q", image, XSAVE_HEADER)
    stored = requested & used if compacted else requested
    if stored & XSTATE_X87:
        for part in X87_PARTS:
            data[part] = image[part]
    if stored & XSTATE_SSE:
        data[SSE_PART] = image[SSE_PART]
    if requested & (XSTATE_SSE if compacted else XSTATE_SSE | XSTATE_AVX):
        data[MXCSR] = image[MXCSR]
    for component, start in _placed(extended, requested, compacted):
        bit = 1 << component.number
        if stored & bit:
            kept = image[component.start : component.start + component.size]
            data[start : start + component.size] = kept if used & bit else bytes(component.size)
    if compacted:
        pack_into("<QQ", data, XSAVE_HEADER, stored, COMPACTED | requested)
    else:
        (others,) = unpack_from("<Q", data, XSAVE_HEADER)
        pack_into("<Q", data, XSAVE_HEADER, others & ~requested | requested & used)
    area.write(data)
    return True


def in_use(image: bytes | bytearray, extended: list[Component]) -> bool:
    """Whether an image in the standard format has an extended component with anything but zeros.

    Some processors note every such component as in use once it was touched, though VZEROUPPER has emptied it.
    """
    (components,) = unpack_from("<Q", image, XSAVE_HEADER)
    return any(components >> part.number & 1 and any(image[part.start : part.start + part.size]) for part in extended)


def restore(
    image: bytearray, xcr0: int, requested: int, extended: list[Component], area: Area, wide: bool = False
) -> bool:
    """Carry out XRSTOR: from memory to `image`; unless `wide`, not if there are extended components but zeros."""
    requested &= xcr0
    head = area.read(XSAVE_EXTENDED)
    if head is None:
        return False
    given, layout, *reserved = unpack_from("<8Q", head, XSAVE_HEADER)
    compacted = bool(layout & COMPACTED)
    layout &= ~COMPACTED
    if any(reserved) or given & ~(layout if compacted else xcr0) or layout & ~xcr0 or (layout and not compacted):
        return False
    present = layout if compacted else requested
    data = area.read(_end(extended, present, compacted))
    if data is None:
        return False
    used = [
        (component, start)
        for component, start in _placed(extended, present, compacted)
        if (requested & given) >> component.number & 1 and any(data[start : start + component.size])
    ]
    if used and not wide:  # whoever is in the middle of something with wide vectors had better go on on a processor
        return False
    (mxcsr,) = unpack_from("<I", data, MXCSR.start)
    loads_mxcsr = requested & given & XSTATE_SSE if compacted else requested & (XSTATE_SSE | XSTATE_AVX)
    if loads_mxcsr and mxcsr & ~MXCSR_DEFINED:
        return False
    (before,) = unpack_from("<Q", image, XSAVE_HEADER)
    if requested & XSTATE_X87:
        for part, initial in zip(X87_PARTS, INITIAL_X87, strict=True):
            image[part] = data[part] if given & XSTATE_X87 else initial
    if requested & XSTATE_SSE:
        image[SSE_PART] = data[SSE_PART] if given & XSTATE_SSE else bytes(256)
    if loads_mxcsr or requested & XSTATE_SSE:
        pack_into("<I", image, MXCSR.start, mxcsr if loads_mxcsr else INITIAL_MXCSR)
    now = before & ~requested | requested & given & (XSTATE_X87 | XSTATE_SSE)
    for component, start in used:
        image[component.start : component.start + component.size] = data[start : start + component.size]
        now |= 1 << component.number
    pack_into("<Q", image, XSAVE_HEADER, now)
    return True


class OperandFault(Exception):
    """The processor would raise a page fault for the memory operand."""

    def __init__(self, error_code: int, address: int) -> None:
        super().__init__(f"page fault {error_code:#x} at {address:#x}")
        self.error_code = error_code
        self.address = address


class Area:
    """The memory operand: guest memory at a linear address."""

    def __init__(self, memory: MachineMemory, l4_mfn: int, va: int) -> None:
        self._memory = memory
        self._l4_mfn = l4_mfn
        self._va = va
        self._pieces: list[slice] = []

    @property
    def frames(self) -> list[int]:
        """MFNs of what was read or written last."""
        return [piece.start >> PAGE_SHIFT for piece in self._pieces]

    def read(self, size: int, writable: bool = False) -> bytearray | None:
        """Its first bytes; None unless code at CPL 3 could read (and write) them without a change to page tables.

        Raises OperandFault where it could not at all.
        """
        if self._va % ALIGNMENT or not is_canonical_range(self._va, size):
            return None
        self._pieces = []
        needed = STORABLE if writable else LOADABLE
        va, end = self._va, self._va + size
        while va < end:
            length = min(end - va, PAGE_SIZE - (va & PAGE_MASK))
            address = page_walk.permitted(self._memory, self._l4_mfn, va, needed, PTE_D if writable else 0)
            if address is None:
                self._check_rights(va, writable)
                return None
            self._pieces.append(slice(address, address + length))
            va += length
        return bytearray(b"".join(self._memory.b[piece] for piece in self._pieces))

    def _check_rights(self, va: int, writable: bool) -> None:
        rights = PTE_P | PTE_US | (PTE_RW if writable else 0)
        if page_walk.permitted(self._memory, self._l4_mfn, va, rights) is not None:
            return  # another fault, or accessed and dirty bits are to be set
        present = page_walk.machine_address(self._memory, self._l4_mfn, va) is not None
        raise OperandFault(PFEC_USER | (PFEC_WRITE if writable else 0) | (PFEC_PRESENT if present else 0), va)

    def write(self, data: bytearray) -> None:
        """Write what was read back, changed."""
        offset = 0
        for piece in self._pieces:
            length = piece.stop - piece.start
            self._memory.b[piece] = data[offset : offset + length]
            offset += length
