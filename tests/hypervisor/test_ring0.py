"""Native trap handlers do exactly what the Python ones do.

Two machines are alike in every frame. On one, traps go to the native handler first and to Python's if it leaves them;
on the other to Python's alone. After each of many random traps both must be the same: registers, modes, memory, the
frame table, what was counted, and the answer to go on or not.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import partial
from random import Random
from struct import pack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenolith.abi import hypercalls as abi
from xenolith.abi import layout
from xenolith.abi.x86 import (
    EFLAGS_IF,
    PAGE_SIZE,
    PTE_A,
    PTE_ADDRESS,
    PTE_D,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_PSE,
    PTE_RW,
    PTE_US,
    R8,
    R10,
    RAX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    VECTOR_GP,
    VECTOR_PF,
)
from xenolith.hypervisor import audit, paging, ring0
from xenolith.hypervisor.domain import WORK
from xenolith.hypervisor.frames import TYPE_COUNT, TYPE_L1, TYPE_L4, TYPE_MASK, TYPE_WRITABLE
from xenolith.hypervisor.guest_memory import copy_to_guest
from xenolith.hypervisor.traps import trap_handler
from xenolith.machine import native
from xenolith.machine.engines.native_state import LEAVE, LOOK, NOT_HANDLED, EngineCalls
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_NOTHING, TRAP_SYSCALL, Cpu, register_file

from .bare import CALLBACK, DATA, PAGES, STACK, BareMachine

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native code here: {native.missing()}")

SPARE = 20  # frames that the guest owns besides, of which it may make page tables
TABLE_VA = DATA + 0x10_0000  # its L1 table, read-only
CODE = DATA
ARGUMENTS = DATA + 2 * PAGE_SIZE
USER_STACK = DATA + 5 * PAGE_SIZE
TRAPS = 120
BELLS = {natively: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for natively in (True, False)}

WORD = ctypes.c_uint64
_Signatures = {
    "get_rflags": ctypes.CFUNCTYPE(WORD, WORD),
    "set_rflags": ctypes.CFUNCTYPE(None, WORD, WORD),
    "switch_mode": ctypes.CFUNCTYPE(None, WORD, ctypes.c_bool, WORD),
    "flush_tlb": ctypes.CFUNCTYPE(None, WORD),
    "flush_page": ctypes.CFUNCTYPE(None, WORD, WORD),
    "executable_mapped": ctypes.CFUNCTYPE(None, WORD, WORD),
    "entry_changed": ctypes.CFUNCTYPE(None, WORD, WORD, WORD, WORD),
}


def test_that_native_code_was_off_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with it, in the same process, would have some of it and not the rest."""
    ring0._loaded.cache_clear()
    with monkeypatch.context() as off:
        off.setenv("XENOLITH_NATIVE", "off")
        assert ring0.lock_taker() is None
    assert ring0.lock_taker() is not None
    assert all(ring0.pin_addresses())


