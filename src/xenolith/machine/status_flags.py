"""The status flags of arithmetic that is carried out in the guest's stead (Intel SDM vol. 1, 3.4.3.1).

`mask` has the operand's bits set.  CF PF AF ZF SF OF are returned, all others 0.
"""

from __future__ import annotations

from typing import Final

from xenolith.abi.x86 import EFLAGS_CF

PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
OF: Final = 1 << 11


def of_result(value: int, mask: int) -> int:
    """ZF, SF and PF of a result; the others clear, as a logic operation leaves them."""
    parity = PF if (value & 0xFF).bit_count() % 2 == 0 else 0
    sign = SF if value & (mask + 1 >> 1) else 0
    return parity | sign | (ZF if value == 0 else 0)


def of_subtraction(left: int, right: int, mask: int) -> int:
    """Those of left - right."""
    result = left - right & mask
    flags = of_result(result, mask)
    if left < right:
        flags |= EFLAGS_CF
    if (left ^ right ^ result) & 0x10:
        flags |= AF
    if (left ^ right) & (left ^ result) & (mask + 1 >> 1):
        flags |= OF
    return flags


def of_addition(left: int, right: int, mask: int) -> int:
    """Those of left + right."""
    result = left + right & mask
    flags = of_result(result, mask)
    if left + right > mask:
        flags |= EFLAGS_CF
    if (left ^ right ^ result) & 0x10:
        flags |= AF
    if (left ^ result) & (right ^ result) & (mask + 1 >> 1):
        flags |= OF
    return flags
