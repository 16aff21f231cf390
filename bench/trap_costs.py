"""Python's time in a trap, by kind, while the stock kernel boots and forks.

    python bench/trap_costs.py [--engine unicorn|kvm] [--json]

Every trap handler is wrapped in two readings of the clock; what the readings themselves cost is measured and
taken off. The engine's own part, before and after the handler, is not in these figures: bench/engine_traps.py has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable

from xenolith.abi import hypercalls
from xenolith.abi.x86 import RAX
from xenolith.cli import main as command
from xenolith.hypervisor import traps
from xenolith.hypervisor.domain import Vcpu
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_SYSCALL, Cpu, TrapHandler

WORK = "i=0; while [ $i -lt 100 ]; do /bin/busybox true; i=$((i+1)); done"
HYPERCALL_NAMES = {
    value: name.removeprefix("HYPERVISOR_")
    for name, value in vars(hypercalls).items()
    if name.startswith("HYPERVISOR_") and isinstance(value, int)
}
EXCEPTIONS = {0: "#DE", 1: "#DB", 3: "#BP", 6: "#UD", 7: "#NM", 13: "#GP", 14: "#PF"}

samples: dict[str, list[int]] = defaultdict(list)


def timed(original: Callable[[Vcpu, Cpu], TrapHandler]) -> Callable[[Vcpu, Cpu], TrapHandler]:
    """`traps.trap_handler`, its handlers timed."""

    def trap_handler(vcpu: Vcpu, cpu: Cpu) -> TrapHandler:
        handle = original(vcpu, cpu)
        regs = cpu.regs
        clock = time.perf_counter_ns

        def on_trap(vector: int, error_code: int, address: int) -> bool:
            if vector != TRAP_SYSCALL:
                kind = "cpuid" if vector == TRAP_CPUID else EXCEPTIONS.get(vector, f"vector {vector}")
            elif vcpu.kernel_mode:
                kind = HYPERCALL_NAMES.get(regs[RAX], "no such hypercall")
            else:
                kind = "system call"
            begin = clock()
            more = handle(vector, error_code, address)
            samples[kind].append(clock() - begin)
            return more

        return on_trap

    return trap_handler


def clock_cost() -> int:
    """Nanoseconds between two readings with nothing between."""
    clock = time.perf_counter_ns
    return int(statistics.median(-(clock() - clock()) for _ in range(10_000)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="unicorn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    traps.trap_handler = timed(traps.trap_handler)
    sys.argv = ["xenolith", "run", "--engine", arguments.engine, "--memory", "128", "--", "sh", "-c", WORK]
    try:
        command.main()
    except SystemExit as end:
        if end.code:
            raise
    overhead = clock_cost()
    rows = {
        kind: {
            "count": len(times),
            "median_us": (statistics.median(times) - overhead) / 1000,
            "mean_us": (statistics.fmean(times) - overhead) / 1000,
            "total_ms": (sum(times) - overhead * len(times)) / 1e6,
        }
        for kind, times in sorted(samples.items(), key=lambda item: -sum(item[1]))
    }
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'kind':24} {'count':>8} {'median us':>10} {'mean us':>9} {'total ms':>9}")
    for kind, row in rows.items():
        print(
            f"{kind:24} {row['count']:8} {row['median_us']:10.1f} {row['mean_us']:9.1f} {row['total_ms']:9.0f}"
        )


if __name__ == "__main__":
    main()