class RecordingCpu(Cpu):
    """Executes nothing; remembers what ring 0 asked of it, by Python or by native code."""

    def __init__(self) -> None:
        self.regs = register_file()
        self.rflags = 0x202
        self.on = (0, False)
        self.flushes = 0
        self.kicks = 0
        self.kicked: Callable[[], None] = lambda: None
        self.executable: list[int] = []
        self.changed: list[tuple[int, int, int]] = []
        self._callbacks = {
            "get_rflags": lambda _: self.rflags,
            "set_rflags": lambda value, _: self.set_rflags(value),
            "switch_mode": lambda l4, user, _: self.switch_mode(l4, user),
            "flush_tlb": lambda _: self.flush_tlb(),
            "flush_page": lambda va, _: self.flush_page(va),
            "executable_mapped": lambda mfn, _: self.executable_mapped(mfn),
            "entry_changed": lambda *arguments: self.entry_changed(*arguments[:3]),
        }
        self._functions = {name: _Signatures[name](function) for name, function in self._callbacks.items()}
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.regs))
        self._calls = EngineCalls(address, 0, **{n: _address(f) for n, f in self._functions.items()})
        self.calls = ctypes.addressof(self._calls)

    def get_rflags(self) -> int:  # type: ignore[override]
        return self.rflags

    def set_rflags(self, value: int) -> None:  # type: ignore[override]
        self.rflags = value

    def switch_mode(self, l4_mfn: int, user: bool) -> None:
        self.on = (l4_mfn, user)

    def flush_tlb(self) -> None:
        self.flushes += 1

    def flush_page(self, va: int) -> None:
        self.flushes += 1

    def kick(self) -> None:
        self.kicks += 1
        self.kicked()

    def executable_mapped(self, mfn: int) -> None:
        self.executable.append(mfn)

    def entry_changed(self, index: int, old: int, new: int) -> None:
        self.changed.append((index, old, new))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Subject:
    """A machine with one domain, whose first vCPU's traps are handled natively or not.

    More vCPUs have threads of their own, which are imagined: they leave the guest when they are kicked.
    """

    def __init__(self, natively: bool, caches_tables: bool, vcpus: int = 1) -> None:
        self.machine = BareMachine()
        self.domain = domain = self.machine.domain(vcpus)
        self.vcpu = vcpu = domain.vcpus[0]
        self.cpu = cpu = RecordingCpu()
        domain.caches_tables, domain.contexts = caches_tables, vcpus
        domain.executable_mapped, domain.entry_changed = cpu.executable_mapped, cpu.entry_changed
        domain.vm_assist = 1 << abi.VMASST_TYPE_writable_pagetables
        cpu.regs[:] = vcpu.state.regs
        vcpu.cpu, vcpu.regs, vcpu.thread = cpu, cpu.regs, threading.get_ident()
        self.others = domain.vcpus[1:]
        for other in self.others:
            other.cpu = elsewhere = RecordingCpu()
            elsewhere.kicked = partial(setattr, other, "in_guest", False)
        self.natively = natively
        vcpu.calls = cpu.calls if natively else 0
        vcpu.may_run = True
        self.handled = 0
        self.native_limit = WORK
        self.l4 = vcpu.kernel_l4
        self.l1 = self.entry_index(DATA) >> 9
        domain.max_pages += SPARE
        self.spare = [int(mfn) for mfn in self.machine.control.populate(domain.domid, SPARE)]
        assert paging.modify_l1(domain, self.entry_index(TABLE_VA), self.l1 << 12 | PTE_P | PTE_US) == 0
        self.user_l4 = self.spare[0]
        domain.memory.table(self.user_l4)[:] = domain.memory.table(self.l4)
        assert paging.get_page_and_type(domain, self.user_l4, TYPE_L4) == 0
        vcpu.user_l4 = self.user_l4
        vcpu.syscall_callback, vcpu.event_callback = CALLBACK + 64, CALLBACK
        vcpu.kernel_sp = STACK
        vcpu.trap_address[VECTOR_PF] = vcpu.trap_address[VECTOR_GP] = CALLBACK + 128
        bell = BELLS[natively]
        unbound = domain.events.alloc_unbound(0)
        port = self.machine.dom0.bind_interdomain(domain.domid, unbound)
        self.machine.dom0.set_handler(port, lambda _: os.eventfd_write(bell, 1), bell)
        self.python = trap_handler(vcpu, cpu)
        self.native = ring0.handler_address()

    def entry_index(self, va: int) -> int:
        q, table = self.domain.memory.q, self.vcpu.kernel_l4
        for shift in (39, 30, 21):
            table = q[table << 9 | va >> shift & 511] >> 12 & (1 << 40) - 1
        return table << 9 | va >> 12 & 511

    def trap(self, vector: int, error_code: int = 0, address: int = 0) -> bool:
        if self.natively:
            handler = ctypes.PYFUNCTYPE(ctypes.c_int, WORD, ctypes.c_uint32, WORD, WORD)(self.native)
            self.domain.work_limit = self.native_limit
            answer = handler(self.vcpu.address, vector, error_code, address)
            self.domain.work_limit = WORK
            if answer == LOOK:
                return self.python(TRAP_NOTHING, 0, 0)
            if answer != NOT_HANDLED:
                self.handled += 1
                return bool(answer)
        return self.python(vector, error_code, address)

    def hypercall(self) -> int:
        """A system call that is made again for as long as ring 0 wants; how many traps it took."""
        after = self.cpu.regs[RIP]
        for traps in range(1, 100_000):
            self.trap(TRAP_SYSCALL)
            if self.cpu.regs[RIP] != after - 2:
                return traps
            self.cpu.regs[RIP] = after
        raise AssertionError("it makes no progress")

    def write(self, va: int, data: bytes) -> None:
        """What guest code stored before it trapped."""
        here = PAGE_SIZE - va % PAGE_SIZE
        if len(data) > here:
            self.write(va + here, data[here:])
        kernel_mode, self.vcpu.kernel_mode = self.vcpu.kernel_mode, True
        copy_to_guest(self.vcpu, va, data[:here])
        self.vcpu.kernel_mode = kernel_mode

    def write_raw(self, mfn: int, slot: int, entry: int) -> None:
        info = self.domain.frames.type_info[mfn]
        if not info & TYPE_COUNT or info & TYPE_MASK == TYPE_WRITABLE:
            self.domain.memory.q[mfn << 9 | slot] = entry

    def events_of_dom0(self) -> int:
        """How many there were since the last look."""
        try:
            return os.eventfd_read(BELLS[self.natively])
        except BlockingIOError:
            return 0

    def state(self) -> dict[str, Any]:
        vcpu, domain, cpu = self.vcpu, self.domain, self.cpu
        return {
            "registers": cpu.regs.tolist(),
            "rflags": cpu.rflags,
            "mode": (vcpu.kernel_mode, vcpu.kernel_l4, vcpu.user_l4, vcpu.other_gs_base, cpu.on),
            "stack": (vcpu.kernel_sp, vcpu.kernel_ss),
            "new space": vcpu.new_space,
            "counts": (list(domain.trap_counts), list(domain.hypercall_counts)),
            "shut down": domain.shutdown_reason,
            "pages": domain.total_pages,
            "events of dom0": self.events_of_dom0(),
            "executable": sorted(cpu.executable),
            "changed": sorted(cpu.changed),
            "others": [(other.in_guest, other.cpu.kicks) for other in self.others],  # type: ignore[union-attr]
        }


