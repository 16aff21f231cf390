"""Loading segment registers from outside, as MOV to a segment register or IRET would (Intel SDM vol. 3, 3.4 and 6.14).

Xen's own flat descriptors are known without looking: no guest can change them.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import unpack
from typing import Final, NamedTuple

from xenolith.abi.layout import FLAT_RING3_CS32, FLAT_RING3_CS64, FLAT_RING3_SS32
from xenolith.machine.engines.unicorn.layout import (
    DESC_A,
    DESC_B,
    DESC_C,
    DESC_CODE,
    DESC_DPL_SHIFT,
    DESC_G,
    DESC_L,
    DESC_P,
    DESC_S,
    DESC_W,
    FLAT_CODE32,
    FLAT_CODE64,
    FLAT_DATA,
)

SELECTOR_TI: Final = 4
SELECTOR_RPL: Final = 3

ReadDescriptor = Callable[[int], bytes | None]  # selector -> its 8 bytes, None if there are none


class Segment(NamedTuple):
    """What the processor keeps of a segment: `flags` is the descriptor's second word."""

    base: int
    limit: int
    flags: int


NULL: Final = Segment(0, 0, 0)
XEN_SEGMENTS: Final = {
    FLAT_RING3_CS64: Segment(0, 0xFFFF_FFFF, FLAT_CODE64),
    FLAT_RING3_CS32: Segment(0, 0xFFFF_FFFF, FLAT_CODE32),
    FLAT_RING3_SS32: Segment(0, 0xFFFF_FFFF, FLAT_DATA),  # the same descriptor as FLAT_RING3_SS64 and DS32
}


def decode(descriptor: bytes) -> Segment:
    low, high = unpack("<II", descriptor)
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
    limit = low & 0xFFFF | high & 0xF_0000
    if high & DESC_G:
        limit = limit << 12 | 0xFFF
    return Segment(base, limit, high | DESC_A)


def data_segment(selector: int, read: ReadDescriptor) -> Segment:
    """ES, DS, FS or GS loaded at CPL 3. Raises ValueError where that faults."""
    if not selector & ~SELECTOR_RPL:
        return NULL
    segment = _fetch(selector, read)
    flags = segment.flags
    if not flags & DESC_S or flags & (DESC_CODE | DESC_W) == DESC_CODE:
        raise ValueError(f"selector {selector:#x} is not one of readable memory")
    conforming = flags & (DESC_CODE | DESC_C) == DESC_CODE | DESC_C
    if not conforming and flags >> DESC_DPL_SHIFT & 3 != 3:
        raise ValueError(f"selector {selector:#x} is not for CPL 3")
    return segment


def code_segment(selector: int, read: ReadDescriptor) -> Segment:
    """CS for a return to CPL 3. Raises ValueError where that faults."""
    if selector & SELECTOR_RPL != 3:
        raise ValueError(f"code selector {selector:#x} does not ask for CPL 3")
    segment = _fetch(selector, read)
    flags = segment.flags
    if flags & (DESC_S | DESC_CODE) != DESC_S | DESC_CODE or flags & (DESC_L | DESC_B) == DESC_L | DESC_B:
        raise ValueError(f"selector {selector:#x} is not one of code")
    if not flags & DESC_C and flags >> DESC_DPL_SHIFT & 3 != 3:
        raise ValueError(f"code selector {selector:#x} is not for CPL 3")
    return segment


def stack_segment(selector: int, read: ReadDescriptor) -> Segment:
    """SS for CPL 3. Raises ValueError where loading it faults."""
    if selector & SELECTOR_RPL != 3:
        raise ValueError(f"stack selector {selector:#x} does not ask for CPL 3")
    segment = _fetch(selector, read)
    flags = segment.flags
    if flags & (DESC_S | DESC_CODE | DESC_W) != DESC_S | DESC_W or flags >> DESC_DPL_SHIFT & 3 != 3:
        raise ValueError(f"selector {selector:#x} is not one of a CPL-3 stack")
    return segment


def _fetch(selector: int, read: ReadDescriptor) -> Segment:
    segment = XEN_SEGMENTS.get(selector)
    if segment is not None:
        return segment
    descriptor = read(selector) if selector & ~SELECTOR_RPL else None
    if descriptor is None:
        raise ValueError(f"there is no descriptor for selector {selector:#x}")
    segment = decode(descriptor)
    if not segment.flags & DESC_P:
        raise ValueError(f"the segment of selector {selector:#x} is not present")
    return segment
