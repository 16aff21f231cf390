"""Python's time in a trap, by kind, while the stock kernel boots and forks.

    python bench/trap_costs.py [--engine unicorn|kvm] [--json]

Native code is turned off, so that Python handles them all.  Every trap handler is wrapped in two readings of the clock,
and so is each call that it makes into the engine's machine code (flags, page table, TLB flushes); what the readings
themselves cost is measured and taken off. "handler us" is the median of whole handlers, "Python us" of handlers without
those calls, "engine us" the mean of the calls. The engine's own part before and after the handler is in none of them:
bench/engine_traps.py has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xenolith.abi import hypercalls
from xenolith.abi.x86 import RAX
from xenolith.cli.entry import xenolith
from xenolith.hypervisor import traps
from xenolith.hypervisor.domain import Vcpu
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, Cpu, TrapHandler

os.environ["XENOLITH_NATIVE"] = "off"  # or Python would see few of them

WORK = "i=0; while [ $i -lt 100 ]; do /bin/busybox true; i=$((i+1)); done"
HYPERCALL_NAMES = {
    value: name.removeprefix("HYPERVISOR_")
    for name, value in vars(hypercalls).items()
    if name.startswith("HYPERVISOR_") and isinstance(value, int)
}
clock = time.perf_counter_ns
EXCEPTIONS = {0: "#DE", 1: "#DB", 3: "#BP", 6: "#UD", 7: "#NM", 13: "#GP", 14: "#PF"}

ENGINE_CALLS = (
    "get_rflags",
    "set_rflags",
    "switch_mode",
    "flush_tlb",
    "flush_page",
    "code_written",
    "executable_mapped",
)


@dataclass
class Kind:
    """The samples of one kind of trap, in ns."""

    handler: list[int] = field(default_factory=list)  # all of it
    python: list[int] = field(default_factory=list)  # without the engine's calls


kinds: dict[str, Kind] = defaultdict(Kind)


class Meter:
    """Times calls, and knows what that costs."""

    def __init__(self) -> None:
        self.inside = 0  # ns in the engine
        self.calls = 0
        self.reading = 0  # ns between two readings of the clock with nothing between
        self.wrapping = 0  # ns that a timed call takes beyond what it finds
        self.reading = int(statistics.median(-(clock() - clock()) for _ in range(10_000)))
        nothing = self.timed(lambda: None)
        costs = []
        for _ in range(10_000):
            self.inside = 0
            begin = clock()
            nothing()
            costs.append(clock() - begin - self.reading - self.inside)
        self.wrapping = int(statistics.median(costs))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: int) -> Any:
            begin = clock()
            result = function(*arguments)
            self.inside += clock() - begin - self.reading
            self.calls += 1
            return result

        return call


meter = Meter()


def timed(original: Callable[[Vcpu, Cpu], TrapHandler]) -> Callable[[Vcpu, Cpu], TrapHandler]:
    """`traps.trap_handler`, its handlers timed."""

    def trap_handler(vcpu: Vcpu, cpu: Cpu) -> TrapHandler:
        handle = original(vcpu, cpu)
        regs = cpu.regs
        for name in ENGINE_CALLS:
            setattr(cpu, name, meter.timed(getattr(cpu, name)))

        def on_trap(vector: int, error_code: int, address: int) -> bool:
            if vector != TRAP_SYSCALL:
                name = "cpuid" if vector == TRAP_CPUID else EXCEPTIONS.get(vector, f"vector {vector}")
            elif vcpu.kernel_mode:
                name = HYPERCALL_NAMES.get(regs[RAX], "no such hypercall")
            else:
                name = "system call"
            kind = kinds[name]
            meter.inside = meter.calls = 0
            begin = clock()
            more = handle(vector, error_code, address)
            total = clock() - begin - meter.reading - meter.wrapping * meter.calls
            kind.handler.append(total)
            kind.python.append(total - meter.inside)
            return more

        return on_trap

    return trap_handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="unicorn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    traps.trap_handler = timed(traps.trap_handler)
    sys.argv = ["xenolith", "run", "--engine", arguments.engine, "--memory", "128", "--", "sh", "-c", WORK]
    try:
        xenolith()
    except SystemExit as end:
        if end.code:
            raise
    rows = {
        name: {
            "count": len(kind.handler),
            "python_us": statistics.median(kind.python) / 1000,
            "handler_us": statistics.median(kind.handler) / 1000,
            "engine_us": (statistics.fmean(kind.handler) - statistics.fmean(kind.python)) / 1000,
            "total_ms": sum(kind.handler) / 1e6,
        }
        for name, kind in sorted(kinds.items(), key=lambda item: -sum(item[1].handler))
    }
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'kind':20} {'count':>8} {'Python us':>10} {'handler us':>10} {'engine us':>10} {'total ms':>9}")
    for name, row in rows.items():
        print(
            f"{name:20} {row['count']:8} {row['python_us']:10.1f} {row['handler_us']:10.1f} {row['engine_us']:10.1f}"
            f" {row['total_ms']:9.0f}"
        )


if __name__ == "__main__":
    main()
