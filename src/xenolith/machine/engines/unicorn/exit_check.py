"""A cheaper look for stop requests.

Every block that Unicorn translates begins with a call of helper_check_exit_request: a fifth of the time of a booting
Linux.  QEMU itself tests one word in line, and jumps to the end of the block if a stop was requested.  The translator
makes that call, as all calls of helpers, by tcg_gen_callN, and the end of a block by tcg_gen_exit_tb; both through the
library's linkage table.  Replacing the entries by stubs.CALL_MADE and stubs.EXIT_MADE does what QEMU does.

In the same place the helpers that load MXCSR get a check of its reserved bits, which QEMU does not make.

The table belongs to the process, but the stubs change nothing for instances other than ours: those with
no_exit_request.
"""

from __future__ import annotations

import functools
from typing import Final

from xenolith.machine.engines.unicorn import layout, linkage, softmmu, stubs
from xenolith.machine.engines.unicorn.code_page import CodePage
from xenolith.machine.engines.unicorn.library import Library

FUNCTIONS: Final = {
    "check_exit_request": "helper_check_exit_request_x86_64",
    "gen_call": "tcg_gen_callN_x86_64",
    "temp_new": "tcg_temp_new_internal_x86_64",
    "temp_free": "tcg_temp_free_internal_x86_64",
    "exit_tb": "tcg_gen_exit_tb_x86_64",
    "gen_op1": "tcg_gen_op1_x86_64",
    "gen_op3": "tcg_gen_op3_x86_64",
    "gen_brcondi": "tcg_gen_brcondi_i32_x86_64",
    "new_label": "gen_new_label_x86_64",
    "ldmxcsr": "helper_ldmxcsr_x86_64",
    "fxrstor": "helper_fxrstor_x86_64",
    "xrstor": "helper_xrstor_x86_64",
    "raise_exception_ra": "raise_exception_err_ra_x86_64",
    "ldl_data_ra": "cpu_ldl_data_ra_x86_64",
}


@functools.cache
def install(lib: Library) -> CodePage:
    """Do it, once per process. Raises EngineError when the library's code is not what layout.py says."""
    for place in layout.TRANSLATOR_CODE:
        linkage.known_code(lib, *place)
    call, leave = linkage.entry(lib, FUNCTIONS["gen_call"]), linkage.entry(lib, FUNCTIONS["exit_tb"])
    addresses = {name: lib.address(symbol) for name, symbol in FUNCTIONS.items()}
    native = softmmu.install(lib)
    if native is not None:
        addresses["gen_call"] = native.address("gen_call")
    page = CodePage()
    for name, listing, helper, alignment in (
        ("checked_ldmxcsr", stubs.CHECKED_LDMXCSR, "ldmxcsr", 1),
        ("checked_fxrstor", stubs.CHECKED_FXRSTOR, "fxrstor", 16),
        ("checked_xrstor", stubs.CHECKED_XRSTOR, "xrstor", 64),
    ):
        addresses[name] = page.place(
            stubs.encode(listing, **addresses, restore=addresses[helper], unaligned=alignment - 1)
        )
    stub = page.place(stubs.encode(stubs.CALL_MADE, **addresses))
    exit_stub = page.place(stubs.encode(stubs.EXIT_MADE, **addresses))
    page.seal()
    call.value, leave.value = stub, exit_stub
    return page  # which must live as long as the process
