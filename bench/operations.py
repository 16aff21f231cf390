"""Random operations of guests by the million, beside a domain that must not notice.

    python -m bench.operations --engine unicorn|kvm|adaptive [--operations N] [--seed S] [--streams NAME ...]

Streams: `hypercalls` (fuzz.elf), `instructions` and `gates` (strays.elf: code of programs; entries of the kernel and
its returns, and at the end one that fails), `ring` (blkfront-abuse.elf: entries of a block device's ring), `packets`
(packets.elf: xenstore, events, console), `events` (fifo.elf: nonsense in event words and control blocks).  Each batch
is a domain of its own with a seed of its own; one in eight is destroyed at some moment before its end, and not counted.

Prints a line of JSON at the end: operations by stream, the longest `destroy`, what went wrong.  Wrong is: an exception
in the host, a byte of the bystander's memory changed, a frame table that does not add up, a destroy of a second or
more, a guest that does not pass its checks, a budget of memory that is not all back.  Runs with other seeds add up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xenolith.dom0.backends.block import VbdSpec
from xenolith.dom0.disks import DiskSource
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor import audit

PREBUILT = Path(__file__).resolve().parents[1] / "guests" / "prebuilt"
GUEST_MIB = 32
DEADLINE_SECONDS = 300.0
DESTROY_SECONDS = 1.0
KILLED_ONE_IN = 8
BATCHES_A_MACHINE = 40
DISK_SECTORS = 4096


@dataclass(frozen=True)
class Stream:
    """How a guest is told to make `operations` of its kind from a seed."""

    file: str
    cmdline: str
    operations: int  # in one batch
    ends: tuple[int | None, ...] = (0,)  # shutdown reasons that are right
    disk: bool = False


STREAMS = {
    "hypercalls": Stream("fuzz.elf", "seed={seed} calls={operations}", 40_000),
    "instructions": Stream("strays.elf", "seed={seed} runs={operations} last", 10_000, (0, 3)),
    "gates": Stream("strays.elf", "seed={seed} runs={operations} gates last", 10_000, (0, 3)),
    "ring": Stream("blkfront-abuse.elf", "seed={seed} fuzz={operations}", 10_000, disk=True),
    "packets": Stream("packets.elf", "seed={seed} packets={operations} last", 20_000),
    "events": Stream("fifo.elf", "seed={seed} rounds={operations}", 40_000),
}
SHARES = {"hypercalls": 4, "instructions": 2, "gates": 3, "ring": 1, "packets": 2, "events": 2}  # of batches


class Tracebacks(logging.Handler):
    """Collects exceptions of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))

    def of_thread(self, arguments: threading.ExceptHookArgs) -> None:
        self.found.append(f"{arguments.thread}: {arguments.exc_value!r}")


class Run:
    def __init__(self, engine: str, seed: int, tracebacks: Tracebacks, disk: Path) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.tracebacks = tracebacks
        self.disk = disk
        self.counts: Counter[str] = Counter()
        self.batches = self.killed = 0
        self.longest_destroy = 0.0
        self.problems: list[str] = []

    def machine(self, streams: Sequence[str], operations: int) -> None:
        """A machine with a bystander, and batches beside it."""
        dom0 = power_on([GUEST_MIB] * 3, self.engine)
        try:
            bystander = dom0.create(self._spec(STREAMS["packets"], 1))
            memory = dom0.hypervisor.domains[bystander.domid].memory.b
            before, free = hashlib.sha256(memory).digest(), dom0.hypervisor.memory.free_frames
            for _ in range(BATCHES_A_MACHINE):
                if self.counts.total() >= operations:
                    break
                name = self.random.choices(streams, [SHARES[each] for each in streams])[0]
                seed = self.random.getrandbits(48)
                found = self._batch(dom0, name, seed)
                if hashlib.sha256(memory).digest() != before:
                    found.append("the bystander's memory changed")
                    before = hashlib.sha256(memory).digest()
                if dom0.hypervisor.memory.free_frames != free:
                    found.append(f"{free - dom0.hypervisor.memory.free_frames} frames are not back")
                    free = dom0.hypervisor.memory.free_frames
                log = dom0.hypervisor.log_text
                if "Traceback" in log or "inconsistent" in log:
                    found.append(log[-3000:])
                found += self.tracebacks.found
                self.tracebacks.found.clear()
                self.problems += [f"{name} seed={seed}: {each}" for each in found]
                if "Traceback" in log or "inconsistent" in log:
                    break  # a log that is told of once
        finally:
            dom0.close()

    def _spec(self, stream: Stream, seed: int) -> DomainSpec:
        disks = (VbdSpec(number=51712, name="xvda", source=DiskSource(path=self.disk)),) if stream.disk else ()
        path = PREBUILT / stream.file
        return DomainSpec(
            name=path.stem,
            image=load_image(path),
            kernel=str(path),
            cmdline=stream.cmdline.format(seed=seed, operations=stream.operations),
            memory_kib=GUEST_MIB << 10,
            disks=disks,
        )

    def _batch(self, dom0: Dom0, name: str, seed: int) -> list[str]:
        stream = STREAMS[name]
        domain = dom0.create(self._spec(stream, seed))
        dom0.start(domain)
        self.batches += 1
        if self.random.randrange(KILLED_ONE_IN) == 0:
            self.killed += 1
            domain.wait(self.random.random() * 3)
            return self._audit(dom0) + self._destroy(dom0, domain)
        end = domain.wait(DEADLINE_SECONDS)
        console = domain.console.scrollback.decode("utf-8", "replace")
        found = self._audit(dom0) + self._destroy(dom0, domain)
        reason = end.shutdown_reason if end else None
        if reason not in stream.ends or " FAILED=0" not in console:
            found.append(f"shutdown reason {reason}, console:\n{console[-1500:]}")
        else:
            self.counts[name] += stream.operations
        return found

    def _audit(self, dom0: Dom0) -> list[str]:
        for each in dom0.domains.values():
            dom0.control.pause(each.domid)
        return audit.check(dom0.hypervisor)[:5]

    def _destroy(self, dom0: Dom0, domain: GuestDomain) -> list[str]:
        began = time.monotonic()
        dom0.destroy(domain)
        took = time.monotonic() - began
        self.longest_destroy = max(self.longest_destroy, took)
        return [f"destroy took {took:.2f} s"] if took >= DESTROY_SECONDS else []

    def summary(self) -> dict[str, object]:
        return {
            "engine": self.engine,
            "operations": self.counts.total(),
            "streams": dict(self.counts),
            "batches": self.batches,
            "killed": self.killed,
            "longest_destroy_s": round(self.longest_destroy, 3),
            "problems": self.problems,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", required=True)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    arguments = parser.parse_args()
    tracebacks = Tracebacks()
    logging.getLogger().addHandler(tracebacks)
    threading.excepthook = tracebacks.of_thread
    with tempfile.TemporaryDirectory() as directory:
        disk = Path(directory) / "disk.img"
        disk.write_bytes(bytes(DISK_SECTORS * 512))
        run = Run(arguments.engine, arguments.seed, tracebacks, disk)
        while run.counts.total() < arguments.operations and len(run.problems) < 20:
            run.machine(arguments.streams, arguments.operations)
            print(json.dumps(run.summary() | {"problems": len(run.problems)}), file=sys.stderr, flush=True)
    print(json.dumps(run.summary()))
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
