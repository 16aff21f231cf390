"""Loading segment registers from outside, as MOV to a segment register or IRET would (Intel SDM vol. 3, 3.4 and 6.14).

Xen's own flat descriptors are known without looking: no guest can change them.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import unpack
from typing import Final, NamedTuple

from xenolith.abi.layout import FLAT_RING3_CS32, FLAT_RING3_CS64, FLAT_RING3_SS32
from xenolith.abi.x86 import VECTOR_GP, VECTOR_NP, VECTOR_SS
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
from xenolith.machine.operands import GuestFault

SELECTOR_TI: Final = 4
SELECTOR_RPL: Final = 3

ReadDescriptor = Callable[[int], bytes | None]  # selector -> its 8 bytes, None beyond its table; GuestFault


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
    """ES, DS, FS or GS loaded at CPL 3. Raises GuestFault."""
    if not selector & ~SELECTOR_RPL:
        return NULL
    segment = _fetch(selector, read)
    flags = segment.flags
    if not flags & DESC_S or flags & (DESC_CODE | DESC_W) == DESC_CODE:
        raise _fault(VECTOR_GP, selector)
    conforming = flags & (DESC_CODE | DESC_C) == DESC_CODE | DESC_C
    if not conforming and flags >> DESC_DPL_SHIFT & 3 != 3:
        raise _fault(VECTOR_GP, selector)
    return _present(segment, selector, VECTOR_NP)


def code_segment(selector: int, read: ReadDescriptor) -> Segment:
    """CS for a return to CPL 3. Raises GuestFault."""
    segment = _fetch(selector, read)
    flags = segment.flags
    if selector & SELECTOR_RPL != 3:
        raise _fault(VECTOR_GP, selector)
    if flags & (DESC_S | DESC_CODE) != DESC_S | DESC_CODE or flags & (DESC_L | DESC_B) == DESC_L | DESC_B:
        raise _fault(VECTOR_GP, selector)
    if not flags & DESC_C and flags >> DESC_DPL_SHIFT & 3 != 3:
        raise _fault(VECTOR_GP, selector)
    return _present(segment, selector, VECTOR_NP)


def stack_segment(selector: int, read: ReadDescriptor) -> Segment:
    """SS for CPL 3. Raises GuestFault."""
    segment = _fetch(selector, read)
    flags = segment.flags
    if selector & SELECTOR_RPL != 3:
        raise _fault(VECTOR_GP, selector)
    if flags & (DESC_S | DESC_CODE | DESC_W) != DESC_S | DESC_W or flags >> DESC_DPL_SHIFT & 3 != 3:
        raise _fault(VECTOR_GP, selector)
    return _present(segment, selector, VECTOR_SS)


def _fault(vector: int, selector: int) -> GuestFault:
    return GuestFault(vector, selector & ~SELECTOR_RPL, why=f"selector {selector:#x}")


def _fetch(selector: int, read: ReadDescriptor) -> Segment:
    segment = XEN_SEGMENTS.get(selector | SELECTOR_RPL)
    if segment is not None:
        return segment
    descriptor = read(selector) if selector & ~SELECTOR_RPL else None
    if descriptor is None:
        raise _fault(VECTOR_GP, selector)
    return decode(descriptor)


def _present(segment: Segment, selector: int, vector: int) -> Segment:
    if not segment.flags & DESC_P:
        raise _fault(vector, selector)
    return segment
