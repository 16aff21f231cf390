"""The scheduling algorithms on the real machine: shares, caps, latency, and what a decision costs.

    python -m bench.scheduling [--engine kvm] [--seconds 10] [decisions|weights|caps|latency ...]

Tiny guests (guests/load.c) on one pCPU. Shares are of the time that vCPUs held the pCPU, so that other work of the
host moves them little; latencies are a guest's own, and other work moves those a lot. A line of JSON for each row.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import Dom0, DomainSpec, GuestDomain
from xenolith.hypervisor.sched.algorithms import ALGORITHMS
from xenolith.hypervisor.sched.policy import Policy, Unit

LOAD = Path(__file__).parents[1] / "guests/prebuilt/load.elf"
MEMORY_KIB = 8 << 10
TURNS = 2000
MS = 1_000_000
WAKES, BUSY_US = 400, 200
CAPS = (10, 25, 50, 90)


def show(**row: object) -> None:
    print(json.dumps(row), flush=True)


class Machine:
    """Tiny guests under one algorithm."""

    def __init__(self, dom0: Dom0) -> None:
        self.dom0 = dom0
        self.domains: list[GuestDomain] = []

    def add(self, words: str = "", **parameters: int) -> GuestDomain:
        """One more, which does not run yet."""
        spec = DomainSpec(
            name=f"load{len(self.domains)}",
            image=load_image(LOAD),
            kernel=str(LOAD),
            cmdline=words,
            memory_kib=MEMORY_KIB,
            scheduling=parameters,
        )
        self.domains.append(self.dom0.create(spec))
        return self.domains[-1]

    def start(self) -> None:
        for domain in self.domains:
            self.dom0.start(domain)

    def times(self) -> list[int]:
        """ns for which each has run."""
        return [self.dom0.control.info(domain.domid).cpu_time for domain in self.domains]

    def shares(self, seconds: float) -> list[float]:
        """Of the time to come, what part each runs."""
        time.sleep(0.5)
        before, began = self.times(), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        return [(after - first) / took / 1e9 for first, after in zip(before, self.times(), strict=True)]


@contextmanager
def machine(engine: str, algorithm: str, pcpus: int = 1) -> Iterator[Machine]:
    with power_on([256], engine, pcpus, ALGORITHMS[algorithm]) as dom0:
        yield Machine(dom0)


def turn(policy: Policy, units: list[Unit], now: int) -> None:
    """What the scheduler asks for one vCPU's turn on a contended pCPU."""
    unit = policy.pick(units, now)
    unit.running_since = now
    policy.quantum(unit, True, now)
    policy.expired(unit, [other for other in units if other is not unit], now + MS)
    unit.running_since = now + MS
    policy.charge(unit, MS, now + MS)
    unit.running_since = None
    policy.queue(unit, [other for other in units if other is not unit], now + MS)


def decisions() -> None:
    """us of CPU time of a turn, by how many want the pCPU."""
    for name, make in ALGORITHMS.items():
        row = {}
        for count in (2, 8, 32, 128):
            policy = make(1)
            units = [Unit(number, 0, dict(policy.parameters)) for number in range(count)]
            for unit in units:
                policy.add(unit, 0)
            for unit in units:
                policy.wake(unit, 0)
                policy.queue(unit, [other for other in units if other is not unit], 0)
            began = time.thread_time()
            for number in range(TURNS):
                turn(policy, units, number * MS)
            row[str(count)] = round((time.thread_time() - began) / TURNS * 1e6, 1)
        show(row="decision", algorithm=name, us_by_waiting=row)


def weights(engine: str, seconds: float) -> None:
    """Three that compute, of weights 1, 2 and 4: their shares, and the greatest error."""
    for name in ALGORITHMS:
        with machine(engine, name) as here:
            for weight in (128, 256, 512):
                here.add(weight=weight)
            here.start()
            shares = here.shares(seconds)
        whole = sum(shares)
        errors = [abs(share / whole - due / 7) for share, due in zip(shares, (1, 2, 4), strict=True)]
        shown = [round(share, 4) for share in shares]
        show(row="weights", algorithm=name, shares=shown, used=round(whole, 4), error=round(max(errors), 4))


def caps(engine: str, seconds: float) -> None:
    """One that computes on an idle pCPU, held to part of it."""
    for cap in CAPS:
        with machine(engine, "credit2") as here:
            here.add(cap=cap)
            here.start()
            (share,) = here.shares(seconds)
        show(row="cap", cap=cap, share=round(share, 4), error=round(abs(share - cap / 100), 4))


def latency(engine: str) -> None:
    """One that sleeps 5 ms and computes 0.2, beside three that compute: us that it is late."""
    cases: list[tuple[str, str, dict[str, int]]] = [(name, "", {}) for name in ALGORITHMS]
    cases.append(("bvt", "warped", {"warp": 100_000, "warp_limit": 2_000, "unwarp": 3_000}))
    for name, how, parameters in cases:
        with machine(engine, name) as here:
            for _ in range(3):
                here.add()
            sleeper = here.add(f"wakes={WAKES} busy={BUSY_US}", **parameters)
            here.start()
            began = time.monotonic()
            while b"done" not in sleeper.console.scrollback and time.monotonic() - began < 120:
                time.sleep(0.2)
            found = re.search(rb"median=(\d+) p99=(\d+) worst=(\d+)", sleeper.console.scrollback)
        late = dict(zip(("median", "p99", "worst"), map(int, found.groups()), strict=True)) if found else None
        show(row="latency", algorithm=name, how=how, late_us=late)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("rows", nargs="*", default=["decisions", "weights", "caps", "latency"])
    arguments = parser.parse_args()
    for row in arguments.rows:
        if row == "decisions":
            decisions()
        elif row == "weights":
            weights(arguments.engine, arguments.seconds)
        elif row == "caps":
            caps(arguments.engine, arguments.seconds)
        elif row == "latency":
            latency(arguments.engine)
        else:
            parser.error(f"there is no row {row}")


if __name__ == "__main__":
    main()
