"""The kvm_run page of a virtual processor: what KVM_RUN takes and leaves (KVM_CAP_SYNC_REGS; api.rst, section 5).

Here are the general registers, the system registers and the queued exceptions as plain memory, so that no ioctl but
KVM_RUN takes part in a trap.
"""

from __future__ import annotations

import mmap
from struct import Struct, unpack_from
from typing import Final

from xenolith.abi.x86 import DS, ES, FS, FS_BASE, GS, GS_BASE, R8, R15, RFLAGS, RIP
from xenolith.machine.engines.kvm import api
from xenolith.machine.engines.protocol import ALWAYS_SET, ENTRY_FLAGS

# 64-bit words of the page
FIRST: Final = api.RUN_REGS // 8
RDI: Final = FIRST + 5
RSP: Final = FIRST + 6
WORD_R8: Final = FIRST + 8
WORD_R11: Final = FIRST + 11
WORD_RIP: Final = FIRST + 16
WORD_RFLAGS: Final = FIRST + 17
BASE_OF_FS: Final = (api.RUN_SREGS + api.SREGS_FS) // 8
BASE_OF_GS: Final = (api.RUN_SREGS + api.SREGS_GS) // 8
CR0: Final = (api.RUN_SREGS + api.SREGS_CR0) // 8
CR2: Final = (api.RUN_SREGS + api.SREGS_CR2) // 8
CR3: Final = (api.RUN_SREGS + api.SREGS_CR3) // 8
DIRTY: Final = api.RUN_DIRTY_REGS // 8
# 32-bit and 16-bit words
EXIT_REASON: Final = api.RUN_EXIT_REASON // 4
PORT: Final = api.RUN_IO_PORT // 2
# bytes
CPL: Final = api.RUN_SREGS + api.SREGS_SS + 16  # SS.DPL
HARDWARE_CS: Final = api.RUN_SREGS + api.SREGS_CS + 12
CS_IMAGE: Final = slice(api.RUN_SREGS + api.SREGS_CS, api.RUN_SREGS + api.SREGS_CS + api.SEGMENT.size)
SS_IMAGE: Final = slice(api.RUN_SREGS + api.SREGS_SS, api.RUN_SREGS + api.SREGS_SS + api.SEGMENT.size)
SEGMENT_OFFSETS: Final = {
    index: api.RUN_SREGS + offset
    for index, offset in ((ES, api.SREGS_ES), (DS, api.SREGS_DS), (FS, api.SREGS_FS), (GS, api.SREGS_GS))
}
INTERRUPTS: Final = slice(api.RUN_SREGS + api.SREGS_INTERRUPTS, api.RUN_SREGS + api.SREGS_SIZE)
EVENTS: Final = slice(api.RUN_EVENTS, api.RUN_EVENTS + api.VCPU_EVENTS_SIZE)
GUEST: Final = slice(api.RUN_REGS, api.RUN_SREGS + api.SREGS_SIZE)
WRITTEN: Final = api.KVM_SYNC_X86_REGS | api.KVM_SYNC_X86_SREGS

_FIRST: Final = Struct("<8Q")  # the eight registers whose order differs: see abi.x86 and api.RUN_REGS
_SELECTORS: Final = Struct("<8xQ16xQ16xQ16xQ")  # of DS ES FS GS: limit, selector, type, present
_SELECTORS_AT: Final = api.RUN_SREGS + api.SREGS_DS
Selectors = tuple[int, ...]
NO_SELECTORS: Final[Selectors] = _SELECTORS.unpack(bytes(_SELECTORS.size))


class RunPage:
    """The page, as bytes, 64-bit, 32-bit and 16-bit words, and its registers by way of a register file (abi.x86)."""

    def __init__(self, fd: int, size: int, regs: memoryview) -> None:
        self._map = mmap.mmap(fd, size)
        self.b = memoryview(self._map)
        self.q = self.b.cast("Q")
        self.d = self.b.cast("I")
        self.h = self.b.cast("H")
        self._regs = regs
        self._file = regs.cast("B")

    def write_registers(self) -> None:
        """From the register file, for the next entry: general registers, RIP, RFLAGS, the bases of FS and GS."""
        regs, q = self._regs, self.q
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi = _FIRST.unpack_from(self._file)
        _FIRST.pack_into(self.b, api.RUN_REGS, rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp)
        q[WORD_R8 : WORD_RFLAGS + 1] = regs[R8 : RFLAGS + 1]
        q[BASE_OF_FS] = regs[FS_BASE]
        q[BASE_OF_GS] = regs[GS_BASE]

    def read_registers(self) -> None:
        """To the register file: the general registers and the bases of FS and GS, but neither RIP nor RFLAGS."""
        regs, q = self._regs, self.q
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp = _FIRST.unpack_from(self.b, api.RUN_REGS)
        _FIRST.pack_into(self._file, 0, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi)
        regs[R8 : R15 + 1] = q[WORD_R8 : WORD_R8 + 8]
        regs[FS_BASE] = q[BASE_OF_FS]
        regs[GS_BASE] = q[BASE_OF_GS]

    def read_all_registers(self) -> None:
        """Likewise, with RIP and RFLAGS: where guest code itself has stopped."""
        self.read_registers()
        self._regs[RIP] = self.q[WORD_RIP]
        self._regs[RFLAGS] = self.q[WORD_RFLAGS] & ENTRY_FLAGS | ALWAYS_SET

    @property
    def cpl(self) -> int:
        """The privilege level at which the virtual processor stopped."""
        return self.b[CPL] & 3

    @property
    def hardware_cs(self) -> int:
        """The selector in CS."""
        return int(unpack_from("<H", self.b, HARDWARE_CS)[0])

    @property
    def selectors(self) -> Selectors:
        """Of DS, ES, FS and GS, with limits and rights: to see whether they changed."""
        return _SELECTORS.unpack_from(self.b, _SELECTORS_AT)

    def close(self) -> None:
        for view in (self._file, self.q, self.d, self.h, self.b):
            view.release()
        self._map.close()