def same(natively: Subject, reference: Subject) -> None:
    found = natively.state()
    for name, value in reference.state().items():
        assert found[name] == value, name
    ours, theirs = natively.domain.frames, reference.domain.frames
    np.testing.assert_array_equal(ours.owners, theirs.owners)
    np.testing.assert_array_equal(ours.count_infos, theirs.count_infos)
    np.testing.assert_array_equal(ours.type_infos, theirs.type_infos)
    used = slice(0, 256 << 9)  # all that this machine has handed out
    np.testing.assert_array_equal(natively.domain.memory.words[used], reference.domain.memory.words[used])
    assert natively.cpu.flushes >= reference.cpu.flushes
    for ours_too, theirs_too in zip(natively.others, reference.others, strict=True):
        assert ours_too.flush_requested >= theirs_too.flush_requested


class Pair:
    """Both, and one source of chance for both."""

    def __init__(self, random: Random, vcpus: int = 1) -> None:
        self.random = random
        caches_tables = random.random() < 0.5
        self.natively, self.reference = (Subject(how, caches_tables, vcpus) for how in (True, False))
        self.each = (self.natively, self.reference)
        r = self.reference
        self.frames = [*r.spare, r.l4, r.l1, r.entry_index(DATA) >> 9, *(self._frame(n) for n in range(PAGES))]

    def _frame(self, page: int) -> int:
        entry = self.reference.domain.memory.q[self.reference.entry_index(DATA + page * PAGE_SIZE)]
        return (entry & PTE_ADDRESS) >> 12

    def tables(self) -> list[int]:
        infos = self.reference.domain.frames.type_info
        return [m for m in self.frames if TYPE_L1 <= infos[m] & TYPE_MASK <= TYPE_L4 and infos[m] & TYPE_COUNT]

    def frame(self) -> int:
        return self.random.choice([*self.frames * 4, 0, 1, 5, 3_000, 1 << 20])

    def entry(self) -> int:
        random = self.random
        flags = PTE_P | random.choice((0, PTE_RW, PTE_RW)) | random.choice((0, PTE_US)) | random.choice((0, PTE_NX))
        flags |= random.choice((0, 0, PTE_A, PTE_A | PTE_D, PTE_G, PTE_PSE * (random.random() < 0.1)))
        return random.choice((0, self.frame() << 12 | flags, self.frame() << 12 | flags, flags & ~PTE_P))

    def pointer(self) -> int:
        """Where an update goes: entries of tables most of the time, of few slots, so that they meet."""
        random = self.random
        mfn = random.choice(self.tables()) if random.random() < 0.8 else self.frame()
        slot = random.choice((0, 1, 2, 0x1F0, DATA >> 12 & 511, random.randrange(512)))
        return mfn << 12 | slot << 3 | random.choice((0, 0, 0, 2, 3, 1, 7))

    def changed_entry(self, pointer: int) -> int:
        """A new value; often the old one with other permissions, as kernels write them."""
        old = self.reference.domain.memory.q[pointer >> 3] if 0 < pointer >> 12 < 4096 else 0
        return old ^ self.random.choice((PTE_RW, PTE_NX, PTE_A, PTE_US)) if self.random.random() < 0.4 else self.entry()

    def arguments(self, data: bytes) -> int:
        """Where both find these bytes: an address that is sometimes not aligned, mapped, or within a page."""
        va = ARGUMENTS + self.random.choice((0, 8, 0x800, 0x800, 4, PAGE_SIZE - 24))
        for subject in self.each:
            subject.write(va, data)
        return va if self.random.random() < 0.95 else self.random.choice((0, DATA - 8, layout.HYPERVISOR_VIRT_START))

    def requests(self) -> tuple[int, ...]:
        """The arguments of an mmu_update."""
        pointers = [self.pointer() for _ in range(self.random.choice((0, 1, 1, 1, 1, 3, 8)))]
        data = b"".join(pack("<QQ", pointer, self.changed_entry(pointer)) for pointer in pointers)
        return self.arguments(data), len(pointers), self.done(), self.foreign()

    def done(self) -> int:
        return self.random.choice((0, 0, 0, DATA + 3 * PAGE_SIZE, DATA + 3 * PAGE_SIZE - 2, 8))

    def foreign(self) -> int:
        return self.random.choice((*[abi.DOMID_SELF] * 12, 0, 7, abi.DOMID_XEN))

    def extended(self) -> tuple[int, ...]:
        """Those of an mmuext_op."""
        random = self.random
        commands = (*range(8), abi.MMUEXT_NEW_BASEPTR, abi.MMUEXT_NEW_USER_BASEPTR, 8, 9, 10, 11, 13, 16, 40)
        operations = [
            (random.choice(commands), random.choice((self.frame(), self.frame(), DATA)), random.choice((0, DATA + 16)))
            for _ in range(random.choice((1, 1, 2, 2, 4)))
        ]
        data = b"".join(pack("<IIQQ", command, 0, first, second) for command, first, second in operations)
        return self.arguments(data), len(operations), self.done(), self.foreign()

    def mapping(self) -> tuple[int, ...]:
        """Those of an update_va_mapping."""
        random = self.random
        va = random.choice((DATA + random.randrange(16) * PAGE_SIZE, TABLE_VA, 0, layout.HYPERVISOR_VIRT_START))
        flags = random.choice((0, 1, 2, 1 | abi.UVMF_ALL, 2 | abi.UVMF_ALL, 3, 2 | DATA + 16, 1 | DATA - 64))
        return va, self.entry(), flags

    def hypercall(self) -> tuple[int, tuple[int, ...]]:
        random = self.random
        number = random.choice(
            (
                *[abi.HYPERVISOR_mmu_update] * 5,
                *[abi.HYPERVISOR_mmuext_op] * 4,
                *[abi.HYPERVISOR_update_va_mapping] * 3,
                abi.HYPERVISOR_stack_switch,
                abi.HYPERVISOR_set_segment_base,
                abi.HYPERVISOR_xen_version,
                abi.HYPERVISOR_event_channel_op,
                63,
                64,
            )
        )
        if number == abi.HYPERVISOR_mmu_update:
            return number, self.requests()
        if number == abi.HYPERVISOR_mmuext_op:
            return number, self.extended()
        if number == abi.HYPERVISOR_update_va_mapping:
            return number, self.mapping()
        if number == abi.HYPERVISOR_event_channel_op:
            send, port = random.choice((abi.EVTCHNOP_send, abi.EVTCHNOP_send | 1 << 32, 63)), (1, 1, 1, 0, 2, 5000)
            return number, (send, self.arguments(pack("<I", random.choice(port))))
        if number == abi.HYPERVISOR_stack_switch:
            return number, (random.choice((0xE02B, 0x1_E02B)), random.choice((STACK, STACK - 8, STACK - 0xFE0, 0x10)))
        return number, (random.randrange(5), random.choice((0, 0x1234_5000, 1 << 47, -1 << 40 & (1 << 64) - 1)))

    def make_hypercall(self) -> None:
        number, arguments = self.hypercall()
        if self.random.random() < 0.25:
            calls = [(number, arguments), *(self.hypercall() for _ in range(self.random.randrange(3)))]
            data = b"".join(pack("<Qq6Q", each, 0, *(*given, *[0] * 6)[:6]) for each, given in calls)
            va = DATA + 4 * PAGE_SIZE + self.random.choice((0, 0, 4, 4032))
            for subject in self.each:
                subject.write(va, data)
            number, arguments = abi.HYPERVISOR_multicall, (va, len(calls))
        for subject in self.each:
            regs = subject.cpu.regs
            regs[RAX] = number
            for register, value in zip((RDI, RSI, RDX, R10, R8), arguments, strict=False):
                regs[register] = value
            regs[RIP] = CODE + 2
        self.trap(TRAP_SYSCALL)

    def return_from_kernel(self) -> None:
        random = self.random
        cs, ss = random.choice(((0xE033, 0xE02B), (0xE033, 0xE02B), (0xE030, 0xE02B), (0x33, 0x2B), (0, 0)))
        rip = random.choice((CODE, CODE + 64, 1 << 47, -4096 & (1 << 64) - 1))
        rflags = random.choice((EFLAGS_IF, 2, EFLAGS_IF | 0x8D5, EFLAGS_IF | 1 << 14, EFLAGS_IF | 3 << 12))
        frame = pack("<9Q", 77, 11, 22, random.choice((0, 0x100)), rip, cs, rflags, USER_STACK, ss)
        rsp = random.choice((STACK - 128, STACK - 128, STACK - 0x1020, 0x10))
        for subject in self.each:
            subject.write(rsp, frame)
            subject.cpu.regs[RAX], subject.cpu.regs[RSP], subject.cpu.regs[RIP] = abi.HYPERVISOR_iret, rsp, CODE + 2
        self.trap(TRAP_SYSCALL)

    def return_from_kernel_to_user(self) -> None:
        frame = pack("<9Q", 77, 11, 22, 0, CODE, 0xE033, EFLAGS_IF, USER_STACK, 0xE02B)
        for subject in self.each:
            subject.write(STACK - 128, frame)
            regs = subject.cpu.regs
            regs[RAX], regs[RSP], regs[RIP] = abi.HYPERVISOR_iret, STACK - 128, CODE + 2
        self.trap(TRAP_SYSCALL)

    def system_call(self) -> None:
        for subject in self.each:
            subject.cpu.regs[RAX], subject.cpu.regs[RIP], subject.cpu.regs[RSP] = 39, CODE + 2, USER_STACK
        self.trap(TRAP_SYSCALL)

    def fault(self) -> None:
        address = self.random.choice((DATA - 8, DATA, TABLE_VA + 8, layout.HYPERVISOR_VIRT_START + 64, 0))
        self.trap(VECTOR_PF, self.random.choice((0, 2, 4, 5, 6, 7, 15, 20)), address)

    def privileged(self) -> None:
        """A privileged instruction, or what looks like one."""
        code = bytes.fromhex(self.random.choice(("fa", "fb", "fa", "f4", "66 fa", "90", "0f 20 c0")))
        where = CODE + self.random.choice((0x40, PAGE_SIZE - len(code), PAGE_SIZE - 1))
        iopl = self.random.randrange(4)
        for subject in self.each:
            subject.write(where, code)
            subject.vcpu.iopl = iopl
            subject.cpu.regs[RIP] = where
        self.trap(VECTOR_GP, self.random.choice((0, 0, 0, 0x18)))

    def write_to_table(self) -> None:
        """A direct write to the L1 table."""
        random = self.random
        instruction = random.choice(
            (
                "48 89 07",  # mov [rdi], rax
                "48 89 87 00 00 00 00",
                "4c 89 44 17 08",  # mov [rdi+rdx+8], r8
                "48 87 07",  # xchg [rdi], rax
                "f0 48 0f ba 37 01",  # lock btr qword [rdi], 1
                "48 0f ba 2f 05",  # bts qword [rdi], 5
                "f0 48 0f b3 0f",  # lock btr [rdi], rcx
                "f0 4c 0f b1 07",  # lock cmpxchg [rdi], r8
                "48 c7 07 00 00 00 00",  # mov qword [rdi], 0
                "48 c7 05 10 00 00 00 67 00 00 00",  # mov qword [rip+16], 0x67
                "f0 80 27 fd",  # lock and byte [rdi], 0xfd
                "f0 41 80 27 fd",  # lock and byte [r15], 0xfd
                "40 80 0f 42",  # or byte [rdi], 0x42
                "89 07",  # mov [rdi], eax
                "48 21 07",  # and [rdi], rax
                "66 0f d6 07",  # movq [rdi], xmm0
            )
        )
        slot = random.choice((5, DATA >> 12 & 511, 200))
        old = self.reference.domain.memory.q[self.reference.l1 << 9 | slot]
        rax = random.choice((old, self.entry(), old ^ PTE_RW))
        code = CODE + random.choice((0x40, 0x40, PAGE_SIZE - 6))
        for subject in self.each:
            subject.write(code, bytes.fromhex(instruction))
            regs = subject.cpu.regs
            regs[RIP], regs[RAX], regs[RCX], regs[RDI] = code, rax, 1, TABLE_VA + slot * 8
            regs[RDX] = -8 & (1 << 64) - 1
            regs[R8] = old ^ PTE_NX
        self.trap(VECTOR_PF, 3, TABLE_VA + slot * 8 + random.choice((0, 0, 0, 4, 1)))

    def store(self) -> None:
        """A guest's own store to a frame of its, mostly to fill what it will pin."""
        mfn, slot, entry = self.random.choice(self.reference.spare), self.random.choice((0, 1, 5, 300)), self.entry()
        for subject in self.each:
            subject.write_raw(mfn, slot, entry)

    def event(self) -> None:
        for subject in self.each:
            subject.domain.memory.b[subject.vcpu.info] = 1

    def handle_event(self) -> None:
        for subject in self.each:
            subject.domain.memory.b[subject.vcpu.info] = 0

    def others_go_on(self) -> None:
        """The other vCPUs come from or go to the guest, having flushed what they were asked to."""
        for ours, theirs in zip(self.natively.others, self.reference.others, strict=True):
            ours.in_guest = theirs.in_guest = self.random.random() < 0.5
            ours.flush_requested = theirs.flush_requested = False

    def step(self) -> None:
        kernel = self.reference.vcpu.kernel_mode
        if not kernel and self.random.random() < 0.5:
            self.system_call()
            return
        action = self.random.choice(
            (
                *[self.make_hypercall] * 8 * kernel,
                *[self.write_to_table] * 2,
                self.return_from_kernel if kernel else self.system_call,
                self.fault,
                self.privileged,
                *[self.store] * 2,
                self.event,
                self.handle_event,
                self.handle_event,
                self.others_go_on,
            )
        )
        action()

    def trap(self, vector: int, error_code: int = 0, address: int = 0) -> None:
        answers = [subject.trap(vector, error_code, address) for subject in self.each]
        assert answers[0] == answers[1]
        for subject in self.each:  # native code may leave tables for the next trap to undo
            subject.domain.work_left = WORK
            assert paging.undo(subject.domain)
        same(*self.each)

    def close(self) -> None:
        for subject in self.each:
            subject.machine.close()
            subject.machine.hypervisor.close()


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3), st.sampled_from((1, 2, 3, 5, WORK)))
def test_random_traps_leave_two_machines_the_same(random: Random, vcpus: int, native_limit: int) -> None:
    """Also where Python has to go on with tables that native code has validated or undone in part."""
    pair = Pair(random, vcpus)
    pair.natively.native_limit = native_limit
    for _ in range(TRAPS):
        if pair.reference.domain.shut_down:
            break
        pair.step()
    for subject in pair.each:
        assert audit.check(subject.machine.hypervisor) == [], subject.natively
    pair.close()


