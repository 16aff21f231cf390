"""The library's linkage table: how its functions call each other, and so where ours can go before them.

Calls of exported functions, within the library too, go through this table, whose entries may be replaced.  Each must be
what layout.py says, or it is not touched.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.unicorn import layout, library
from xenolith.machine.engines.unicorn.library import Library

CALL_SIZE: Final = 5  # call with a 32-bit displacement
JUMP_THROUGH: Final = bytes.fromhex("ff 25")  # jmp [rip + displacement]
JUMP_SIZE: Final = 6


def known_code(lib: Library, symbol: str, offset: int, code: str) -> int:
    """The address behind a symbol. Raises EngineError unless this code (in hexadecimal) lies there."""
    address, expected = lib.address(symbol) + offset, bytes.fromhex(code)
    if ctypes.string_at(address, len(expected)) != expected:
        raise EngineError(f"Unicorn's code at {symbol} + {offset:#x} is not what Xenolith knows; {library.ADVICE}")
    return address


@functools.cache
def _gen_call_slot(lib: Library) -> int:
    """The address of tcg_gen_callN's entry in the linkage table."""
    symbol, offset, _ = layout.TRANSLATOR_CODE[-1]
    linkage = target(lib.address(symbol) + offset, CALL_SIZE)
    if ctypes.string_at(linkage, len(JUMP_THROUGH)) != JUMP_THROUGH:
        raise EngineError(f"Unicorn does not call tcg_gen_callN through a linkage table; {library.ADVICE}")
    return target(linkage, JUMP_SIZE)


def entry(lib: Library, function: str) -> ctypes.c_uint64:
    """The entry of the linkage table that leads, or will once it is bound, to this function of the library.

    Raises EngineError if that is not where layout.py says.
    """
    slot = _gen_call_slot(lib) + layout.SLOTS[function]
    found = ctypes.c_uint64.from_address(slot)
    jump = found.value - JUMP_SIZE
    if found.value != lib.address(function) and not (
        ctypes.string_at(jump, len(JUMP_THROUGH)) == JUMP_THROUGH and target(jump, JUMP_SIZE) == slot
    ):
        raise EngineError(f"Unicorn's linkage table is not what Xenolith knows; {library.ADVICE}")
    return found


def target(address: int, size: int) -> int:
    """Where the instruction's last four bytes, a displacement, point."""
    displacement = ctypes.c_int32.from_address(address + size - 4).value
    return address + size + displacement
