"""A cheaper look for stop requests.

Every block that Unicorn translates begins with a call of helper_check_exit_request: a fifth of the time of a booting
Linux.  QEMU itself tests one word in line.  The translator makes that call, as all calls of helpers, by
tcg_gen_callN through the library's linkage table; replacing the entry by stubs.CALL_MADE puts the test in front.

The table belongs to the process, but the stub changes nothing for instances other than ours: those with
no_exit_request.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.unicorn import layout, library, stubs
from xenolith.machine.engines.unicorn.code_page import CodePage
from xenolith.machine.engines.unicorn.library import Library

FUNCTIONS: Final = {
    "check_exit_request": "helper_check_exit_request_x86_64",
    "gen_call": "tcg_gen_callN_x86_64",
    "temp_new": "tcg_temp_new_internal_x86_64",
    "temp_free": "tcg_temp_free_internal_x86_64",
    "const_i32": "tcg_const_i32_x86_64",
    "const_i64": "tcg_const_i64_x86_64",
    "gen_op1": "tcg_gen_op1_x86_64",
    "gen_op3": "tcg_gen_op3_x86_64",
    "gen_brcondi": "tcg_gen_brcondi_i32_x86_64",
    "new_label": "gen_new_label_x86_64",
}
CALL_SIZE: Final = 5  # call with a 32-bit displacement
JUMP_THROUGH: Final = bytes.fromhex("ff 25")  # jmp [rip + displacement]
JUMP_SIZE: Final = 6


@functools.cache
def install(lib: Library) -> CodePage:
    """Do it, once per process. Raises EngineError when the library's code is not what layout.py says."""
    for place in layout.TRANSLATOR_CODE:
        known_code(lib, *place)
    slot = gen_call_slot(lib)
    addresses = {name: lib.address(symbol) for name, symbol in FUNCTIONS.items()}
    entry = linkage_entry(slot, addresses["gen_call"])
    page = CodePage()
    stub = page.place(stubs.encode(stubs.CALL_MADE, **addresses))
    page.seal()
    entry.value = stub
    return page  # which must live as long as the process


def known_code(lib: Library, symbol: str, offset: int, code: str) -> int:
    """The address behind a symbol. Raises EngineError unless this code (in hexadecimal) lies there."""
    address, expected = lib.address(symbol) + offset, bytes.fromhex(code)
    if ctypes.string_at(address, len(expected)) != expected:
        raise EngineError(f"Unicorn's code at {symbol} + {offset:#x} is not what Xenolith knows; {library.ADVICE}")
    return address


@functools.cache
def gen_call_slot(lib: Library) -> int:
    """The address of tcg_gen_callN's entry in the linkage table."""
    symbol, offset, _ = layout.TRANSLATOR_CODE[-1]
    linkage = target(lib.address(symbol) + offset, CALL_SIZE)
    if ctypes.string_at(linkage, len(JUMP_THROUGH)) != JUMP_THROUGH:
        raise EngineError(f"Unicorn does not call {FUNCTIONS['gen_call']} through a linkage table; {library.ADVICE}")
    return target(linkage, JUMP_SIZE)


def linkage_entry(slot: int, function: int) -> ctypes.c_uint64:
    """The entry of the linkage table that leads, or will once it is bound, to a function of the library."""
    entry = ctypes.c_uint64.from_address(slot)
    jump = entry.value - JUMP_SIZE
    if entry.value != function and not (
        ctypes.string_at(jump, len(JUMP_THROUGH)) == JUMP_THROUGH and target(jump, JUMP_SIZE) == slot
    ):
        raise EngineError(f"Unicorn's linkage table is not what Xenolith knows; {library.ADVICE}")
    return entry


def target(address: int, size: int) -> int:
    """Where the instruction's last four bytes, a displacement, point."""
    displacement = ctypes.c_int32.from_address(address + size - 4).value
    return address + size + displacement
