"""What a trap costs on an engine before ring 0 does anything: the engine's own part, by kind of trap.

A guest loop raises one kind of trap; the handler does as little as it can.  The cost of the loop's own instructions
is negligible.  Prints nanoseconds of CPU time a trap, and the cost of each operation that ring 0 asks of the engine.

    python bench/engine_traps.py [unicorn | kvm] [traps a kind]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from xenolith.abi.x86 import CS, PTE_P, PTE_RW, PTE_US, RCX, RFLAGS, RIP, RSP, SS
from xenolith.machine.engines.protocol import Cpu, CpuState, Engine
from xenolith.machine.engines.select import choose
from xenolith.machine.memory import MachineMemory

CODE = 0x40_0000
UNMAPPED = 0x60_0000
FRAMES = 64
L4, L3, L2, L1, CODE_FRAME, USER_L4, USER_CODE = range(1, 8)

# kind: (instruction, what to add to RIP in the handler to go past it)
KINDS = {
    "syscall": ("0f 05", 0),
    "page fault (#PF)": ("8b 04 25 00 00 60 00", 7),  # mov eax, [0x600000]
    "privileged (#GP)": ("f4", 1),  # hlt
    "invalid (#UD)": ("0f 0b", 2),
    "breakpoint (#BP)": ("cc", 0),
    "int 0x80": ("cd 80", 2),
    "cpuid": ("0f a2", 0),
    "port (#GP)": ("ec", 1),  # in al, dx
}


def machine(name: str) -> tuple[MachineMemory, Engine]:
    memory = MachineMemory(FRAMES)
    taken = set(memory.allocate(FRAMES // 2).tolist())  # ours are among these, and none of the engine's
    assert taken >= set(range(L4, USER_CODE + 4))
    engine = choose(name).factory(memory)
    flags = PTE_P | PTE_RW | PTE_US
    for l4, frame in ((L4, CODE_FRAME), (USER_L4, USER_CODE)):
        base = L3 if l4 == L4 else USER_CODE + 1
        tables = (l4, base, base + 1, base + 2)
        for slot, entry in engine.l4_entries.items():
            memory.table(l4)[slot] = entry
        for table, inner, shift in zip(tables, tables[1:], (39, 30, 21), strict=False):
            memory.table(table)[CODE >> shift & 511] = inner << 12 | flags
        memory.table(tables[3])[CODE >> 12 & 511] = frame << 12 | flags
    return memory, engine


def loop(memory: MachineMemory, frame: int, instruction: bytes) -> None:
    """The instruction eight times, then back to the start."""
    code = instruction * 8
    code += b"\xe9" + (-(len(code) + 5) & 0xFFFF_FFFF).to_bytes(4, "little")
    memory.page(frame)[: len(code)] = code


def start(cpu: Cpu) -> None:
    state = CpuState(l4_mfn=L4)
    for register, value in ((RIP, CODE), (RSP, 0x1000), (CS, 0xE033), (SS, 0xE02B), (RFLAGS, 0x202), (RCX, 0)):
        state.regs[register] = value
    cpu.load(state)


def per_trap(cpu: Cpu, skip: int, count: int) -> float:
    """Nanoseconds from one trap to the next."""
    left = count
    regs = cpu.regs

    def plain(vector: int, error_code: int, address: int) -> bool:
        nonlocal left
        left -= 1
        return left > 0

    def skipping(vector: int, error_code: int, address: int) -> bool:
        nonlocal left
        regs[RIP] += skip
        left -= 1
        return left > 0

    start(cpu)
    begin = time.thread_time_ns()
    cpu.run(skipping if skip else plain)
    return (time.thread_time_ns() - begin) / count


def mode_switches(memory: MachineMemory, cpu: Cpu, count: int) -> float:
    """Nanoseconds of a system call and the switch of mode in its handler."""
    for frame in (CODE_FRAME, USER_CODE):
        loop(memory, frame, bytes.fromhex("0f 05"))
        cpu.code_written(frame)
    left, user = count, False

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        nonlocal left, user
        user = not user
        cpu.switch_mode(USER_L4 if user else L4, user)
        left -= 1
        return left > 0

    start(cpu)
    begin = time.thread_time_ns()
    cpu.run(on_trap)
    return (time.thread_time_ns() - begin) / count


def per_call(operation: Callable[[], object], count: int) -> float:
    begin = time.thread_time_ns()
    for _ in range(count):
        operation()
    return (time.thread_time_ns() - begin) / count


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "unicorn"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200_000
    begin = time.thread_time_ns()
    memory, engine = machine(name)
    print(f"{'open':32}{(time.thread_time_ns() - begin) / 1e6:8.1f} ms")
    cpu = engine.cpu(0)
    for kind, (instruction, skip) in KINDS.items():
        if kind == "cpuid" and name == "kvm":
            continue  # not every KVM tells
        loop(memory, CODE_FRAME, bytes.fromhex(instruction))
        cpu.code_written(CODE_FRAME)
        best = min(per_trap(cpu, skip, count // 5) for _ in range(5))
        print(f"{kind:32}{best:8.0f} ns")
    print(f"{'syscall + switch_mode':32}{min(mode_switches(memory, cpu, count // 5) for _ in range(5)):8.0f} ns")
    first, second = CpuState(), CpuState()
    start(cpu)
    cpu.store(first)
    cpu.store(second)
    operations: dict[str, Callable[[], object]] = {
        "get_rflags": cpu.get_rflags,
        "set_rflags": lambda: cpu.set_rflags(0x202),
        "flush_tlb": cpu.flush_tlb,
        "flush_page": lambda: cpu.flush_page(CODE),
        "switch_mode, back and forth": lambda: (cpu.switch_mode(USER_L4, True), cpu.switch_mode(L4, False)),
        "switch_mode, other page table": lambda: (cpu.switch_mode(USER_L4, False), cpu.switch_mode(L4, False)),
        "set_task_switched": lambda: cpu.set_task_switched(False),
        "set_segment, null": lambda: cpu.set_segment(38, 0),
        "set_code_stack, Xen's": lambda: cpu.set_code_stack(0xE033, 0xE02B),
        "code_written": lambda: cpu.code_written(20),
        "executable_mapped, unchanged": lambda: cpu.executable_mapped(20),
        "store": lambda: cpu.store(first),
        "load": lambda: cpu.load(first),
        "run, one trap": lambda: cpu.run(lambda vector, error_code, address: False),
    }
    if hasattr(cpu, "swap"):
        operations["swap, back and forth"] = lambda: (cpu.swap(first, second), cpu.swap(second, first))
    for operation, function in operations.items():
        best = min(per_call(function, count // 50) for _ in range(5))
        print(f"{operation:32}{best:8.0f} ns")
    engine.close()


if __name__ == "__main__":
    main()
