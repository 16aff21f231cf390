"""One Unicorn instance: its memory, its private state, and the machine code that works on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_uint64, c_void_p
from typing import Any, Final

import numpy as np

from xenolith.abi.x86 import (
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    MSR_EFER,
    XSTATE_SSE,
    XSTATE_X87,
)
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.engines.unicorn import layout, library, softmmu, stubs
from xenolith.machine.engines.unicorn.code_page import CodePage
from xenolith.machine.engines.unicorn.library import Library
from xenolith.machine.memory import MachineMemory

PAGES_IN_LEAF: Final = 1024  # of QEMU's radix tree of pages with code, each of three words: its first block, ...
CODE_BUFFER_BYTES: Final = 128 << 20  # of translated code; QEMU's default would reserve 1 GiB of addresses
FIRST_CODE_BYTES: Final = 32 << 20  # after these it is emptied for the first time: a kernel boots with 38 MB
BUFFER_MARGIN: Final = 64 << 10  # that QEMU leaves free, at most
CPU_MODEL: Final = 25  # Icelake-Client: of the Intel models the one with the most instructions that TCG executes
CR0: Final = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG
CR4: Final = CR4_DE | CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE | CR4_OSXSAVE


class Instance:
    """A Unicorn instance over all of machine memory, in long mode at CPL 3 on page table 0.

    `uc`, `cpu` and `env` are the addresses of uc_struct, CPUState and CPUX86State; `b`, `d` and `q` are views of the
    latter by bytes, 32-bit and 64-bit words.
    """

    def __init__(self, lib: Library, memory: MachineMemory) -> None:
        self.lib = lib
        handle = c_void_p()
        lib.check(lib.open(library.UC_ARCH_X86, library.UC_MODE_64, ctypes.byref(handle)), "opening an instance")
        self.uc = handle.value or 0
        for control, value in (
            (library.UC_CTL_CPU_MODEL, CPU_MODEL),
            (library.UC_CTL_TCG_BUFFER_SIZE, CODE_BUFFER_BYTES),
            (library.UC_CTL_USE_EXITS, 1),  # and none given: no address stops execution
        ):
            lib.check(lib.ctl(self.uc, control | 1 << 26 | 1 << 30, value), f"setting option {control}")
        error = lib.mem_map_ptr(self.uc, 0, memory.size, library.UC_PROT_ALL, memory.address)
        lib.check(error, "mapping machine memory")
        self.cpu: int = c_uint64.from_address(self.uc + layout.UC_CPU).value
        self.env = self.cpu - layout.CPU_STATE
        self.b = _view(self.env, layout.ENV_SIZE)
        self.d, self.q = self.b.cast("I"), self.b.cast("Q")
        self._checksums = np.zeros(memory.span, dtype=np.uint64)  # of frames that were executable
        self.marked = np.zeros(memory.span, dtype=np.uint8)  # frames with code: stores are noticed
        self.code_frames: int = self.marked.ctypes.data
        self._l4_of_tlb = np.zeros(2, dtype=np.uint64)  # whose translations the TLBs of kernel and user mode hold
        self._addresses = {
            "uc": self.uc,
            "cpu": self.cpu,
            "env": self.env,
            "memory": memory.address,
            "checksums": self._checksums.ctypes.data,
            "l4_of_tlb": self._l4_of_tlb.ctypes.data,
            "marked": self.marked.ctypes.data,
            "memory_size": memory.size,
            "notdirty_return": self._notdirty_return(),
            "emu_stop": lib.address("uc_emu_stop"),
            "read_eflags": lib.address("helper_read_eflags_x86_64"),
            "write_eflags": lib.address("helper_write_eflags_x86_64"),
            "raise_exception": lib.address("raise_exception_err_x86_64"),
            "tlb_flush": lib.address("tlb_flush_x86_64"),
            "tlb_flush_page": lib.address("tlb_flush_page_x86_64"),
            "tlb_flush_by_mmuidx": softmmu.flush(lib),
            "tlb_reset_dirty": lib.address("tlb_reset_dirty_x86_64"),
            "invalidate": lib.address("tb_invalidate_phys_range_x86_64"),
        }
        self._unverified = np.zeros(memory.span, dtype=np.uint8)  # see softmmu.Softmmu
        arrays = (array.ctypes.data for array in (self.marked, self._checksums, self._unverified))
        self.softmmu = softmmu.attach(lib, self.env, memory, *arrays)
        self._limit_first_code()
        self._code = CodePage()
        self._callbacks: list[Any] = []  # Unicorn holds only their addresses
        self._enter_long_mode()
        self._notice_stores_to_code()

    def call(self, listing: str, result: Any, *arguments: Any) -> Any:
        """A Python callable of this machine code, to be called after `seal`."""
        return self._code.function(stubs.encode(listing, **self._addresses), result, *arguments)

    def hook(self, kind: int, listing: str, instruction: int = 0, trap: int = 0, at: int = 0, **callbacks: Any) -> None:
        """Have Unicorn call this machine code, which calls the ctypes `callbacks`, at traps of that kind.

        `at`: the address that it calls `hook`.
        """
        addresses = {name: ctypes.cast(callback, c_void_p).value or 0 for name, callback in callbacks.items()}
        code = self._code.place(stubs.encode(listing, **self._addresses, **addresses, trap=trap, hook=at))
        self._callbacks += callbacks.values()
        handle = c_void_p()
        everywhere = 1, 0
        error = self.lib.hook_add(self.uc, ctypes.byref(handle), kind, code, None, *everywhere, instruction)
        self.lib.check(error, "adding a hook")

    def seal(self) -> None:
        """All machine code is in place."""
        self._code.seal()

    def frames_with_code(self) -> list[int]:
        """MFNs of the frames of which there are translated blocks, from QEMU's radix tree of pages with code."""
        tree = self.uc + layout.UC_PAGE_MAP
        root = c_uint64.from_address(tree).value
        size, shift, levels = (ctypes.c_int32 * 3).from_address(tree + 16)
        found: list[int] = []
        for first in range(0, self.marked.size, PAGES_IN_LEAF):
            table = c_uint64.from_address(root + 8 * (first >> shift & size - 1)).value
            for level in range(levels - 1, -1, -1):
                if table:
                    table = c_uint64.from_address(table + 8 * (first >> 10 * (level + 1) & 1023)).value
            if table:
                pages = np.ctypeslib.as_array((c_uint64 * (3 * PAGES_IN_LEAF)).from_address(table))
                found += (np.flatnonzero(pages[::3]) + first).tolist()
        return found

    def distrust_code(self, check: Callable[[int], None]) -> None:
        """Somebody else has executed the guest: translated code is good only where memory is as it was.

        `check`: UnicornCpu.executable_mapped, for frames that have to be compared at once.
        """
        distrust = softmmu.distrust_code(self.lib)
        if distrust is not None:
            distrust(self.cpu)
        else:
            for mfn in self.frames_with_code():
                check(mfn)

    def close(self) -> None:
        """Give everything back to the host; the views are dead."""
        self.q.release()
        self.d.release()
        self.b.release()
        self.lib.close(self.uc)

    def _enter_long_mode(self) -> None:
        lib = self.lib
        _view(self.uc + layout.UC_NO_EXIT_REQUEST, 1)[0] = 1  # a stop must not split a read-modify-write
        lib.update_cr4(self.env, CR4)
        efer = (c_uint64 * 2)(MSR_EFER, EFER_SCE | EFER_LME | EFER_NX)
        lib.check(lib.reg_write(self.uc, library.UC_X86_REG_MSR, efer), "setting EFER")
        lib.update_cr3(self.env, 0)
        lib.update_cr0(self.env, CR0)
        self.d[layout.HFLAGS // 4] |= layout.HF_CPL | layout.HF_KERNEL
        self.q[layout.XCR0 // 8] = XSTATE_X87 | XSTATE_SSE
        for table in (layout.LDT, layout.TR, layout.GDT, layout.IDT):
            self.b[table : table + layout.TABLE_SIZE] = bytes(layout.TABLE_SIZE)

    def _limit_first_code(self) -> None:
        """Have the buffer of translated code emptied early for the first time; QEMU then uses all of it.

        When a kernel has booted, the code that it goes on with lies scattered among what it executed once.
        """
        tcg = c_uint64.from_address(self.uc + layout.UC_TCG).value
        start = c_uint64.from_address(tcg + layout.TCG_BUFFER).value
        limit = c_uint64.from_address(tcg + layout.TCG_LIMIT)
        if not 0 <= start + CODE_BUFFER_BYTES - limit.value <= BUFFER_MARGIN:
            raise EngineError(f"Unicorn's buffer of translated code is not where Xenolith knows it; {library.ADVICE}")
        limit.value = min(limit.value, start + FIRST_CODE_BYTES)

    def _notdirty_return(self) -> int:
        symbol, offset = layout.NOTDIRTY_RETURN
        address = self.lib.address(symbol) + offset
        code = ctypes.string_at(address - layout.NOTDIRTY_CALL_SIZE, len(layout.NOTDIRTY_CODE))
        if code != layout.NOTDIRTY_CODE:
            raise EngineError(f"Unicorn's code at {symbol} + {offset:#x} is not what Xenolith knows; {library.ADVICE}")
        return address

    def _notice_stores_to_code(self) -> None:
        """Drop a frame's blocks when it is stored to through any mapping.

        As it comes, this Unicorn forgets to look after the first store through a mapping without execution right, even
        if blocks of the frame are left or come later: a kernel's direct map.  See stubs.MEMORY_MAPPING.
        """
        place = c_uint64.from_address(self.uc + layout.UC_MEMORY_MAPPING)
        find_region = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_uint64)(place.value)
        self._addresses |= {"find_region": place.value, "region": find_region(self.uc, 0)}
        place.value = self._code.place(stubs.encode(stubs.MEMORY_MAPPING, **self._addresses))
        self.hook(library.UC_HOOK_MEM_FETCH_PROT, stubs.RETURN_FALSE)
        if self.softmmu is None:  # whose make_block does it
            self.hook(library.UC_HOOK_EDGE_GENERATED, stubs.BLOCK_MADE)


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
