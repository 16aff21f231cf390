"""How domains that compute share two processors.

    python bench/scaling.py [--engine kvm|unicorn|adaptive] [--domains 1 2 4] [--rounds N]

Boots one, two and four domains in this process, with two pCPUs. Each runs the same loop of a fixed number of rounds
and says when it begins and ends. Prints a line of JSON for each number of domains: throughput relative to one domain,
and the least share of CPU time over the greatest, counted while all of them ran.
"""

from __future__ import annotations

import argparse
import json
import threading
import time

from xenolith.debian.framing import CommandOutput, input_chunk, new_nonce
from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.packages import obtain
from xenolith.dom0.console import Overflow
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain

MEMORY_MIB = 96
DEADLINE_SECONDS = 600
PCPUS = 2


class Worker:
    """A domain that waits for a word, computes, and says that it has."""

    def __init__(self, dom0: Dom0, number: int, rounds: int) -> None:
        loop = f"awk 'BEGIN {{ for (i = 0; i < {rounds}; i++) s += i * i % 7; print s }}'"
        nonce = new_nonce()
        guest = obtain()
        spec = DomainSpec(
            name=f"worker{number}",
            image=load_image(guest.elf),
            kernel=str(guest.elf),
            ramdisk=build_initramfs(
                guest.busybox,
                command=Command(["sh", "-c", f"echo ready; read word; {loop}; echo done; sleep 1000"], nonce),
            ),
            cmdline=kernel_arguments(1),
            memory_kib=MEMORY_MIB << 10,
        )
        self._framing = CommandOutput(nonce)
        self._output = ""
        self._changed = threading.Condition()
        self.domain: GuestDomain = dom0.create(spec)
        threading.Thread(target=self._follow, daemon=True).start()
        dom0.start(self.domain)

    def _follow(self) -> None:
        with self.domain.console.open_reader(Overflow.WAIT) as reader:
            while data := reader.read():
                with self._changed:
                    self._output += self._framing.feed(data).decode("utf-8", "replace")
                    self._changed.notify_all()

    def says(self, word: str) -> bool:
        return f"{word}\n" in self._output.replace("\r", "")

    def await_word(self, word: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.says(word), DEADLINE_SECONDS):
                raise SystemExit(f"{self.domain.spec.name} did not get to {word!r}: {self._output!r}")


def measure(engine: str, domains: int, rounds: int) -> tuple[float, list[float]]:
    """Seconds until all have computed, and the CPU seconds of each when the first one had."""
    with power_on([MEMORY_MIB] * domains, engine, pcpus=PCPUS) as dom0:
        workers = [Worker(dom0, number, rounds) for number in range(1, domains + 1)]
        for worker in workers:
            worker.await_word("ready")

        def cpu_times() -> list[int]:
            return [dom0.control.info(worker.domain.domid).cpu_time for worker in workers]

        before, started = cpu_times(), time.monotonic()
        for worker in workers:
            worker.domain.console.write(input_chunk(b"go\n", sysrq=True))
        shares: list[float] = []
        while not shares:
            time.sleep(0.01)
            if any(worker.says("done") for worker in workers) or time.monotonic() - started > DEADLINE_SECONDS:
                shares = [(after - first) / 1e9 for first, after in zip(before, cpu_times(), strict=True)]
        for worker in workers:
            worker.await_word("done")
        return time.monotonic() - started, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--domains", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5_000_000)
    arguments = parser.parse_args()
    alone, _ = measure(arguments.engine, 1, arguments.rounds)
    for domains in arguments.domains:
        seconds, shares = measure(arguments.engine, domains, arguments.rounds)
        row = {
            "engine": arguments.engine,
            "domains": domains,
            "seconds": round(seconds, 2),
            "throughput": round(domains * alone / seconds, 2),
            "cpu_seconds": [round(share, 2) for share in shares],
            "least_share_over_greatest": round(min(shares) / max(shares), 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
