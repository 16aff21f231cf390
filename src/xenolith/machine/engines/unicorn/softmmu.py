"""QEMU's software MMU with its frequent paths in C (native_softmmu.c), where there is a compiler.

*Finding blocks.*  QEMU's cache of blocks by address (tb_jmp_cache) trusts that an address still means the frame that it
meant, so every TLB flush empties it; and a PV guest asks for flushes all the time.  Ours says in which frame the block
lies, and a block is taken only if the TLB has this frame for its page now: it outlives flushes and mode switches.

*Filling the TLB.*  Page tables are read where they lie, not through QEMU's address spaces; and a page of which no block
was translated is not marked as one with code first, to be unmarked at its first store.

*System calls.*  What their handler needs is stored before they are looked at; Unicorn does it once more before it calls
a hook.

*Emptying it.*  It is noted which entries were filled, and these are emptied, not the whole table; nor tb_jmp_cache, of
which only what was used since the last flush is.  So a large TLB costs nothing, and it stays large.

What is not frequent, all faults included, is left to QEMU.  The library is reached through its linkage table, as in
exit_check.py, which changes nothing for instances other than ours: those whose CPUState has `opaque` set, which QEMU
keeps for the machine's owner and never reads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_uint32, c_uint64
from pathlib import Path
from typing import Final

from xenolith.abi import x86
from xenolith.machine import native
from xenolith.machine.engines import protocol
from xenolith.machine.engines.unicorn import layout, linkage, stubs
from xenolith.machine.engines.unicorn.code_page import CodePage
from xenolith.machine.engines.unicorn.library import Library
from xenolith.machine.memory import MachineMemory

SOURCE: Final = Path(__file__).with_name("native_softmmu.c")
BLOCKS: Final = 16384  # that are found fast: 512 KB, of which few blocks touch little
FILLED: Final = 1024  # entries of a TLB that are emptied one by one; if more were filled, it is emptied as a whole
JUMPS: Final = 256  # the same of tb_jmp_cache
LAYOUT: Final = """
    CPU_STATE CPU_JUMPS CPU_OPAQUE CPU_UC UC_CPU UC_TCG
    TLB_DIRTY TLB_DESCRIPTION TLB_DESCRIPTION_SIZE TLB_FAST TLB_FAST_SIZE TLB_ENTRY_BITS TLB_INVALID TLB_NOTDIRTY
    VICTIMS MMU_USER MMU_SYSTEM TB_PAGES TB_FLAGS TB_CFLAGS TB_CODE TB_SIZE TCG_UC TCG_LAST_OP TCG_EPILOGUE
    CALL_FUNCTION CS_BASE EIP HFLAGS EFLAGS CR3 BLOCK_EFLAGS BLOCK_CFLAGS
"""
ABI: Final = "PTE_P PTE_RW PTE_US PTE_A PTE_D PTE_PSE PTE_NX PTE_ADDRESS"
REPLACED: Final = {  # functions of the library, by our name for them
    "find_block": "tb_htable_lookup_x86_64",
    "reset_regions": "tcg_region_reset_all_x86_64",
    "make_block": "tb_gen_code_x86_64",
    "set_page": "tlb_set_page_with_attrs_x86_64",
    "flush_tlbs": "tlb_flush_by_mmuidx_x86_64",
}
CALLED: Final = {
    "gen_call": "tcg_gen_callN_x86_64",
    "lookup_tb_ptr": "helper_lookup_tb_ptr_x86_64",
    "system_call": "helper_syscall_x86_64",
    "stop": "uc_emu_stop",
    "page_of_code": "get_page_addr_code_x86_64",
    "fill_tlb": "x86_cpu_tlb_fill_x86_64",
    "reset_dirty": "tlb_reset_dirty_x86_64",
    "invalidate": "tb_invalidate_phys_range_x86_64",
}
UNLOCK: Final = "tb_exec_unlock_x86_64"


class Originals(ctypes.Structure):
    """Addresses of the library's own functions."""

    _fields_ = tuple((name, c_uint64) for name in (*REPLACED, *CALLED))


IN_C: Final = {
    "find_block": "u8 *(*{})(u8 *cpu, u64 pc, u64 cs_base, u32 flags, u32 cflags)",
    "reset_regions": "void (*{})(u8 *tcg)",
    "make_block": "u8 *(*{})(u8 *cpu, u64 pc, u64 cs_base, u32 flags, u32 cflags)",
    "set_page": "void (*{})(u8 *cpu, u64 va, u64 frame, u32 attributes, int rights, int mmu, u64 size)",
    "flush_tlbs": "void (*{})(u8 *cpu, u16 mmus)",
    "gen_call": "void (*{})(u8 *tcg, u8 *function, u8 *result, int count, u8 **arguments)",
    "lookup_tb_ptr": "u8 *{}",
    "system_call": "u8 *{}",
    "stop": "int (*{})(u8 *uc)",
    "page_of_code": "u64 (*{})(u8 *env, u64 va)",
    "reset_dirty": "void (*{})(u8 *cpu, u64 address, u64 size)",
    "invalidate": "void (*{})(u8 *uc, u64 start, u64 end)",
    "fill_tlb": "bool (*{})(u8 *cpu, u64 va, int size, int access, int mmu, bool probe, u64 return_address)",
}


