"""Computing in a domain beside computing natively, in turns of a quarter of a second.

    python -m bench.computing [--engine kvm|adaptive|unicorn] [--turns N] [--seconds S] [ROW ...]

For machines whose speed changes from second to second: each turn runs a row natively and then in the domain, with the
same static program, and gives one ratio. Prints a line of JSON for each row: the median of the ratios (above 1: the
domain was faster), their quartiles, and both medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import threading

from bench.image import BUILD, write_images
from bench.records import Value, parse
from xenolith.debian.framing import CommandOutput, input_chunk, new_nonce
from xenolith.debian.initramfs import Command, HostFile, build_initramfs, kernel_arguments
from xenolith.debian.packages import obtain
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec

ROWS = ["sieve", "sha256", "matmul", "memcpy"]
FASTER_IS_LESS = {"ms", "us", "s"}
MEMORY_MIB = 256
DEADLINE_SECONDS = 120
PROGRAM = BUILD / "lat"
LOOP = "echo ready; while read row; do /lat -b {seconds} $row; done"


class Guest:
    """A domain that runs the rows it is told to, one at a time."""

    def __init__(self, dom0: Dom0, seconds: float) -> None:
        nonce = new_nonce()
        guest = obtain()
        spec = DomainSpec(
            name="computing",
            image=load_image(guest.elf),
            kernel=str(guest.elf),
            ramdisk=build_initramfs(
                guest.busybox,
                command=Command(["sh", "-c", LOOP.format(seconds=seconds)], nonce),
                files=[HostFile.parse(f"{PROGRAM}:/lat")],
            ),
            cmdline=kernel_arguments(1),
            memory_kib=MEMORY_MIB << 10,
        )
        self._framing = CommandOutput(nonce)
        self._lines: list[str] = [""]
        self._changed = threading.Condition()
        self._domain = dom0.create(spec)
        threading.Thread(target=self._follow, daemon=True).start()
        dom0.start(self._domain)
        self._await(lambda: "ready" in self._lines)

    def _follow(self) -> None:
        with self._domain.console.open_reader(Overflow.WAIT) as reader:
            while data := reader.read():
                with self._changed:
                    text = self._framing.feed(data).decode("utf-8", "replace").replace("\r", "")
                    first, *more = text.split("\n")
                    self._lines[-1] += first
                    self._lines += more
                    self._changed.notify_all()

    def _await(self, condition: object) -> None:
        assert callable(condition)
        with self._changed:
            if not self._changed.wait_for(condition, DEADLINE_SECONDS):
                raise SystemExit(f"the domain is silent: {self._lines[-10:]}")

    def _values(self) -> list[Value]:
        return [record for record in map(parse, self._lines[:-1]) if isinstance(record, Value)]

    def run(self, row: str) -> Value:
        before = len(self._values())
        self._domain.console.write(input_chunk(row.encode() + b"\n", sysrq=True))
        self._await(lambda: len(self._values()) > before)
        return self._values()[-1]


def natively(row: str, seconds: float) -> Value:
    done = subprocess.run([PROGRAM, "-b", str(seconds), row], check=True, capture_output=True, text=True)
    values = [record for record in map(parse, done.stdout.splitlines()) if isinstance(record, Value)]
    return values[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    parser.add_argument("--engine", default="kvm")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.25)
    arguments = parser.parse_args()
    write_images()
    os.environ.pop("XENOLITH_ENGINE", None)
    with power_on([MEMORY_MIB], arguments.engine, pcpus=1) as dom0:
        guest = Guest(dom0, arguments.seconds)
        for row in arguments.rows:
            pairs = [(natively(row, arguments.seconds), guest.run(row)) for _ in range(arguments.turns + 1)][1:]
            less = pairs[0][0].unit in FASTER_IS_LESS
            ratios = [(n.value / g.value) if less else (g.value / n.value) for n, g in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            line = {
                "engine": arguments.engine,
                "row": row,
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "native": round(statistics.median(n.value for n, _ in pairs), 1),
                "domain": round(statistics.median(g.value for _, g in pairs), 1),
                "unit": pairs[0][0].unit,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
