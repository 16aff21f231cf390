"""A loaded guest whose memory shrinks and grows again, over and over.

    python -m bench.balloon [--engine kvm] [--cycles 10] [--full 512] [--small 128]

A stock Debian domain checks sums of a file all the time, and fills its memory once before each cycle. A line of JSON
for each cycle: seconds until the balloon is where it was told to be, either way; MiB that the machine has free and that
the host holds for the domain, when small and when full. The last line: sums that were wrong and tasks killed (none).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import xenolith

BALLOON = "/sys/devices/system/xen_memory/xen_memory0/info/current_kb"
DEADLINE_SECONDS = 600


def held_mib() -> float:
    """Host memory in all memory objects of this process."""
    held = {}
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_symlink() and "/memfd:" in os.readlink(descriptor):
            status = os.stat(descriptor)
            held[status.st_ino] = status.st_blocks * 512
    return round(sum(held.values()) / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--full", type=int, default=512, help="MiB")
    parser.add_argument("--small", type=int, default=128, help="MiB")
    arguments = parser.parse_args()
    with xenolith.power_on(memory_mib=arguments.full + 64, engine=arguments.engine) as machine:
        domain = machine.create(xenolith.debian("balloon", "6.1-cloud", memory_mib=arguments.full))
        domain.unpause()

        def said(script: str) -> str:
            return domain.run(script, timeout=DEADLINE_SECONDS).output.decode()

        def set_to(mib: int) -> dict[str, float]:
            began = time.monotonic()
            domain.set_memory_target(mib << 10)
            said(f"until [ $(cat {BALLOON}) = {mib << 10} ]; do sleep 0.1; done")
            seconds = round(time.monotonic() - began, 1)
            return {"seconds": seconds, "free_mib": machine.host.free_memory_kib >> 10, "held_mib": held_mib()}

        said("head -c 20000000 /dev/urandom > /data; sha256sum /data > /sum")
        said("while [ ! -e /stop ]; do sha256sum -c -s /sum || echo bad; done > /load 2>&1 &")
        for cycle in range(1, arguments.cycles + 1):
            said(f"head -c {(arguments.full * 5 // 8) << 20} /dev/zero > /much; rm /much")
            small, full = set_to(arguments.small), set_to(arguments.full)
            print(json.dumps({"cycle": cycle, "small": small, "full": full}), flush=True)
        wrong, killed = said("touch /stop; wait; grep -c bad /load; dmesg | grep -c 'Out of memory'; true").split()
        print(json.dumps({"wrong_sums": int(wrong), "killed": int(killed)}))


if __name__ == "__main__":
    main()
