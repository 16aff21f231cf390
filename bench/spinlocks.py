"""PV spin locks on an overcommitted machine: four vCPUs on one pCPU, with and without `nopvspin`.

    python -m bench.spinlocks [--engine kvm] [--seconds 20]

Runs tests/boot/storm.c in a Debian guest: rounds of futexes, pipes, forks and checksums in the time, how often a lock's
holder kicked a vCPU that waited for it (the guest's interrupts `spinlockN`), and the vCPU seconds that took. A line of
JSON for each of the two.
"""

from __future__ import annotations

import argparse
import json
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import xenolith
from xenolith.debian.initramfs import Node, pack

STORM = Path(__file__).parents[1] / "tests/boot/storm.c"
DEADLINE_SECONDS = 600


def measure(engine: str, seconds: int, arguments: str, directory: Path) -> dict[str, object]:
    program = directory / "storm"
    subprocess.run(["gcc", "-O1", "-static", "-pthread", "-o", str(program), str(STORM)], check=True)
    config = xenolith.debian("storm", memory_mib=192, vcpus=4, arguments=arguments)
    whole = directory / "initramfs"
    node = Node("bin/storm", stat.S_IFREG | 0o755, program.read_bytes())
    whole.write_bytes(Path(config.ramdisk or "").read_bytes() + pack([node]))
    config.ramdisk = str(whole)
    with xenolith.power_on(256, engine=engine, pcpus=1) as machine:
        domain = machine.create(config)
        domain.unpause()

        def said(script: str) -> str:
            return domain.run(script, timeout=DEADLINE_SECONDS).output.decode()

        said("storm > /storm.out 2>&1 &")
        before = domain.info.cpu_time_ns
        time.sleep(seconds)
        used = domain.info.cpu_time_ns - before
        rounds = said("touch /stop; until [ -s /storm.out ]; do sleep 0.1; done; cat /storm.out").split()
        kicks = said("awk '/spinlock/ { for (i = 2; i < 6; i++) n += $i } END { print n + 0 }' /proc/interrupts")
    done = dict(zip(rounds[::2], map(int, rounds[1::2]), strict=True))
    return {"arguments": arguments, **done, "kicks": int(kicks), "vcpu_seconds": round(used / 1e9, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seconds", type=int, default=20)
    arguments = parser.parse_args()
    for words in ("", "nopvspin"):
        with tempfile.TemporaryDirectory(prefix="spinlocks-") as directory:
            print(json.dumps(measure(arguments.engine, arguments.seconds, words, Path(directory))), flush=True)


if __name__ == "__main__":
    main()
