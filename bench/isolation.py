"""The paper's isolation experiment (4.3, figure 5): two domains that work, two that misbehave.

    python -m bench.isolation [--engine kvm] [--rounds 3] [--seconds 10] [--scheduler credit2] [--native]

Four equal Debian domains on two pCPUs. Measured: `database`, which writes records and syncs each to its disk, and
`web`, which makes pages and their checksums, as many as each can in the time. The other two are idle, or a disk
hog (writes a large file over and over) and a fork bomb with a memory hog. Idle and misbehaving take turns. `--native`:
the same four as processes of plain Linux, by the same programs. A line of JSON with what each did in the time, idle and
beside the hogs, medians of the rounds, and the degradation in percent.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import xenolith
from xenolith.toolstack.config.disk import Disk

MEMORY_MIB = 192
DISK_BYTES = 64 << 20
BOOT_SECONDS = 600

# Each counts what it did in $1 seconds, in the directory $2; $3 is its disk.
DATABASE = """
cd $2; end=$(($(cut -d. -f1 /proc/uptime) + $1)); n=0
while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do
    dd if=/dev/zero of=$3 bs=4096 count=1 seek=$((n % 256)) conv=notrunc,fsync 2>/dev/null; n=$((n + 1))
done; echo did=$n"""
WEB = """
cd $2; head -c 65536 /dev/zero > page; end=$(($(cut -d. -f1 /proc/uptime) + $1)); n=0
while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do
    cat page | sha256sum > answer; n=$((n + 1))
done; echo did=$n"""
DISK_HOG = "cd $2; while [ ! -e stop ]; do dd if=/dev/zero of=$3 bs=64k count=512 conv=notrunc,fsync 2>/dev/null; done"
FORK_BOMB = """
cd $2; ulimit -u 300
(while [ ! -e stop ]; do head -c 60000000 /dev/zero | tail > /dev/null; done) &
while [ ! -e stop ]; do for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do (:; :) & done; wait $!; done"""


class Domains:
    """The four as domains."""

    def __init__(self, engine: str, scheduler: str, directory: Path, resources: ExitStack) -> None:
        power = xenolith.power_on(4 * MEMORY_MIB + 64, engine=engine, pcpus=2, scheduler=scheduler)
        self._machine = resources.enter_context(power)
        self._domains: dict[str, xenolith.Domain] = {}
        for name in ("database", "web", "disk hog", "fork bomb"):
            image = directory / f"{name}.img"
            with image.open("wb") as file:
                file.truncate(DISK_BYTES)
            config = xenolith.debian(name, memory_mib=MEMORY_MIB, devices=True)
            config.disks = [Disk(vdev="xvda", target=str(image))]
            domain = self._domains[name] = self._machine.create(config)
            domain.unpause()

    def _said(self, name: str, script: str) -> bytes:
        done = self._domains[name].run(script, timeout=BOOT_SECONDS)
        if done.returncode:
            raise SystemExit(f"{name}: {script!r} failed: {done.output!r}")
        return done.output

    def start(self, name: str, script: str, seconds: int) -> None:
        quoted = script.replace("'", "'\\''")
        line = f"(sh -c '{quoted}' {name.split()[0]} {seconds} /work /dev/xvda > /out 2>&1; touch /ended) &"
        self._said(name, f"mkdir -p /work; rm -f /work/stop /ended /out; {line}")

    def stop(self, name: str) -> None:
        self._said(name, "touch /work/stop; until [ -e /ended ]; do sleep 0.1; done")

    def did(self, name: str) -> int:
        return _did(self._said(name, "until [ -e /ended ]; do sleep 0.1; done; cat /out"))


class Processes:
    """The four as processes of the host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, script: str, seconds: int) -> None:
        place = self._directory / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        (place / "stop").unlink(missing_ok=True)
        line = [
            shutil.which("busybox") or "sh",
            "sh",
            "-c",
            script,
            name,
            str(seconds),
            str(place),
            str(place / "disk"),
        ]
        self._running[name] = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def stop(self, name: str) -> None:
        (self._directory / name.replace(" ", "-") / "stop").touch()
        self._running.pop(name).wait()

    def did(self, name: str) -> int:
        return _did(self._running.pop(name).communicate()[0])


def _did(output: bytes) -> int:
    found = re.search(rb"did=(\d+)", output)
    if found is None:
        raise SystemExit(f"a measured program failed: {output!r}")
    return int(found[1])


def experiment(four: Domains | Processes, rounds: int, seconds: int) -> dict[str, object]:
    """What the measured two did in each round, idle and beside the hogs."""
    done: dict[tuple[str, bool], list[int]] = {
        (name, hogs): [] for name in ("database", "web") for hogs in (False, True)
    }
    for _ in range(rounds):
        for hogs in (False, True):
            if hogs:
                four.start("disk hog", DISK_HOG, seconds)
                four.start("fork bomb", FORK_BOMB, seconds)
            four.start("database", DATABASE, seconds)
            four.start("web", WEB, seconds)
            for name in ("database", "web"):
                done[name, hogs].append(four.did(name))
            if hogs:
                four.stop("disk hog")
                four.stop("fork bomb")
    row: dict[str, object] = {}
    for name in ("database", "web"):
        idle, beside = (statistics.median(done[name, hogs]) for hogs in (False, True))
        row[name] = {"idle": idle, "beside_hogs": beside, "lost_percent": round(100 * (1 - beside / idle), 1)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--scheduler", default="credit2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--native", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isolation-") as text, ExitStack() as resources:
        directory = Path(text)
        if arguments.native:
            four: Domains | Processes = Processes(directory)
        else:
            four = Domains(arguments.engine, arguments.scheduler, directory, resources)
        row = experiment(four, arguments.rounds, arguments.seconds)
    system = "native" if arguments.native else f"{arguments.engine}, {arguments.scheduler}"
    print(json.dumps({"system": system, **row}), flush=True)


if __name__ == "__main__":
    main()
