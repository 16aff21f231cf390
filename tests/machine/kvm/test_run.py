"""The loop in C: traps that a native handler takes stay out of Python, all others come as if there were none."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from ctypes import c_int, c_uint32, c_uint64
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xenolith.abi.hypercalls import VIRQ_TIMER
from xenolith.abi.layout import FLAT_RING3_CS64, FLAT_RING3_SS64
from xenolith.abi.x86 import (
    PAGE_SHIFT,
    PTE_A,
    PTE_NX,
    PTE_P,
    PTE_RW,
    RAX,
    RBX,
    RCX,
    RDI,
    RIP,
    VECTOR_PF,
    VECTOR_UD,
)
from xenolith.machine.engines.kvm import fast_path, native_run
from xenolith.machine.engines.kvm.changes import KEPT, Changes
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.host import host_traits
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.native_state import GO_ON, LEAVE, LOOK, NOT_HANDLED, UNLIMITED, ModeFields
from xenolith.machine.engines.protocol import TRAP_NOTHING

from .bare import CODE, DATA, TABLE, Machine, in_thread, run_to_trap
from .test_fast_path import FLAT, KERNEL, KERNEL_GS, KERNEL_SP, SET_TIMER, Guest, set_timer
from .test_kicks import kicking

UNMAPPED = 0x7000_0000
HANDLER = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint32, c_uint64, c_uint64)
TIMER = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64)
NOW = ctypes.CFUNCTYPE(c_uint64)
Handler = Callable[[int, int, int], int]
Run = Callable[..., list[tuple[int, int]]]


class NativeModes(ModeFields):
    """A vCPU with a handler for native code to call, if one in Python."""

    def __init__(self, handle: Handler) -> None:
        self.calls: list[tuple[int, int]] = []
        self.timers: list[int] = []
        self.flat_selectors = {FLAT}
        self.native_budget = UNLIMITED
        self.address = ctypes.addressof(self)

        def handler(_: int, vector: int, error_code: int, address: int) -> int:
            self.calls.append((vector, address))
            return handle(vector, error_code, address)

        self._handler = HANDLER(handler)
        self.native_handler = ctypes.cast(self._handler, ctypes.c_void_p).value or 0

    @property
    def timer_port(self) -> int:
        return int(self.virq_port[VIRQ_TIMER])

    @property
    def syscalls(self) -> int:
        return self.untrapped_syscalls

    def count_syscalls(self, count: int) -> None:
        self.untrapped_syscalls += count

    def count_ticks(self, count: int, length: int) -> None:
        self.untrapped_ticks += count

    def set_timer_late(self, deadline: int) -> None:
        self.timers.append(deadline)

    def until(self, moment: int) -> int:
        return 10**9


@pytest.fixture
def run(machine: Machine) -> Iterator[Run]:
    """Run code under a native handler: the traps that Python saw, up to one that it leaves at."""
    if native_run.library() is None:
        pytest.skip("no native code here")
    cpu = machine.cpu()

    def go(code: str, handle: Handler, until: int = VECTOR_UD) -> list[tuple[int, int]]:
        modes = NativeModes(handle)
        cpu.attach(modes)
        machine.write_code(code)
        cpu.regs[RIP] = CODE
        seen: list[tuple[int, int]] = []

        def on_trap(vector: int, _error_code: int, address: int) -> bool:
            seen.append((vector, address))
            if vector == VECTOR_PF:
                cpu.regs[RIP] += 3
            return vector != until

        while not seen or (seen[-1][0] != until and len(seen) < 5000):
            cpu.run(on_trap)
        return seen

    yield go


# 1000 times: inc rbx; mov [rax], rax (3 bytes), then ud2
FAULTS = "b9 e8 03 00 00 48 ff c3 48 89 00 ff c9 75 f6 0f 0b"


def test_a_trap_that_is_handled_does_not_come_to_python(run: Run, machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.regs[RAX], cpu.regs[RBX] = UNMAPPED, 0
    handled = 0

    def skip(vector: int, _error_code: int, address: int) -> int:
        nonlocal handled
        assert (vector, address) == (VECTOR_PF, UNMAPPED)
        handled += 1
        cpu.regs[RIP] += 3
        return GO_ON

    assert run(FAULTS, skip) == [(VECTOR_UD, 0)]
    assert handled == cpu.regs[RBX] == 1000


def test_traps_that_are_left_come_with_their_registers(run: Run, machine: Machine) -> None:
    """Every third is Python's, which finds RIP at it like the native handler does."""
    cpu = machine.cpu()
    cpu.regs[RAX], cpu.regs[RBX] = UNMAPPED, 0
    places: list[int] = []

    def some(_vector: int, _error_code: int, _address: int) -> int:
        places.append(cpu.regs[RIP])
        if cpu.regs[RBX] % 3 == 0:
            return NOT_HANDLED
        cpu.regs[RIP] += 3
        return GO_ON

    seen = run(FAULTS, some)
    assert seen == [(VECTOR_PF, UNMAPPED)] * 333 + [(VECTOR_UD, 0)]
    assert places == [CODE + 8] * 1000


