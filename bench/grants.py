"""What a grant costs a guest: map, unmap and copy of a page, in batches of 32.

    python -m bench.grants [--engine unicorn kvm adaptive] [--count N] [--rounds N]

A tiny guest (grants2.elf) grants to itself, so that nothing but ring 0 is measured. Prints a line of JSON for each
engine: the least of the rounds, in us for each operation.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import DomainSpec

GUEST = Path(__file__).resolve().parents[1] / "guests" / "prebuilt" / "grants2.elf"
COSTS = re.compile(r"^cost map (\d+) unmap (\d+) copy (\d+)$", re.MULTILINE)
DEADLINE_SECONDS = 300.0


def measure(engine: str, count: int) -> list[int]:
    """ns of a map, an unmap and a copy."""
    dom0 = power_on([32], engine)
    try:
        spec = DomainSpec(
            name="grants", image=load_image(GUEST), kernel=str(GUEST), cmdline=f"cost={count}", memory_kib=32 << 10
        )
        domain = dom0.create(spec)
        dom0.start(domain)
        domain.wait(DEADLINE_SECONDS)
        found = COSTS.search(domain.console.scrollback.decode("utf-8", "replace").replace("\r", ""))
        if found is None:
            raise SystemExit(f"{engine}: the guest measured nothing")
        return [int(each) for each in found.groups()]
    finally:
        dom0.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", default=["unicorn", "kvm", "adaptive"])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for engine in arguments.engine:
        rounds = [measure(engine, arguments.count) for _ in range(arguments.rounds)]
        least = [min(each) / 1000 for each in zip(*rounds, strict=True)]
        names = ("map_us", "unmap_us", "copy_us")
        costs = {name: round(value, 1) for name, value in zip(names, least, strict=True)}
        print(json.dumps({"engine": engine, **costs}))


if __name__ == "__main__":
    main()
