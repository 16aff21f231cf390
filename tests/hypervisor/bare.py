"""A hypervisor whose guests are Python generators: for tests of everything but paging and exceptions.

A program yields what its vCPU does next: `(number, *arguments)` is a hypercall, whose result the yield returns;
a callable is computation.  The machine's clock is virtual; `compute(ns)` lets it advance.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from xenolith.abi import layout
from xenolith.abi.x86 import PAGE_SIZE, PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US, R8, R10, RAX, RDI, RDX, RIP, RSI, RSP
from xenolith.hypervisor.control import Control
from xenolith.hypervisor.domain import Domain, Vcpu, runnable
from xenolith.hypervisor.hypervisor import Hypervisor
from xenolith.hypervisor.python_domain import boot_dom0
from xenolith.hypervisor.sched.fair import Fair
from xenolith.hypervisor.sched.policy import MakePolicy
from xenolith.machine.clock import VirtualClock
from xenolith.machine.engines.protocol import TRAP_SYSCALL, Cpu, CpuState, Engine, TrapHandler, register_file
from xenolith.machine.memory import MachineMemory, MemoryBudget

Step = Callable[[], None] | tuple[int, ...]
Program = Generator[Step, int, None]

DATA = 0x10000000  # where every domain finds its pages
PAGES = 8
STACK = DATA + PAGES * PAGE_SIZE  # its end, in the last page
CALLBACK = 0x400000
TABLE = PTE_P | PTE_RW | PTE_US | PTE_A
ENTRY = TABLE | PTE_D
DEADLINE = 60  # seconds until a test that hangs fails


class ScriptedCpu(Cpu):
    """Runs the program of the vCPU that is loaded."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self.regs = register_file()
        self._kicked = threading.Event()
        self._loaded: CpuState | None = None
        self._rflags = 0x202

    def get_rflags(self) -> int:
        return self._rflags

    def set_rflags(self, value: int) -> None:
        self._rflags = value

    def load(self, state: CpuState) -> None:
        self.regs[:] = state.regs
        self._loaded = state

    def store(self, state: CpuState) -> None:
        state.regs[:] = self.regs

    def kick(self) -> None:
        self._kicked.set()

    def run(self, on_trap: TrapHandler) -> None:
        program = self._engine.programs[id(self._loaded)]
        while not self._kicked.is_set():
            step = program.next()
            if callable(step):
                step()
                continue
            for register, value in zip((RAX, RDI, RSI, RDX, R10, R8), step, strict=False):
                self.regs[register] = value & (1 << 64) - 1
            self.regs[RIP] = 0x1002
            self.regs[RSP] = STACK
            program.trapped = True
            if not on_trap(TRAP_SYSCALL, 0, 0):
                return
        self._kicked.clear()

    def nothing(self, *_: object) -> None:
        """The rest of the protocol has no meaning for generators."""

    set_xcr0 = nothing
    switch_mode = flush_tlb = flush_page = set_segment = set_code_stack = set_task_switched = nothing
    set_debug = set_ldt = code_written = executable_mapped = nothing


class _Running:
    """A program and what it waits for."""

    def __init__(self, program: Program, vcpu: Vcpu) -> None:
        self._program = program
        self._vcpu = vcpu
        self._started = False
        self.trapped = False
        self._step: Step = ()

    def next(self) -> Step:
        regs = self._vcpu.regs
        if self.trapped and regs[RIP] == 0x1000:  # to be made again, with the arguments in the registers
            self.trapped = False
            return tuple(regs[register] for register in (RAX, RDI, RSI, RDX, R10, R8))
        result = regs[RAX] - (regs[RAX] >> 63 << 64) if self.trapped else 0
        self.trapped = False
        try:
            self._step = self._program.send(result) if self._started else next(self._program)
        except StopIteration:
            raise AssertionError("a program ended without shutting its domain down") from None
        self._started = True
        return self._step


class ScriptedEngine(Engine):
    """An engine for generators: one Cpu for all vCPUs, or one each."""

    name = "scripted"
    xcr0_mask = 3

    def __init__(self, cpus_shared: bool) -> None:
        self.cpus_shared = cpus_shared
        self.l4_entries: dict[int, int] = {}
        self.programs: dict[int, _Running] = {}
        self._cpus: dict[int, ScriptedCpu] = {}

    def cpu(self, vcpu_id: int) -> ScriptedCpu:
        return self._cpus.setdefault(0 if self.cpus_shared else vcpu_id, ScriptedCpu(self))

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return 0, 0, 0, 0

    def close(self) -> None:
        pass