def test_a_handler_may_ask_for_events_and_to_leave(run: Run, machine: Machine) -> None:
    cpu = machine.cpu()
    cpu.regs[RAX], cpu.regs[RBX] = UNMAPPED, 0

    def looks(_vector: int, _error_code: int, _address: int) -> int:
        cpu.regs[RIP] += 3
        return LOOK if cpu.regs[RBX] == 10 else LEAVE if cpu.regs[RBX] == 20 else GO_ON

    seen = run(FAULTS, looks)
    assert seen == [(TRAP_NOTHING, 0), (VECTOR_UD, 0)]
    assert cpu.regs[RBX] == 1000


def test_a_register_that_points_nowhere_faults_as_ever(run: Run, machine: Machine) -> None:
    """A handler sends the guest to an address that no processor can go to."""
    cpu = machine.cpu()
    cpu.regs[RAX] = UNMAPPED

    def astray(_vector: int, _error_code: int, _address: int) -> int:
        cpu.regs[RIP] = 1 << 47
        return GO_ON

    assert run(FAULTS, astray, until=13) == [(13, 0)]


def test_kicks_in_the_middle_lose_and_repeat_nothing(machine: Machine) -> None:
    if native_run.library() is None:
        pytest.skip("no native code here")
    cpu = machine.cpu()
    cpu.regs[RAX], cpu.regs[RBX] = UNMAPPED, 0
    handled = 0

    def skip(_vector: int, _error_code: int, _address: int) -> int:
        nonlocal handled
        handled += 1
        cpu.regs[RIP] += 3
        return GO_ON

    modes = NativeModes(skip)
    cpu.attach(modes)
    machine.write_code("48 ff c3 48 89 00 eb f8")  # for ever: inc rbx; mov [rax], rax
    cpu.regs[RIP] = CODE
    thread, done = kicking(cpu, 0.0003)
    for _ in range(200):
        cpu.run(lambda *_: True)
        assert cpu.regs[RBX] - handled in (0, 1)
    done.set()
    thread.join()
    assert handled > 200


# The gate leaves KVM with the number of #BP, so what guest code executed last must not look like a breakpoint.
@pytest.mark.parametrize(
    "loop",
    ["eb fe", "48 83 c0 04 eb fa", "48 83 c0 03 eb fa", "01 ce eb fc"],
    ids=["jmp", "add rax, 4", "add rax, 3", "add esi, ecx"],
)
def test_a_timer_that_is_due_takes_no_python(machine: Machine, loop: str) -> None:
    if native_run.library() is None or not host_traits().has_fast_path:
        pytest.skip("no native code, or no fast path, here")
    guest = Guest(machine)
    modes = NativeModes(lambda *_: NOT_HANDLED)
    modes.kernel_l4, modes.user_l4, modes.info = guest.kernel_l4, machine.l4, guest.modes.info
    modes.kernel_sp, modes.other_gs_base, modes.syscall_callback = KERNEL_SP, KERNEL_GS, KERNEL
    modes.syscall_masks_events = True
    modes.flat_pairs[0] = FLAT_RING3_CS64 << 16 | FLAT_RING3_SS64
    due: list[int] = []

    def timer(_: int, deadline: int) -> int:
        due.append(deadline)
        modes.timer_look = 0
        return LEAVE

    functions = TIMER(timer), NOW(lambda: 2_000_000)
    modes.native_timer, modes.now = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in functions)
    modes.timer_look = 2_000_000 + fast_path.TIMER_SLOP
    guest.cpu.attach(modes)
    machine.write_code(SET_TIMER + loop, KERNEL - CODE)
    set_timer(guest, 2_000_000)
    machine.write_code("0f 05")
    guest.cpu.regs[RIP] = CODE
    modes.until = lambda _moment: 3_000_000  # type: ignore[method-assign]
    seen: list[int] = []
    guest.cpu.run(lambda vector, *_: seen.append(vector) is not None)  # type: ignore[func-returns-value]
    assert due == [2_000_000]
    assert (seen, modes.timers, modes.calls) == ([], [], [])
    assert modes.kernel_mode
    assert KERNEL + 19 <= guest.cpu.regs[RIP] <= KERNEL + 23


# again: mov [rax], rax (it faults); cmp [rdi], rbx; jne wrong; dec rcx; jnz again; ud2; wrong: ud2
USE = "48 89 00 48 39 1f 75 07 48 ff c9 75 f3 0f 0b 0f 0b"
TURNS = 2000


