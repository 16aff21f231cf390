"""The way into the guest by the entry stubs (area.EntryStubs), which forget stale translations at CPL 0 first."""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from typing import Final

from xenolith.abi.x86 import DS, EFLAGS_RESERVED_ONE, ES, FS, GS, PAGE_SHIFT
from xenolith.machine.engines.kvm import api, area, kicks, run_page
from xenolith.machine.engines.kvm.api import run_ioctl
from xenolith.machine.engines.kvm.changes import Changes
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.kvm.run_page import RunPage
from xenolith.machine.engines.kvm.segment_registers import CODE0, DATA0, FLAT_CODE, FLAT_STACK, SegmentRegisters
from xenolith.machine.engines.protocol import ALWAYS_SET, EngineError

Piece = tuple[int, list[int]]  # a stub and its operands
_FLAT_SELECTOR: Final = area.USER_DATA & 0xFFFC


class Entry:
    """That of one vCPU."""

    def __init__(
        self,
        fd: int,
        page: RunPage,
        pages: area.CpuPages,
        stubs: area.EntryStubs,
        segments: SegmentRegisters,
        changes: Changes,
        shared: KvmFields,
    ) -> None:
        self._fd = fd
        self._page = page
        self._pages = pages
        self._stubs = stubs
        self._segments = segments
        self._changes = changes
        self._shared = shared

    def divert(self) -> None:
        """Make the entry that kvm_run holds go through the stubs first."""
        q, stubs, shared = self._page.q, self._stubs, self._shared
        shared.flush = False
        if shared.shadows:  # KVM's shadow follows the tables, but for the entries that are noted
            noted, entries, tables = self._changes.pending()
            while len(entries) > stubs.MOST or len(tables) > stubs.MOST:
                self._rewrite_apart(entries[: stubs.MOST], tables[: stubs.MOST])
                del entries[: stubs.MOST], tables[: stubs.MOST]
            pieces = self._rewriting(entries, tables)
            shared.rewriting = noted
        else:
            pieces = [(stubs.flush, [q[run_page.CR3]])]
        if not pieces:
            return
        if not self._segments.is_flat:  # IRETQ would look for a descriptor
            self._run_apart(pieces)
            return
        flags, rsp = q[run_page.WORD_RFLAGS], q[run_page.RSP]
        frame = [q[run_page.WORD_RIP], area.USER_CODE64, flags, rsp, area.USER_DATA]
        self._start(pieces + [(stubs.go, [q[run_page.RDI], *frame])])

    def info_moved(self) -> None:
        """An entry of the area changed, which this vCPU alone uses: have KVM drop all it knows of its table."""
        if self._shared.shadows:
            self._rewrite_apart([], [self._pages.info_table])
        else:
            self._shared.flush = True

    def take_selectors(self, regs: memoryview) -> None:
        """Find out which data-segment selectors guest code has loaded by itself, and leave null ones behind.

        For a vCPU that goes elsewhere, where KVM does not tell (`HostTraits.keeps_selectors`): guest code could load
        and unload the flat segment that hardware has, unseen.  A Linux kernel does when a program starts, with a
        hypercall in between, and it forgets the FS base of a program whose selector is not null.
        """
        page, q = self._page, self._page.q
        saved = bytes(page.b[run_page.GUEST])
        q[run_page.WORD_RIP] = area.HypervisorArea.TAKE_SELECTORS
        q[run_page.WORD_RFLAGS] = ALWAYS_SET
        page.b[run_page.CS_IMAGE] = FLAT_CODE
        page.b[run_page.SS_IMAGE] = FLAT_STACK
        self._run(area.PORT_SYSCALL)
        rax, rbx, rcx, rdx = q[run_page.FIRST : run_page.FIRST + 4]
        page.b[run_page.GUEST] = saved
        for index, selector in ((FS, rax), (GS, rcx), (DS, rdx), (ES, rbx)):
            if selector & 0xFFFC or regs[index] & 0xFFFC == _FLAT_SELECTOR:
                regs[index] = selector & 0xFFFF

    def runs_pages_of_cpl3(self) -> bool:
        """Whether the virtual processor executes at CPL 0 what CPL 3 may execute: it has no SMEP then.

        Only where the system-call page is such a page; for a vCPU that nobody uses any more.
        """
        self._start([(area.SYSCALL_PAGE, [])])
        return self._run_to_port() == area.PORT_SYSCALL

    def _rewriting(self, entries: list[int], tables: list[int]) -> list[Piece]:
        """What rewrites these entries and whole tables."""
        pieces, stubs = [], self._stubs
        if tables:
            pieces.append((stubs.rewrite_tables(len(tables)), [area.ALIAS + (mfn << PAGE_SHIFT) + 1 for mfn in tables]))
        if entries:
            pieces.append((stubs.rewrite_entries(len(entries)), [area.ALIAS + (index << 3) for index in entries]))
        return pieces

    def _rewrite_apart(self, entries: list[int], tables: list[int]) -> None:
        self._run_apart(self._rewriting(entries, tables))

    def _run_apart(self, pieces: list[Piece]) -> None:
        """Run these in an entry of their own; what kvm_run holds of the guest stays."""
        saved = bytes(self._page.b[run_page.GUEST])
        self._start(pieces + [(self._stubs.done, [])])
        self._run(area.PORT_ENTRY_DONE)
        self._page.b[run_page.GUEST] = saved

    def _start(self, pieces: list[Piece]) -> None:
        """Write the list and point the virtual processor at its first piece."""
        page, q = self._page, self._page.q
        q[run_page.WORD_RIP], words = pieces[0]
        words = list(words)
        for stub, operands in pieces[1:]:
            words.append(stub)
            words += operands
        self._pages.list[: len(words)] = array("Q", words)
        q[run_page.RSP] = self._pages.list_va
        q[run_page.WORD_RFLAGS] = EFLAGS_RESERVED_ONE
        page.b[run_page.CS_IMAGE] = CODE0
        page.b[run_page.SS_IMAGE] = DATA0

    def _run(self, done: int) -> None:
        """Run what kvm_run holds until it says, by this port, that it is done."""
        port = self._run_to_port()
        if port != done:
            raise EngineError(f"the engine's entry code stopped at {self._page.q[run_page.WORD_RIP]:#x}, port {port}")

    def _run_to_port(self) -> int:
        """Run what kvm_run holds until it writes to a port; -1 for another exit."""
        page, q = self._page, self._page.q
        interrupted = False
        q[run_page.DIRTY] = run_page.WRITTEN
        while run_ioctl(self._fd, api.KVM_RUN, 0):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise EngineError(f"KVM_RUN failed: {os.strerror(number)}")
            interrupted |= kicks.swallow()
            q[run_page.DIRTY] = 0
        if interrupted:
            kicks.repeat()
        return page.h[run_page.PORT] if page.d[run_page.EXIT_REASON] == api.KVM_EXIT_IO else -1
