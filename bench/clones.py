"""What clones and templates cost: time to make and to answer, memory, many at once.

    python -m bench.clones [--engine adaptive] [--clones 100] [--at-once 20] [--runs 20]

A 128 MiB Debian is booted in this process.  Then: clones that are not let run (time of each, this process's private
memory for each, processor time that they cost in a second); the first command of fresh ones, from unpausing to its end,
and the second; so many fresh ones at once; and `xenolith run --template`, by a client that is there and by one that has
to start, of a daemon of its own.  Medians and best; wall and this process's processor time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import xenolith
from xenolith.toolstack.api import Domain, Machine
from xenolith.toolstack.embedded import EmbeddedToolstack

MEMORY_MIB = 128
SETTLED_SECONDS = 3.0


def private_mib() -> float:
    """Memory that is this process's alone."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE)) / 1024


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of something, in ms."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def show(what: str, times: list[tuple[float, float]]) -> None:
    walls, cpus = zip(*times, strict=True)
    print(f"{what:58} wall {median(walls):7.1f} (best {min(walls):6.1f}) ms   cpu {median(cpus):6.1f} ms", flush=True)


def clones(machine: Machine, count: int, at_once: int) -> None:
    guest = machine.create(xenolith.debian("guest", memory_mib=MEMORY_MIB))
    guest.unpause()
    for _ in range(20):
        guest.run("true")
    client = machine.client
    assert isinstance(client, EmbeddedToolstack)
    frozen = client.freeze(guest.domid)
    guest.pause()
    config = client.config(guest.domid)
    made = [client.make_clone(config, frozen, "c0", 0, True)]
    before = private_mib()
    times = [
        timed(lambda number=number: made.append(client.make_clone(config, frozen, f"c{number}", number, True)))  # type: ignore[misc]
        for number in range(1, count + 1)
    ]
    show(f"{count} clones made, each", times)
    frames = client.dom0.control.private_frames(made[-1])
    print(f"{'memory of each':58} {(private_mib() - before) / count:.2f} MiB, of that the guest's {frames / 256:.2f}")
    cpu = time.process_time()
    time.sleep(SETTLED_SECONDS)
    print(f"{'all of them, in a second':58} {(time.process_time() - cpu) / SETTLED_SECONDS * 1e3:.1f} ms of CPU time")
    domains = [Domain(machine, domid) for domid in made]

    def first(domain: Domain) -> bytes:
        domain.unpause()
        return domain.run(["cat", "/proc/sys/kernel/random/uuid"]).stdout

    alone = domains[: min(10, count // 2)]
    show("first command of one, from unpause to its end", [timed(lambda d=d: first(d)) for d in alone])  # type: ignore[misc]
    show("second command", [timed(lambda d=d: d.run(["true"])) for d in alone])  # type: ignore[misc]
    several = domains[len(alone) : len(alone) + at_once]
    with ThreadPoolExecutor(at_once) as pool:
        said: list[bytes] = []
        wall, cpu = timed(lambda: said.extend(pool.map(first, several)))
    different = len(set(said))
    print(f"{f'{len(several)} first commands at once':58} wall {wall:7.1f} ms, cpu {cpu:.1f} ms, {different} different")
    frozen.close()


def templates(engine: str, runs: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "control.sock"
        environment = os.environ | {"XENOLITH_SOCKET": str(socket)}
        program = [str(Path(sys.executable).with_name("xenolith"))]
        daemon = subprocess.Popen([*program, "daemon", "--engine", engine], env=environment, stderr=subprocess.DEVNULL)
        try:
            while not socket.exists() and daemon.poll() is None:
                time.sleep(0.05)
            runs_of_a_template(program, environment, socket, runs)
        finally:
            daemon.terminate()
            daemon.wait()


def runs_of_a_template(program: list[str], environment: dict[str, str], socket: Path, runs: int) -> None:
    line = [*program, "template", "create", "base", "--ready", "4"]
    wall, _ = timed(lambda: subprocess.run(line, env=environment, check=True))
    print(f"{'template create':58} wall {wall:7.1f} ms")
    with xenolith.connect(socket) as machine:
        (template,) = machine.templates()

        def by_client() -> None:
            template.run(["true"]).check()

        def by_command() -> None:
            subprocess.run([*program, "run", "--template", "base", "--", "true"], env=environment, check=True)

        for what, work in (("a client that is there", by_client), ("the command line", by_command)):
            times = []
            for _ in range(runs):
                while template.info.ready < template.info.wanted:
                    time.sleep(0.05)
                times.append(timed(work))
            show(f"run --template -- true, by {what}", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--clones", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    with xenolith.power_on(arguments.clones * 24 + 1024, arguments.engine) as machine:
        print(f"engine {machine.host.engine}, {MEMORY_MIB} MiB Debian; load {os.getloadavg()[0]:.1f}")
        clones(machine, arguments.clones, arguments.at_once)
    templates(arguments.engine, arguments.runs)


if __name__ == "__main__":
    main()