@pytest.mark.parametrize("vcpus", [1, 3])
def test_most_of_what_a_kernel_does_is_handled_natively(vcpus: int) -> None:
    """Or the test above would compare Python with itself."""
    pair = Pair(Random(1), vcpus)
    subject = pair.natively
    entry = subject.entry_index(DATA + PAGE_SIZE)
    old = subject.domain.memory.q[entry]
    for value in (0, old, old & ~PTE_RW, old):
        for each in pair.each:
            each.write(ARGUMENTS, pack("<QQ", entry << 3, value))
            regs = each.cpu.regs
            regs[RAX], regs[RDI], regs[RSI], regs[RDX], regs[R10] = 1, ARGUMENTS, 1, 0, abi.DOMID_SELF
        pair.trap(TRAP_SYSCALL)
    assert subject.handled == 4
    pair.return_from_kernel_to_user()
    pair.system_call()
    assert subject.handled == 6
    pair.trap(VECTOR_PF, 0, DATA - 8)
    assert subject.handled == 7
    for each in pair.each:
        each.write(CODE, b"\xfa")  # cli
        each.vcpu.iopl, each.cpu.regs[RIP] = 1, CODE
    pair.trap(VECTOR_GP)
    assert subject.handled == 8
    pair.close()


def test_native_code_leaves_a_domain_alone_whose_lock_is_taken() -> None:
    pair = Pair(Random(2))
    subject = pair.natively
    subject.write(STACK - 128, bytes(8))
    with subject.domain.lock:
        handler = ctypes.PYFUNCTYPE(ctypes.c_int, WORD, ctypes.c_uint32, WORD, WORD)(subject.native)
        assert handler(subject.vcpu.address, VECTOR_PF, 0, DATA - 8) == NOT_HANDLED
    assert handler(subject.vcpu.address, VECTOR_PF, 0, DATA - 8) != NOT_HANDLED
    pair.close()


