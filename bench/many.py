"""Many domains that compute at once: the paper's figure 6, with tiny guests or with stock Debian domains.

    python -m bench.many [--engine kvm] [--domains 1 2 4 8 16 32 64 128] [--slices 5 50] [--debian]

The same work, divided among so many domains on two pCPUs. `aggregate` is how fast it was done in relation to as many
domains as there are pCPUs; `per_cpu_second` the same by this process's CPU time, which other work of the host moves
little. `--slices`: bvt's context-switch allowance in ms. With `--debian` the domains are Debian's, 96 MiB each, and
count in a shell. What domains cost to start, measured with next to no work, is taken off the CPU time. A line of JSON
for each row.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from functools import partial

from bench.scheduling import LOAD, MEMORY_KIB
from xenolith.debian.framing import new_nonce
from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.packages import obtain
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import DomainSpec
from xenolith.hypervisor.sched.bvt import BorrowedVirtualTime
from xenolith.hypervisor.sched.policy import Policy

PCPUS = 2
ROUNDS = 2560  # of guests/load.c, by all domains together
LOOPS = 3_000_000  # of awk, by all domains together
DEBIAN_KIB = 96 << 10


def sliced(milliseconds: int, pcpus: int) -> Policy:
    policy = BorrowedVirtualTime(pcpus)
    policy.schedparam["allowance"] = milliseconds * 1000
    return policy


def tiny(number: int, rounds: int) -> DomainSpec:
    name, image = f"load{number}", load_image(LOAD)
    return DomainSpec(name=name, image=image, kernel=str(LOAD), cmdline=f"rounds={rounds}", memory_kib=MEMORY_KIB)


def debian(number: int, loops: int) -> DomainSpec:
    guest = obtain()
    script = f"awk 'BEGIN {{ for (i = 0; i < {loops}; i++) s += i * i % 7; print s }}'; poweroff -f"
    return DomainSpec(
        name=f"debian{number}",
        image=load_image(guest.elf),
        kernel=str(guest.elf),
        ramdisk=build_initramfs(guest.busybox, command=Command(["sh", "-c", script], new_nonce())),
        cmdline=kernel_arguments(1),
        memory_kib=DEBIAN_KIB,
    )


def measure(engine: str, domains: int, milliseconds: int, stock: bool, part: float = 1) -> tuple[float, float, int]:
    """Seconds until all are done with `part` of the work; this process's CPU seconds and context switches meanwhile."""
    make, whole, kib = (debian, LOOPS, DEBIAN_KIB) if stock else (tiny, ROUNDS, MEMORY_KIB)
    work = max(int(whole * part), domains)
    with power_on([domains * kib >> 10], engine, PCPUS, partial(sliced, milliseconds)) as dom0:
        made = [dom0.create(make(number, work // domains)) for number in range(domains)]
        began, cpu = time.monotonic(), time.process_time()
        switches = resource.getrusage(resource.RUSAGE_SELF)
        for domain in made:
            dom0.start(domain)
        while any(domain.end is None for domain in made):
            time.sleep(0.01)
        after = resource.getrusage(resource.RUSAGE_SELF)
        count = after.ru_nvcsw + after.ru_nivcsw - switches.ru_nvcsw - switches.ru_nivcsw
        return time.monotonic() - began, time.process_time() - cpu, count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--domains", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--slices", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--debian", action="store_true")
    arguments = parser.parse_args()
    for milliseconds in arguments.slices:
        run = partial(measure, arguments.engine, milliseconds=milliseconds, stock=arguments.debian)
        best, least, _ = run(PCPUS)
        least -= run(PCPUS, part=0)[1]
        for domains in arguments.domains:
            seconds, cpu, switches = run(domains)
            start = run(domains, part=0)[1]
            row = {
                "engine": arguments.engine,
                "domains": domains,
                "slice_ms": milliseconds,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "start_cpu_seconds": round(start, 2),
                "aggregate": round(best / seconds, 3),
                "per_cpu_second": round(least / (cpu - start), 3),
                "context_switches": switches,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
