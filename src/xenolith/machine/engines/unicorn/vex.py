"""Instructions that QEMU's old translator gets wrong are undefined on Unicorn: VEX-encoded ones and far transfers.

It takes a VEX prefix for nothing: it executes `vpaddd xmm1, xmm2, xmm3` as `paddd xmm1, xmm3`.  A program that found
AVX in CPUID, while its vCPU was on KVM, would compute nonsense on Unicorn.  (Those on general registers it knows.)  And
IRET, far RET, JMP and CALL do what they do outside of long mode, too; engines/segment_loads.py carries them out.

So the translator is made to see UD2 in their place: the function that translates one instruction is replaced by
stubs.TRANSLATE_INSTRUCTION, which looks at its first bytes, and the one that fetches a byte of code by
stubs.LOAD_CODE_BYTE.  Both are reached through the library's linkage table, as in exit_check.py.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

from xenolith.machine.engines.unicorn import layout, linkage, stubs
from xenolith.machine.engines.unicorn.code_page import CodePage
from xenolith.machine.engines.unicorn.library import Library

TRANSLATOR_LOOP: Final = "translator_loop_x86_64"
LOAD_CODE_BYTE: Final = "cpu_ldub_code_x86_64"
LEA_SIZE: Final = 7


@functools.cache
def install(lib: Library) -> tuple[CodePage, ctypes.Array[ctypes.c_uint64]]:
    """Do it, once per process. Raises EngineError when the library's code is not what layout.py says."""
    lea = linkage.known_code(lib, *layout.OPERATIONS_CODE)
    table = ctypes.c_uint64 * layout.OPERATIONS
    operations = table(*table.from_address(linkage.target(lea, LEA_SIZE)))
    loop, load_byte = linkage.entry(lib, TRANSLATOR_LOOP), linkage.entry(lib, LOAD_CODE_BYTE)
    addresses = {
        "translate_instruction": operations[layout.TRANSLATE_INSN],
        "operations": ctypes.addressof(operations),
        "translator_loop": lib.address(TRANSLATOR_LOOP),
        "load_byte": lib.address(LOAD_CODE_BYTE),
    }
    page = CodePage()
    operations[layout.TRANSLATE_INSN] = page.place(stubs.encode(stubs.TRANSLATE_INSTRUCTION, **addresses))
    new_loop = page.place(stubs.encode(stubs.TRANSLATE, **addresses))
    new_load_byte = page.place(stubs.encode(stubs.LOAD_CODE_BYTE, **addresses))
    page.seal()
    loop.value, load_byte.value = new_loop, new_load_byte
    return page, operations  # which must live as long as the process