class BareMachine:
    """A hypervisor with dom0, on a virtual clock."""

    def __init__(
        self,
        pcpus: int = 1,
        cpus_shared: bool = True,
        policy: MakePolicy = Fair,
        host_cpus: Sequence[int] = (),
    ) -> None:
        self.clock = VirtualClock()

        def engine(_: MachineMemory) -> Any:
            return ScriptedEngine(cpus_shared)

        self.hypervisor = Hypervisor(MemoryBudget(4096), engine, self.clock, pcpus, policy, host_cpus)
        self.control = Control(self.hypervisor)
        self.dom0 = boot_dom0(self.hypervisor)
        self._started: list[Domain] = []

    def domain(self, vcpus: int = 1, max_pages: int = 64) -> Domain:
        """A built domain that has not started: page tables, PAGES pages at DATA, an event callback."""
        domid = self.control.create_domain(bytes(16), vcpus, max_pages)
        domain = self.hypervisor.domains[domid]
        mfns = [int(mfn) for mfn in self.control.populate(domid, PAGES + 4)]
        l4, l3, l2, l1 = mfns[:4]
        q = domain.memory.q
        q[l4 << 9 | DATA >> 39 & 511] = l3 << 12 | TABLE
        q[l3 << 9 | DATA >> 30 & 511] = l2 << 12 | TABLE
        q[l2 << 9 | DATA >> 21 & 511] = l1 << 12 | TABLE
        for number, mfn in enumerate(mfns[4:]):
            q[l1 << 9 | (DATA >> 12 & 511) + number] = mfn << 12 | ENTRY
        self.control.initialise_shared_info(domid, PAGES)
        self.control.set_boot_context(domid, l4_mfn=l4, entry=0x1000, stack=STACK, start_info=0)
        for vcpu in domain.vcpus:
            if vcpu.vcpu_id:
                vcpu.kernel_l4, vcpu.initialised = l4, True
                domain.frames.get_page(l4, domid)
                domain.frames.type_info[l4] += 1
            vcpu.event_callback = CALLBACK
            vcpu.timers.set_period(0)
        return domain

    def run(self, domain: Domain, *programs: Program) -> None:
        """Start the domain, its first vCPUs executing these programs."""
        engine: Any = domain.engine
        for vcpu, program in zip(domain.vcpus, programs, strict=False):
            engine.programs[id(vcpu.state)] = _Running(program, vcpu)
            vcpu.online = True
        self._started.append(domain)
        self.control.unpause(domain.domid)

    def compute(self, nanoseconds: int) -> Callable[[], None]:
        """A step that takes time.

        Virtual time must not go on while the host has yet to run the thread of a vCPU that wants a pCPU, or is to
        leave one.
        """

        def advance() -> None:
            while not all(map(_settled, self._started)):
                if any(map(_preempted_here, self._started)):
                    return
                os.sched_yield()
            self.clock.advance(nanoseconds)
            deadline = self.hypervisor.timers.next_deadline()
            if deadline is not None and deadline <= self.clock.now():
                # On a thread of its own, as on a real clock.
                timers = threading.Thread(target=self.hypervisor.timers.run_due)
                timers.start()
                timers.join()

        return advance

    def ended(self) -> threading.Event:
        """Set when dom0 is told that some domain has shut down."""
        event = threading.Event()
        port = self.dom0.bind_virq(3)
        self.dom0.set_handler(port, lambda _: event.set())
        return event

    def close(self) -> None:
        for domain in self._started:
            if not domain.dying:
                domain.dying = True
                self.hypervisor.scheduler.stop(domain)


def _settled(domain: Domain) -> bool:
    """Whether the domain has seen what was posted to it, and each vCPU that could run does or has asked for a pCPU."""
    with domain.lock, domain.hypervisor.scheduler.pools.lock:
        contexts = {vcpu.context for vcpu in domain.vcpus if vcpu.context is not None}
        if domain.posted and not any(context.running for context in contexts):
            return False
        wanting = {vcpu.context for vcpu in domain.vcpus if vcpu.context is not None and runnable(vcpu)}
        if any(context.preempt and context.running for context in contexts):
            return False
        return all(context.running is not None or context.wanted is not None for context in wanting)


def _preempted_here(domain: Domain) -> bool:
    """Whether the vCPU of this thread is one of the domain's and has to leave its pCPU."""
    contexts = {vcpu.context for vcpu in domain.vcpus if vcpu.context is not None}
    return any(context.preempt and context.thread.ident == threading.get_ident() for context in contexts)


def write(vcpu: Vcpu, va: int, data: bytes) -> None:
    """Put an argument into guest memory."""
    from xenolith.hypervisor.guest_memory import copy_to_guest

    assert copy_to_guest(vcpu, va, data)


def read(vcpu: Vcpu, va: int, size: int) -> bytes:
    """Take an answer out of guest memory."""
    from xenolith.hypervisor.guest_memory import copy_from_guest

    data = copy_from_guest(vcpu, va, size)
    assert data is not None
    return data


def pending(domain: Domain, port: int) -> bool:
    """The port's bit in shared_info."""
    return bool(domain.memory.b[domain.shared_info + layout.SHARED_EVTCHN_PENDING + port // 8] >> port % 8 & 1)


def set_mask(domain: Domain, port: int, masked: bool) -> None:
    """What a guest does to its mask bits."""
    index = domain.shared_info + layout.SHARED_EVTCHN_MASK + port // 8
    bits = domain.memory.b[index] & ~(1 << port % 8)
    domain.memory.b[index] = bits | masked << port % 8


def upcall_pending(vcpu: Vcpu) -> bool:
    return bool(vcpu.domain.memory.b[vcpu.info])