class Softmmu(ctypes.Structure):
    """What the C code keeps of an instance."""

    _fields_ = (
        ("memory", c_uint64),  # host address of machine memory
        ("memory_size", c_uint64),
        ("marked", c_uint64),  # host address of Instance's marks of frames with code
        ("checksums", c_uint64),  # host address of Instance's checksums of frames
        ("unverified", c_uint64),  # of a byte for each: compare it with its checksum before its code is executed
        ("watched", c_uint64),  # breakpoints on data are armed: pages with some are QEMU's to fill
        ("fetching", c_uint64),  # in QEMU's tlb_fill: for an instruction
        ("system_call", c_uint64),  # deliver.c's function for them, if they are native code's; and what it gets
        ("hook", c_uint64),
        ("translating", c_uint64),  # TSC ticks that translation has taken so far
        ("jumps", c_uint64),  # entries of tb_jmp_cache that may be other than empty
        ("jump", c_uint32 * JUMPS),
        ("filled", c_uint64 * (2 * (2 + FILLED // 2))),  # of each mode's TLB: struct filled
        ("blocks", c_uint64 * (4 * BLOCKS)),  # struct block
    )

    def code_of(self, pc: int, flags: int) -> int:
        """Where the machine code of this block lies; 0: it is not known."""
        place = 4 * ((pc >> 2 ^ pc >> 16 ^ flags >> 27) & BLOCKS - 1)
        found, _, found_flags, code = self.blocks[place : place + 4]
        return int(code) if (found, found_flags) == (pc, flags) else 0


def translation(env: int, va: int) -> tuple[int, ...]:
    """What the TLB in use has for this page: addresses to read, write and execute, machine and host address.

    Without the mark of pages with code, which QEMU puts on every page at first.
    """
    mask, table = (c_uint64 * 2).from_address(env + layout.TLB_FAST + layout.MMU_USER * layout.TLB_FAST_SIZE)
    read, write, execute, machine, host = (c_uint64 * 5).from_address(
        table + (va >> x86.PAGE_SHIFT - layout.TLB_ENTRY_BITS & mask)
    )
    empty = (1 << 64) - 1
    return read, write if write == empty else write & ~layout.TLB_NOTDIRTY, execute, machine, host


class Native:
    """The C code, and what it needs: must live as long as the process."""

    def __init__(self, lib: Library, code: ctypes.PyDLL) -> None:
        self.code = code
        entries = {name: linkage.entry(lib, symbol) for name, symbol in REPLACED.items()}
        unlock = linkage.entry(lib, UNLOCK)
        originals = Originals.in_dll(code, "library")
        for name, symbol in {**REPLACED, **CALLED}.items():
            setattr(originals, name, lib.address(symbol))
        self._page = CodePage()
        stub = self._page.place(
            stubs.encode(
                stubs.UNLOCKED,
                invalidate_return=linkage.known_code(lib, *layout.INVALIDATE_RETURN),
                forget_block=self.address("forget_block"),
            )
        )
        self._page.seal()
        for name, entry in entries.items():
            entry.value = self.address(name)
        unlock.value = stub

        self.fills = lib.address(CALLED["fill_tlb"]), self.address("fill_tlb")

    def address(self, function: str) -> int:
        """Where a function of ours lies."""
        return native.function_address(self.code[function])


def declarations() -> str:
    """Of everything that native_softmmu.c uses."""
    numbers = {"BLOCKS": BLOCKS, "FILLED": FILLED, "JUMPS": JUMPS}
    return (
        native.define(layout, LAYOUT)
        + native.define(x86, ABI)
        + "".join(f"#define {name} {number}\n" for name, number in numbers.items())
        + native.declare("library", Originals, IN_C)
        + native.define(protocol, "TRAP_SYSCALL")
        + native.declare("softmmu", Softmmu, {"system_call": "bool (*{})(u32 trap, u64 error_code, u64 va, u64 hook)"})
    )


@functools.cache
def install(lib: Library) -> Native | None:
    """Put the C code in place, once per process. None where there is none.

    Raises EngineError when the library's code is not what layout.py says.
    """
    try:
        code = native.load(SOURCE, declarations())
    except native.Missing:
        return None
    return Native(lib, code)


def flush(lib: Library) -> int:
    """The address of the function that empties TLBs."""
    code = install(lib)
    return lib.address(REPLACED["flush_tlbs"]) if code is None else code.address("flush_tlbs")


def distrust_code(lib: Library) -> Callable[[int], None] | None:
    """A function for when somebody else has executed an instance's guest, with its CPUState; None without C code."""
    code = install(lib)
    if code is None:
        return None
    function = code.code["distrust_code"]
    function.argtypes, function.restype = (c_uint64,), None
    return function


def attach(
    lib: Library, env: int, memory: MachineMemory, marked: int, checksums: int, unverified: int
) -> Softmmu | None:
    """What the C code keeps of the instance with this CPUX86State, which is to live as long; None without C code."""
    code = install(lib)
    if code is None:
        return None
    state = Softmmu(
        memory=memory.address, memory_size=memory.size, marked=marked, checksums=checksums, unverified=unverified
    )
    c_uint64.from_address(env + layout.CPU_OPAQUE).value = ctypes.addressof(state)
    cpu_class = c_uint64.from_address(env + layout.CPU_CLASS).value
    c_uint64.from_address(cpu_class + layout.CLASS_FILL_TLB).value = code.address("fill_tlb")
    return state
