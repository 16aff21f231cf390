"""A running vCPU can be stopped from any thread, at any moment, and nothing of the guest's state is lost."""

from __future__ import annotations

import signal
import threading
import time
from itertools import count

from xenolith.abi.x86 import R8, RAX, RCX, RDI, RIP, RSP, VECTOR_UD
from xenolith.machine.engines.kvm.cpu import KICK_SIGNAL, KvmCpu
from xenolith.machine.engines.protocol import TRAP_SYSCALL

from .bare import CODE, DATA, STACK_TOP, Machine, in_thread, run_to_trap


def no_trap(*trap: int) -> bool:
    raise AssertionError(f"unexpected trap {trap}")


def test_a_kick_before_run_makes_it_return_at_once(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("eb fe")
    cpu.kick()
    cpu.run(no_trap)
    assert cpu.regs[RIP] == CODE


def test_a_kick_from_the_trap_handler_itself_counts(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("0f 05 eb fe")

    def on_trap(*_trap: int) -> bool:
        cpu.kick()
        return True

    cpu.run(on_trap)
    assert cpu.regs[RIP] == CODE + 2


def test_every_kick_stops_an_endless_loop(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("48 ff c0 eb fb")
    cpu.regs[RAX] = 0
    returned = threading.Semaphore(0)
    rounds = 300

    def runner() -> None:
        for _ in range(rounds):
            cpu.run(no_trap)
            returned.release()

    thread = in_thread(runner)
    for _ in range(rounds):
        cpu.kick()
        assert returned.acquire(timeout=20), "a kick was lost"
    thread.join(20)
    assert cpu.regs[RIP] in (CODE, CODE + 3)


def kicking(cpu: KvmCpu, interval: float) -> tuple[threading.Thread, threading.Event]:
    done = threading.Event()

    def kicker() -> None:
        while not done.is_set():
            cpu.kick()
            time.sleep(interval)

    return in_thread(kicker), done


def test_kicks_in_the_middle_of_traps_lose_and_repeat_nothing(machine: Machine) -> None:
    """The guest traps all the time; after each kick it is sent elsewhere, as for an event, and comes back.

    An exception that KVM still held queued at a kick would strike in that other place.
    """
    cpu = machine.cpu()
    # again: inc rax; ud2; inc r8; syscall; dec r9; jnz again; int3
    machine.write_code("48 ff c0 0f 0b 49 ff c0 0f 05 49 ff c9 75 f1 cc")
    elsewhere = machine.write_code("48 ff c3 cc", 0x200)  # inc rbx; int3
    rounds = 3000
    cpu.regs[9] = rounds
    cpu.regs[RAX] = cpu.regs[R8] = cpu.regs[3] = 0
    counts = {VECTOR_UD: 0, TRAP_SYSCALL: 0}
    saved: list[tuple[int, ...]] = []
    finished = False
    visits = 0

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        nonlocal finished, visits
        rip = cpu.regs[RIP]
        if vector == 3 and rip == elsewhere + 4:
            visits += 1
            cpu.regs[RIP], cpu.regs[RSP] = saved.pop()
            cpu.set_rflags(flags.pop())
            return True
        if vector == 3:
            assert rip == CODE + 16
            finished = True
            return False
        counts[vector] += 1
        if vector == VECTOR_UD:
            assert rip == CODE + 3
            cpu.regs[RIP] += 2
        else:
            assert rip == CODE + 10
        return True

    flags: list[int] = []
    thread, done = kicking(cpu, 0.0002)
    for _ in count():
        cpu.run(on_trap)
        if finished:
            break
        if not saved and cpu.regs[RIP] < elsewhere:
            saved.append((cpu.regs[RIP], cpu.regs[RSP]))
            flags.append(cpu.get_rflags())
            cpu.regs[RIP] = elsewhere
    done.set()
    thread.join()
    assert counts == {VECTOR_UD: rounds, TRAP_SYSCALL: rounds}
    assert (cpu.regs[RAX], cpu.regs[R8]) == (rounds, rounds)
    assert cpu.regs[3] == visits > 20


def test_kicks_during_changes_of_page_tables_lose_nothing(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("0f 05 48 ff c0 48 ff c9 75 f6 0f 0b")
    cpu.regs[RAX] = 0
    cpu.regs[RCX] = 0
    rounds = 1500
    left = rounds
    index = machine.entry(DATA)

    def on_trap(vector: int, _error_code: int, _address: int) -> bool:
        nonlocal left
        if vector != TRAP_SYSCALL:
            return False
        cpu.regs[RCX] = left
        left -= 1
        machine.engine.entry_changed(index, 1, 0)
        cpu.flush_tlb()
        cpu.regs[RDI] = 0x1234
        return True

    thread, done = kicking(cpu, 0.0003)
    while cpu.regs[RIP] != CODE + 10:
        cpu.run(on_trap)
        assert cpu.regs[RSP] == STACK_TOP
        assert cpu.regs[RIP] - CODE < 12
    done.set()
    thread.join()
    assert cpu.regs[RAX] == rounds
    assert cpu.regs[RDI] == 0x1234


def test_a_vcpu_may_move_between_threads(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("48 ff c0 0f 0b")
    cpu.regs[RAX] = 0
    for number in range(1, 6):
        cpu.regs[RIP] = CODE
        thread = in_thread(lambda: run_to_trap(cpu) and None)
        thread.join(20)
        assert cpu.regs[RAX] == number
        cpu.kick()  # nobody runs it now
        cpu.run(no_trap)


def test_other_signals_neither_stop_the_guest_nor_get_lost(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.write_code("48 ff c9 75 fb 0f 0b")
    cpu.regs[RCX] = 400_000_000
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: received.append(number))
    main = threading.get_ident()
    try:
        timer = threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGUSR1))
        timer.start()
        assert run_to_trap(cpu)[0] == VECTOR_UD
        timer.join()
        assert cpu.regs[RCX] == 0
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_that_ran_a_guest_survives_a_late_kick(machine: Machine) -> None:
    cpu = machine.cpu()
    machine.execute(cpu, "0f 0b")
    assert KICK_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for _ in range(100):
        cpu.kick()
    cpu.regs[RIP] = CODE
    cpu.run(no_trap)
    assert run_to_trap(cpu)[0] == VECTOR_UD
