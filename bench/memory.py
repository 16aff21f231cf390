"""What an idle Debian domain costs the host in memory, beyond what the guest touched, and in processor time.

    python bench/memory.py [--engine unicorn|kvm] [--domains 3] [--memory 128]

Boots domains one after the other in this process, each to its shell, and reads this process's own accounting
(/proc/self/status) after each: anonymous memory is Xenolith's, shared memory is machine memory, which is what guests
(and Xen's own frames) have touched.
"""

from __future__ import annotations

import argparse
import gc
import re
import threading
import time
from pathlib import Path

from xenolith.debian.initramfs import build_initramfs, kernel_arguments
from xenolith.debian.packages import obtain
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec

SHELL_SECONDS = 120
IDLE_SECONDS = 20


def usage() -> dict[str, float]:
    """MiB of this process by kind."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {name: int(kib) / 1024 for name, kib in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE)}


def boot(dom0: Dom0, number: int, memory_mib: int) -> None:
    """One more domain, until its shell has settled down."""
    guest = obtain()
    spec = DomainSpec(
        name=f"idle{number}",
        image=load_image(guest.elf),
        kernel=str(guest.elf),
        ramdisk=build_initramfs(guest.busybox),
        cmdline=kernel_arguments(1),
        memory_kib=memory_mib << 10,
    )
    domain = dom0.create(spec)
    dom0.start(domain)
    deadline = time.monotonic() + SHELL_SECONDS
    before, idle = -1, 0
    while idle < 3 and time.monotonic() < deadline:  # its CPU time stands still
        threading.Event().wait(1)
        now = dom0.control.info(domain.domid).cpu_time
        idle = idle + 1 if now - before < 100_000_000 else 0
        before = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="unicorn")
    parser.add_argument("--domains", type=int, default=3)
    parser.add_argument("--memory", type=int, default=128, metavar="MiB")
    arguments = parser.parse_args()
    print(f"{'':12} {'Xenolith':>10} {'libraries':>10} {'guests':>10}   MiB")
    with power_on([arguments.memory] * arguments.domains, arguments.engine) as dom0:
        before = usage()
        print(f"{'no domain':12} {before['RssAnon']:10.1f} {before['RssFile']:10.1f} {before['RssShmem']:10.1f}")
        for number in range(1, arguments.domains + 1):
            boot(dom0, number, arguments.memory)
            after = usage()
            print(
                f"{f'{number} domains':12} {after['RssAnon']:10.1f} {after['RssFile']:10.1f} "
                f"{after['RssShmem']:10.1f}   this one: {after['RssAnon'] - before['RssAnon']:.1f} beyond the "
                f"{after['RssShmem'] - before['RssShmem']:.1f} that it touched",
                flush=True,
            )
            before = after
        settled, began = time.process_time(), time.monotonic()
        time.sleep(IDLE_SECONDS)
        part = (time.process_time() - settled) / (time.monotonic() - began) / arguments.domains
        print(f"an idle domain takes {100 * part:.2f} % of a core")


if __name__ == "__main__":
    main()