@pytest.mark.parametrize("handlers", ["native", "python"])
def test_two_vcpus_change_and_use_one_page_table_at_once(machine: Machine, handlers: str) -> None:
    """Each fault maps another page at an address of the vCPU's own; the next instruction has to find that one."""
    if handlers == "native" and native_run.library() is None:
        pytest.skip("no native code here")
    for page in range(64):
        machine.set_word(1000 + page, page=page)
    machine.write_code(USE)
    lock = threading.Lock()  # the domain's
    cpus = [machine.cpu(number) for number in range(2)]
    kept: list[NativeModes] = []
    handled = [0, 0]

    def mover(number: int, cpu: KvmCpu) -> Handler:
        va = DATA + (100 + number) * 0x1000
        index = machine.entry(va)
        cpu.regs[RAX], cpu.regs[RCX], cpu.regs[RDI] = UNMAPPED, TURNS, va
        cpu.regs[RIP] = CODE

        def move(vector: int, _error_code: int, _address: int) -> int:
            if vector != VECTOR_PF:
                return LEAVE
            with lock:
                page = handled[number] * 7 % 32 + 32 * number
                machine.change_entry(index, machine.data[page] << PAGE_SHIFT | TABLE)
                cpu.flush_page(va)
                handled[number] += 1
            cpu.regs[RBX] = 1000 + page
            cpu.regs[RIP] += 3
            return GO_ON

        return move

    threads = []
    for number, cpu in enumerate(cpus):
        move = mover(number, cpu)
        if handlers == "native":
            kept.append(NativeModes(move))
            cpu.attach(kept[-1])
            threads.append(in_thread(partial(run_to_trap, cpu)))
        else:
            threads.append(in_thread(partial(cpu.run, lambda *trap, move=move: move(*trap) == GO_ON)))
    for thread in threads:
        thread.join(60)
    assert handled == [TURNS, TURNS]
    assert [cpu.regs[RIP] - CODE for cpu in cpus] == [len(bytes.fromhex(USE)) - 4] * 2


@given(st.integers(1, 10**17), st.integers(1, 10**8), st.sampled_from((1_000_000, 3_333_333, 4_000_000)))
def test_an_alarm_that_waits_for_the_hosts_tick_is_late_by_less_than_one(now: int, left: int, tick: int) -> None:
    library = native_run.library()
    if library is None:
        pytest.skip("no native code here")
    later = library.until_host_tick(now, left, tick)
    assert left <= later < left + tick
    assert (now + later) % tick == 0


# --- what is noted of changed entries ------------------------------------------------------------------

ENTRIES = {"lose": (PTE_P | PTE_RW, PTE_P), "gain": (PTE_P, PTE_P | PTE_NX), "nothing": (PTE_P, PTE_P | PTE_A)}
TABLES = 24
Noter = Callable[[Changes, int, int, int], None]


def note_natively(changes: Changes, index: int, old: int, new: int) -> None:
    library = native_run.library()
    assert library is not None
    function = ctypes.CFUNCTYPE(None, c_uint64, c_uint64, c_uint64, c_uint64)(library.calls["entry_changed"])
    cpu = KvmFields(changes=ctypes.addressof(changes), shadows=True)
    function(index, old, new, ctypes.addressof(cpu))


@pytest.fixture(params=["native", "python"])
def note(request: pytest.FixtureRequest) -> Noter:
    """Who notes changes."""
    if request.param == "python":
        return Changes.note
    if native_run.library() is None:
        pytest.skip("no native code here")
    return note_natively


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(sorted(ENTRIES)), st.integers(0, TABLES * 512 - 1), st.just(1) | st.integers(1, 3000)
            ),
            st.tuples(st.sampled_from(("enter", "come back")), st.integers(0, 2), st.just(0)),
        ),
        max_size=60,
    )
)
def test_who_enters_the_guest_rewrites_all_that_nobody_is_known_to_have_rewritten(
    note: Noter, operations: list[tuple[str, int, int]]
) -> None:
    """Three vCPUs: each enters, after a flush, at any time, and comes back at any time later."""
    changes = Changes(TABLES)
    indices: list[int] = []  # of all changes so far
    rewritten: set[int] = set()  # the positions there of those that a vCPU rewrote before it came back
    rewriting: list[tuple[int, set[int]]] = [(0, set())] * 3
    for what, first, count in operations:
        if what == "come back":
            number, done = rewriting[first]
            changes.rewritten[first] = max(changes.rewritten[first], number)
            rewritten |= done
        elif what == "enter":
            number, entries, tables = changes.pending()
            rewriting[first] = number, set(range(len(indices)))
            needed = {index for position, index in enumerate(indices) if position not in rewritten}
            assert {index for index in needed if index >> 9 not in tables} <= set(entries)
            assert not {index for index in needed if not index & 511} - {mfn << 9 for mfn in tables}
            assert needed or not (entries or tables)
        else:
            for index in range(first, min(first + count, TABLES * 512)):
                note(changes, index, *ENTRIES[what])
                if what != "nothing" or not index & 511:
                    indices.append(index)


def test_where_too_many_changes_wait_whole_tables_are_rewritten(note: Noter) -> None:
    changes = Changes(64)
    for number in range(KEPT + 600):
        note(changes, number % 511 + 1 + (number // 511 << 9), PTE_P, 0)
    number, entries, tables = changes.pending()
    assert number == KEPT + 600
    assert sorted(tables) == [8, 9]
    assert sorted(entries) == [index for index in range(8 * 512) if index & 511]
    changes.rewritten[1] = number
    assert changes.pending() == (number, [], [])
    note(changes, 77, PTE_P, 0)
    assert changes.pending() == (number + 1, [77], [])
