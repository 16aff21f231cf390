"""How long guest code keeps running after a kick, by what it does: the time from `kick` to the return of `run`.

Whoever stops a vCPU (a flush, a pause, the end of its turn) waits for that. Times are of the clock, so on a host with
other work they hold that, too: the median says what the engine takes.

    python -m bench.kicks [unicorn | kvm | adaptive] [kicks a kind]
"""

from __future__ import annotations

import statistics
import sys
import threading
import time

from bench.engine_traps import CODE, CODE_FRAME, L1, machine, start
from xenolith.abi.x86 import PTE_P, PTE_RW, PTE_US, RIP
from xenolith.machine.engines.protocol import Cpu

DATA_FRAME = 20
MAPPED = range(1, 512)  # pages behind the code, all of them the same frame
RUNS = 0.003  # s, before it is kicked

KINDS = {
    "a loop of one instruction": "eb fe",
    # rsi = rdi = the pages behind; ecx = their bytes; rep movsb; again
    "REP MOVSB over 2 MB": "be 00 10 40 00 89 f7 b9 00 f0 1f 00 f3 a4 eb f0",
    "locked additions": "f0 ff 04 25 00 10 40 00 eb f6",
    "code that writes itself": "c6 05 02 00 00 00 eb eb f7",  # mov byte [the jump], eb; jmp
    "system calls": "0f 05 eb fc",
    "page faults": "8b 04 25 00 00 60 00",
    "undefined opcodes": "0f 0b",
}


def waits(cpu: Cpu, kicks: int) -> list[int]:
    """ns until `run` has returned, each."""
    found: list[int] = []
    kicked = 0

    def kick() -> None:
        nonlocal kicked
        time.sleep(RUNS)
        kicked = time.perf_counter_ns()
        cpu.kick()

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        cpu.regs[RIP] = CODE
        return True

    for _ in range(kicks):
        kicked = 0
        start(cpu)
        kicker = threading.Thread(target=kick)
        kicker.start()
        while not kicked:  # an engine may return for reasons of its own
            cpu.run(on_trap)
        found.append(time.perf_counter_ns() - kicked)
        kicker.join()
    return found


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "unicorn"
    kicks = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    memory, engine = machine(name)
    for page in MAPPED:
        memory.table(L1)[page] = DATA_FRAME << 12 | PTE_P | PTE_RW | PTE_US
    cpu = engine.cpu(0)
    for kind, code in KINDS.items():
        instructions = bytes.fromhex(code)
        memory.page(CODE_FRAME)[: len(instructions)] = instructions
        cpu.code_written(CODE_FRAME)
        found = sorted(waits(cpu, kicks))
        median, most = statistics.median(found) / 1e3, found[len(found) * 9 // 10] / 1e3
        print(f"{kind:32}{median:8.0f} us, nine of ten within {most:8.0f} us")
    engine.close()


if __name__ == "__main__":
    main()