def test_native_code_stops_when_its_budget_is_spent() -> None:
    pair = Pair(Random(3))
    subject = pair.natively
    subject.vcpu.native_budget = 2
    for _ in range(5):
        pair.trap(VECTOR_PF, 0, DATA - 8)
    assert subject.handled == 2
    pair.close()


def test_cpuid_is_answered_natively_whatever_ecx_is_where_that_means_nothing() -> None:
    """Programs leave anything there."""
    pair = Pair(Random(4))
    subject, regs = pair.natively, pair.natively.cpu.regs
    subject.write(DATA, b"\x0f\xa2")
    for leaf in (1, 0x8000_0001, 4):
        for ecx in range(50):
            regs[RAX], regs[RCX], regs[RIP] = leaf, 1000 * ecx, DATA
            subject.trap(TRAP_CPUID)
    assert subject.handled == 49 + 49
    assert subject.vcpu.cpuid_count == 1 + 1 + 50
    pair.close()


def test_a_flush_of_other_vcpus_is_native_unless_one_is_in_the_guest() -> None:
    """That one has to be stopped, which is Python's."""
    pair = Pair(Random(4), vcpus=3)
    subject = pair.natively
    value = subject.domain.memory.q[subject.entry_index(DATA + PAGE_SIZE)]

    def flush() -> None:
        for each in pair.each:
            regs = each.cpu.regs
            regs[RAX], regs[RDI] = abi.HYPERVISOR_update_va_mapping, DATA + PAGE_SIZE
            regs[RSI], regs[RDX] = value, abi.UVMF_TLB_FLUSH | abi.UVMF_ALL
        pair.trap(TRAP_SYSCALL)

    flush()
    assert subject.handled == 1
    assert [other.flush_requested for other in subject.others] == [True, True]
    for each in pair.each:
        each.others[1].in_guest = True
        each.others[1].flush_requested = False
    flush()
    assert subject.handled == 1
    assert not subject.others[1].in_guest
    assert subject.others[1].flush_requested
    pair.close()


