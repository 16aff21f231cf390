"""KVM_RUN was interrupted, by a kick or the alarm, with the vCPU anywhere: in guest code, a stub, the fast path.

A trap that is half delivered must be finished first: an exception that KVM holds queued would hit whatever code runs
next, and inside a stub the registers are the stub's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import Final

from xenolith.abi.x86 import (
    OPCODE_INT3,
    OPCODE_INT_N,
    OPCODE_INTO,
    PAGE_SHIFT,
    PAGE_SIZE,
    RIP,
    VECTOR_BP,
    VECTOR_OF,
    VECTOR_PF,
    advanced,
)
from xenolith.machine import page_walk
from xenolith.machine.engines.kvm import api, area, kicks, processor, run_page
from xenolith.machine.engines.kvm.api import run_ioctl
from xenolith.machine.engines.kvm.fast_path import FastPath
from xenolith.machine.engines.kvm.kicks import Kicks
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.kvm.run_page import RunPage
from xenolith.machine.engines.kvm.segment_registers import SegmentRegisters
from xenolith.machine.engines.protocol import TRAP_SYSCALL, EngineError
from xenolith.machine.memory import MachineMemory

LOOK_AGAIN: Final = 0.0005  # s
INT3: Final = bytes((OPCODE_INT3,))
INT_N: Final = bytes((OPCODE_INT_N,))
INTO: Final = bytes((OPCODE_INTO,))


class Interruptions:
    """Those of one vCPU. `bare_l4`: see area.HypervisorArea; `unexpected` handles an exit that no stub asked for."""

    def __init__(
        self,
        fd: int,
        memory: MachineMemory,
        bare_l4: int,
        regs: memoryview,
        page: RunPage,
        segments: SegmentRegisters,
        shared: KvmFields,
        fast_path: FastPath | None,
        kicks: Kicks,
        unexpected: Callable[[], None],
    ) -> None:
        self._fd = fd
        self._memory = memory
        self._bare_l4 = bare_l4
        self._regs = regs
        self._page = page
        self._segments = segments
        self._shared = shared
        self._fast_path = fast_path
        self._kicks = kicks
        self._unexpected = unexpected

    def in_guest_code(self) -> bool:
        """True: the guest's state is in the register file; False: a trap came up meanwhile, as if nothing had been."""
        page, q = self._page, self._page.q
        while True:
            number = ctypes.get_errno()
            if number not in (errno.EINTR, errno.EAGAIN):
                raise EngineError(f"KVM_RUN failed: {os.strerror(number)}")
            kicks.swallow()
            self._shared.look = 0  # one may have been the alarm, before the guest had set its timer
            if self._fast_path is not None and self._in_fast_path(self._fast_path):
                return True
            rip = q[run_page.WORD_RIP]
            in_stub = page.cpl == 0 or rip & -PAGE_SIZE in (area.SYSCALL_PAGE, self._shared.syscall_page)
            events = page.b[run_page.EVENTS]
            queued = events[api.EVENTS_EXCEPTION_INJECTED] or events[api.EVENTS_EXCEPTION_PENDING]
            if not (in_stub or queued):
                if self._may_be_breakpoint(events[api.EVENTS_EXCEPTION_VECTOR], rip) and self._brings_one_up():
                    return False
                self._read_registers()
                if self._fast_path is not None:
                    self._fast_path.take_over(False)
                return True
            if rip & -PAGE_SIZE == area.ENTRY_STUBS:
                threading.Timer(LOOK_AGAIN, self._kicks.interrupt).start()  # it goes on in guest code without a trap
            q[run_page.DIRTY] = 0
            if not run_ioctl(self._fd, api.KVM_RUN, 0):
                if page.d[run_page.EXIT_REASON] == api.KVM_EXIT_IO:
                    return False
                self._unexpected()

    def _in_fast_path(self, fast_path: FastPath) -> bool:
        """If it was: it is as if it had been interrupted before its SYSCALL, or behind its return."""
        page, regs = self._page, self._regs
        rip = page.q[run_page.WORD_RIP]
        if page.cpl == 0:
            if rip & -PAGE_SIZE != area.GATES:
                return False
            page.read_all_registers()
            self._segments.look_for_loads()
            if not fast_path.finish_gate(rip):
                return False
        elif rip & -PAGE_SIZE != self._shared.syscall_page:
            return False
        else:
            processor.forget_exception(self._fd)  # of an instruction that counts as not executed
            self._read_registers()
        if fast_path.take_over(regs[RIP] & -PAGE_SIZE == self._shared.syscall_page) == TRAP_SYSCALL:
            regs[RIP] = advanced(regs[RIP], -2)
        return True

    def _read_registers(self) -> None:
        self._page.read_all_registers()
        self._segments.look_for_loads()
        self._segments.look_for_far_jump(self._page.hardware_cs)

    def _may_be_breakpoint(self, vector: int, rip: int) -> bool:
        """Whether KVM may hold a #BP or #OF that it has not delivered.

        It does not own up to these (api.rst: they are expected to happen again, which they do not, with RIP after the
        instruction), but the last exception's number is there.  `forget_vector` takes it away after a delivery, but a
        gate of the fast path leaves it: so the instruction that ends at `rip` must be one that raises them, too.
        """
        if vector not in (VECTOR_BP, VECTOR_OF):
            return False
        l4_mfn = self._page.q[run_page.CR3] >> PAGE_SHIFT
        before, last = (page_walk.read(self._memory, l4_mfn, advanced(rip, -back), 1) for back in (2, 1))
        if last in (None, INT3) or (last == INTO and not self._segments.is_flat):
            return True
        return last in (bytes((VECTOR_BP,)), bytes((VECTOR_OF,))) and before in (None, INT_N)

    def _brings_one_up(self) -> bool:
        """Whether an entry begins with an exception that KVM holds: then it has come up, as if nothing had been.

        The entry is on a table without any guest code: where there is none to deliver, it ends in a page fault.
        """
        page, q = self._page, self._page.q
        saved, l4_mfn = bytes(page.b[run_page.GUEST]), q[run_page.CR3] >> PAGE_SHIFT
        q[run_page.CR3] = self._bare_l4 << PAGE_SHIFT
        q[run_page.DIRTY] = api.KVM_SYNC_X86_SREGS  # to write the others would take back what KVM holds
        while run_ioctl(self._fd, api.KVM_RUN, 0):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise EngineError(f"KVM_RUN failed: {os.strerror(number)}")
            kicks.swallow()
            q[run_page.DIRTY] = 0
        if page.d[run_page.EXIT_REASON] == api.KVM_EXIT_IO and page.h[run_page.PORT] == VECTOR_PF:
            page.b[run_page.GUEST] = saved
            return False
        q[run_page.CR3] = l4_mfn << PAGE_SHIFT
        return True
