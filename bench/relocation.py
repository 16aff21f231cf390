"""What saving, checkpoints and relocation take: a Debian domain under several loads, and two machines in this process.

    python -m bench.relocation [--engine unicorn|kvm|adaptive] [--rounds 5] [--memory 128] [--qemu]

Prints the median (and the least) of each figure. It stood still from the pause to the answer that it runs there. With
--qemu the same kernel and initramfs in QEMU (TCG), relocated by its own `migrate` to another QEMU of this machine.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.packages import obtain
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import load_image
from xenolith.dom0.migration import live
from xenolith.dom0.migration.checkpoint import Checkpointer
from xenolith.dom0.migration.restore import Receiver
from xenolith.dom0.migration.save import save
from xenolith.dom0.migration.series import Series, new_ident
from xenolith.dom0.migration.stream import Writer
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain

MS = 1e6
PAGE = 4096
LOADS = {
    "idle": "echo LOADED; sleep 100000",
    "web": (
        "ip link set lo up; mkdir /w; dd if=/dev/urandom of=/w/f bs=1k count=64 2>/dev/null; httpd -h /w; echo LOADED;"
        "while :; do wget -q -O /dev/null http://127.0.0.1/f; done"
    ),
    # 5 MB ten times a second: the same 5 MB, and others
    "writer 50 MB/s": (
        "mkdir /w; mount -t tmpfs none /w; echo LOADED; i=0;"
        "while :; do i=$(((i+1) % 8)); dd if=/dev/zero of=/w/$i bs=1M count=5 conv=notrunc 2>/dev/null; sleep 0.1; done"
    ),
}
BUSY = (
    "mkdir /w; mount -t tmpfs none /w; dd if=/dev/urandom of=/w/f bs=1M count=4 2>/dev/null; echo LOADED; i=0;"
    "while :; do i=$((i+1)); cp /w/f /w/$((i % 4)); md5sum /w/$((i % 4)) >/dev/null; echo round $i; done"
)


def spec_of(script: str, memory_mib: int) -> DomainSpec:
    guest = obtain("6.1")
    return DomainSpec(
        name="bench",
        image=load_image(guest.elf),
        kernel=str(guest.elf),
        ramdisk=build_initramfs(guest.busybox, command=Command(["sh", "-c", script], "bench")),
        cmdline=kernel_arguments(1),
        memory_kib=memory_mib << 10,
    )


def booted(dom0: Dom0, spec: DomainSpec) -> GuestDomain:
    domain = dom0.create(spec)
    dom0.start(domain)
    printed = b""
    with domain.console.open_reader(Overflow.WAIT) as reader:
        while b"LOADED" not in printed:
            printed += reader.read(120) or b""
    time.sleep(2)
    return domain


def relocate(
    here: Dom0, there: Dom0, domain: GuestDomain, progress: Callable[[str], None] = lambda text: None
) -> tuple[GuestDomain, live.Figures]:
    """Move a domain from one machine of this process to another."""
    ours, theirs = socket.socketpair()
    arrived: list[GuestDomain] = []

    def receive() -> None:
        with theirs, theirs.makefile("rb") as source:
            receiver = Receiver(there.control, source)
            arrived.append(there.restore(replace(domain.spec, image=None), receiver.receive()))
            theirs.sendall(live.READY)
            receiver.wait_for_word()
            there.start(arrived[0])
            theirs.sendall(live.STARTED)

    thread = threading.Thread(target=receive)
    thread.start()
    with ours, ours.makefile("rb") as answers, ours.makefile("wb", buffering=1 << 20) as out:
        figures = live.send(here, domain, out, answers, None, progress, lambda: None, ours.close)
    thread.join()
    here.destroy(domain)
    return arrived[0], figures


def line(name: str, figures: dict[str, Sequence[float]]) -> None:
    cells = [f"{key} {statistics.median(values):.1f} ({min(values):.1f})" for key, values in figures.items()]
    print(f"{name:<16} " + ", ".join(cells), flush=True)


def relocations(engine: str, rounds: int, memory_mib: int) -> None:
    for name, script in LOADS.items():
        with power_on([memory_mib] * 2, engine) as here, power_on([memory_mib] * 2, engine) as there:
            domain = booted(here, spec_of(script, memory_mib))
            hosts = here, there
            all_figures = []
            for _ in range(rounds):
                domain, figures = relocate(*hosts, domain)
                hosts = hosts[1], hosts[0]
                all_figures.append(figures)
                time.sleep(1)
            memory = memory_mib << 20
            line(
                f"relocate, {name}",
                {
                    "total ms": [each.took_ns / MS for each in all_figures],
                    "stood still ms": [each.down_ns / MS for each in all_figures],
                    "rounds": [len(each.rounds) for each in all_figures],
                    "sent / memory": [(each.pages + each.last_pages) * PAGE / memory for each in all_figures],
                },
            )


def saves(engine: str, rounds: int, memory_mib: int) -> None:
    with power_on([memory_mib] * 2, engine) as dom0, tempfile.TemporaryDirectory() as directory:
        domain = booted(dom0, spec_of(LOADS["idle"], memory_mib))
        saved, restored, first = [], [], []
        path = Path(directory) / "saved"
        for _ in range(rounds):
            began = time.perf_counter()
            with path.open("wb", buffering=1 << 20) as file:
                save(dom0, domain, Writer(file), None, lambda done, total: None)
            saved.append((time.perf_counter() - began) * 1e3)
            dom0.control.unpause(domain.domid)
            began = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                received = Receiver(dom0.control, file).receive()
                again = dom0.restore(replace(domain.spec, image=None), received)
            restored.append((time.perf_counter() - began) * 1e3)
            before = dom0.control.info(again.domid).cpu_time
            dom0.control.unpause(again.domid)
            dom0.control.unpause(again.domid)
            while dom0.control.info(again.domid).cpu_time == before:
                time.sleep(0.0005)
            first.append((time.perf_counter() - began) * 1e3)
            dom0.destroy(again)
        size = path.stat().st_size / (1 << 20)
        line(
            "save, restore", {"save ms": saved, "restore ms": restored, "to first instruction ms": first, "MiB": [size]}
        )


def checkpoints(engine: str, memory_mib: int, periods: int = 4, seconds: float = 8, every: float = 2) -> None:
    """How much less a busy guest does while a checkpoint is taken every two seconds."""

    def done(domain: GuestDomain) -> int:
        found = re.findall(rb"^round (\d+)\r?\n", domain.console.scrollback, re.MULTILINE)
        return int(found[-1]) if found else 0

    with power_on([memory_mib], engine) as dom0, tempfile.TemporaryDirectory() as directory:
        domain = booted(dom0, spec_of(BUSY, memory_mib))
        checkpointer = Checkpointer(dom0, domain)
        last: Series | None = None
        stood: list[float] = []
        pages: list[float] = []
        work: dict[bool, list[float]] = {False: [], True: []}
        number = 0
        for period in range(2 * periods):
            with_them = bool(period % 2)
            before, began = (done(domain), dom0.control.info(domain.domid).cpu_time), time.perf_counter()
            due = began
            while time.perf_counter() < began + seconds:
                if with_them:
                    number += 1
                    base = (f"{last.number}", last.ident) if last else ("", "")
                    last = Series(number, 0, new_ident(), *base)
                    with (Path(directory) / str(number)).open("wb", buffering=1 << 20) as out:
                        ns, count = checkpointer.take(out, last, None)
                    stood.append(ns / MS)
                    pages.append(count)
                due += every
                time.sleep(max(min(due, began + seconds) - time.perf_counter(), 0))
            took = time.perf_counter() - began
            work[with_them].append((done(domain) - before[0]) / took)
            if with_them:
                checkpointer.forget()
                last = None
        line("checkpoints", {"stood still ms": stood, "pages": pages})
        without, with_all = (statistics.median(work[key]) for key in (False, True))
        print(f"  a busy guest does {without:.2f} rounds a second, {with_all:.2f} with one every {every} s: "
              f"{(1 - with_all / without) * 100:.1f} % less", flush=True)  # fmt: skip


# --- QEMU --------------------------------------------------------------------------------------------


class Monitor:
    """A QEMU's QMP socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 60
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> dict[str, object]:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer:
                found: dict[str, object] = answer["return"]
                return found
            if "error" in answer:
                raise RuntimeError(answer["error"])