def test_a_vcpu_is_out_of_the_guest_while_its_trap_is_handled() -> None:
    """Whoever holds the domain's lock and flushes waits for that, and holds up the trap."""
    pair = Pair(Random(5), vcpus=2)
    vcpu = pair.natively.vcpu
    vcpu.in_guest = True
    pair.trap(VECTOR_PF, 0, DATA - 8)
    assert vcpu.in_guest
    handler = ctypes.PYFUNCTYPE(ctypes.c_int, WORD, ctypes.c_uint32, WORD, WORD)(pair.natively.native)
    with pair.natively.domain.lock:
        assert handler(vcpu.address, VECTOR_PF, 0, DATA - 8) == NOT_HANDLED
        assert not vcpu.in_guest
    vcpu.may_run = False
    assert handler(vcpu.address, VECTOR_PF, 0, DATA - 8) == LEAVE
    assert not vcpu.in_guest
    pair.close()


def test_a_long_batch_is_left_and_made_again() -> None:
    """Or whoever wants the vCPU or the lock would have to wait for it."""
    pair = Pair(Random(6))
    calls, requests = 64, 96
    frame = pair.reference.spare[5]
    updates = b"".join(pack("<QQ", frame << 12 | number << 3, number) for number in range(requests))
    call = pack("<Qq6Q", abi.HYPERVISOR_mmu_update, 0, ARGUMENTS, requests, 0, abi.DOMID_SELF, 0, 0)
    for each in pair.each:
        each.write(ARGUMENTS, updates)
        each.write(DATA + 4 * PAGE_SIZE, call * calls)
        regs = each.cpu.regs
        regs[RAX], regs[RDI], regs[RSI] = abi.HYPERVISOR_multicall, DATA + 4 * PAGE_SIZE, calls
    for each in pair.each:
        assert each.hypercall() > 1
        assert each.cpu.regs[RAX] == 0
        assert each.domain.memory.q[frame << 9 | 95] == 95
    pair.close()


def test_who_waits_for_native_code_lets_other_threads_go_on() -> None:
    pair = Pair(Random(7))
    domain = pair.natively.domain
    domain.lock_word = 1
    thread = threading.Thread(target=lambda: domain.lock.__enter__(), daemon=True)
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    domain.lock_word = 0
    thread.join(20)
    assert not thread.is_alive()
    pair.close()


@pytest.mark.parametrize("natively", [True, False])
def test_a_reference_that_nothing_holds_ends_the_domain_and_is_not_dropped(natively: bool) -> None:
    subject = Subject(natively, caches_tables=False)
    index, frames = subject.entry_index(DATA + PAGE_SIZE), subject.domain.frames
    page = subject.domain.memory.q[index] >> 12 & (1 << 40) - 1
    frames.type_info[page] -= 1
    before = frames.type_info[page]
    subject.write(ARGUMENTS, pack("<QQ", index << 3, 0))
    regs = subject.cpu.regs
    regs[RAX], regs[RDI], regs[RSI], regs[RDX], regs[R10] = abi.HYPERVISOR_mmu_update, ARGUMENTS, 1, 0, abi.DOMID_SELF
    with pytest.raises(AssertionError):
        subject.trap(TRAP_SYSCALL)
    assert frames.type_info[page] == before
    subject.machine.close()
    subject.machine.hypervisor.close()