def qemu(rounds: int, memory_mib: int) -> None:
    guest = obtain("6.1")
    for name, script in LOADS.items():
        totals, downs, sent = [], [], []
        for _ in range(max(rounds // 2, 1)):
            with tempfile.TemporaryDirectory() as directory:
                total, down, ram = _one_qemu(Path(directory), guest.kernel, guest.busybox, script, memory_mib)
            totals.append(total)
            downs.append(down)
            sent.append(ram / (memory_mib << 20))
        line(f"QEMU, {name}", {"total ms": totals, "stood still ms": downs, "sent / memory": sent})


def _one_qemu(directory: Path, kernel: Path, busybox: Path, script: str, memory_mib: int) -> tuple[float, float, float]:
    ramdisk = directory / "ramdisk"
    ramdisk.write_bytes(
        build_initramfs(busybox, command=Command(["sh", "-c", script.replace("LOADED", "LOADED >/dev/ttyS0")], "bench"))
    )
    common = ["qemu-system-x86_64", "-accel", "tcg", "-m", str(memory_mib), "-display", "none", "-nodefaults"]
    common += ["-kernel", str(kernel), "-initrd", str(ramdisk), "-append", "console=ttyS0 quiet"]
    console = directory / "console"
    machines = []
    try:
        for which in ("a", "b"):
            serial = console if which == "a" else directory / "console-b"
            extra = ["-serial", f"file:{serial}", "-qmp", f"unix:{directory / which},server=on,wait=off"]
            incoming = ["-incoming", f"unix:{directory / 'pipe'}"] if which == "b" else []
            machines.append(subprocess.Popen([*common, *extra, *incoming]))
        here, there = Monitor(directory / "a"), Monitor(directory / "b")
        wait(lambda: console.exists() and b"LOADED" in console.read_bytes(), 180)
        time.sleep(2)
        here.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        here.ask("migrate", uri=f"unix:{directory / 'pipe'}")
        wait(lambda: here.ask("query-migrate").get("status") in ("completed", "failed"), 180)
        found = here.ask("query-migrate")
        ram = found["ram"]
        assert isinstance(ram, dict) and there is not None
        return float(str(found["total-time"])), float(str(found["downtime"])), float(ram["transferred"])
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()


def wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="kvm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=128, metavar="MiB")
    parser.add_argument("--qemu", action="store_true", help="QEMU's own, and nothing else")
    arguments = parser.parse_args()
    if arguments.qemu:
        qemu(arguments.rounds, arguments.memory)
        return
    saves(arguments.engine, arguments.rounds, arguments.memory)
    checkpoints(arguments.engine, arguments.memory)
    relocations(arguments.engine, arguments.rounds, arguments.memory)


if __name__ == "__main__":
    main()