def grow_tree(subject: Subject) -> tuple[int, int]:
    """Frames that are to be page tables: an L4 with two L3s, whose L2s link eight L1s.

    The L4's MFN, and the index of an entry of an L3.
    """
    l4, first, second, *rest = subject.spare[1:]
    q = subject.domain.memory.q
    l2s, l1s = rest[:4], rest[4:12]
    table = PTE_P | PTE_RW | PTE_US
    for slot, l3 in ((3, first), (509, second)):
        q[l4 << 9 | slot] = l3 << 12 | table
    for slot, l2 in zip((0, 511, 7, 8), l2s, strict=True):
        q[(first if l2 in l2s[:2] else second) << 9 | slot] = l2 << 12 | table
    for number, l1 in enumerate(l1s):
        q[l2s[number // 2] << 9 | 100 + number] = l1 << 12 | table
        q[l1 << 9 | 5] = rest[12 + number % 3] << 12 | table
    return l4, first << 9 | 511


@pytest.mark.parametrize("limit", [*range(1, 20), 40])
def test_python_goes_on_with_a_tree_that_native_code_has_validated_or_undone_in_part(limit: int) -> None:
    pair = Pair(Random(8))
    l4, index = 0, 0
    for each in pair.each:
        l4, index = grow_tree(each)
    link = pair.reference.domain.memory.q[index]
    bad = pair.reference.spare[1:][3 + 4 + 7] << 9 | 300  # in the last L1
    partial = 0

    def make(number: int, requests: bytes, size: int) -> None:
        nonlocal partial
        for each in pair.each:
            each.write(ARGUMENTS, requests)
            regs = each.cpu.regs
            regs[RAX], regs[RDI], regs[RSI] = number, ARGUMENTS, len(requests) // size
            regs[RDX], regs[R10] = 0, abi.DOMID_SELF
        pair.natively.native_limit = limit
        pair.trap(TRAP_SYSCALL)
        assert audit.check(pair.natively.machine.hypervisor) == []
        partial += not pair.natively.handled
        pair.natively.handled = 0

    def extended(*operations: tuple[int, int]) -> None:
        make(abi.HYPERVISOR_mmuext_op, b"".join(pack("<IIQQ", op, 0, mfn, 0) for op, mfn in operations), 24)

    def update(*requests: tuple[int, int]) -> None:
        make(abi.HYPERVISOR_mmu_update, b"".join(pack("<QQ", *request) for request in requests), 16)

    pin, unpin = (abi.MMUEXT_PIN_L4_TABLE, l4), (abi.MMUEXT_UNPIN_TABLE, l4)
    extended(pin)
    update((index << 3, 0), (index << 3, link))
    extended(unpin, pin)
    extended((abi.MMUEXT_NEW_USER_BASEPTR, l4), unpin, (abi.MMUEXT_NEW_USER_BASEPTR, 0))
    for each in pair.each:
        each.domain.memory.q[bad] = 0xFFFF_FFFF << 12 | PTE_P
    extended(pin)
    assert pair.natively.cpu.regs[RAX] != 0
    for each in pair.each:
        each.domain.memory.q[bad] = 0
    extended(pin, unpin)
    assert pair.natively.cpu.regs[RAX] == 0
    assert (partial == 1) == (limit == 40)  # the refusal is always Python's
    pair.close()
