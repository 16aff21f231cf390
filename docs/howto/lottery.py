"""A scheduler of your own: lottery scheduling (Waldspurger and Weihl, OSDI 1994), and two Debian domains under it.

    .venv/bin/python docs/howto/lottery.py

A policy answers what xenolith/hypervisor/sched/policy.py asks; what it does not care about it inherits from Simple.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import ClassVar

from xenolith.debian.initramfs import Command, build_initramfs, kernel_arguments
from xenolith.debian.packages import obtain
from xenolith.dom0.image import load_image
from xenolith.dom0.power import power_on
from xenolith.dom0.services import DomainSpec
from xenolith.hypervisor.sched.policy import NO_LIMIT, Simple, Unit

QUANTUM = 10_000_000  # ns


class Lottery(Simple):
    """Whoever wins a draw goes first; `tickets` is how many of the lots a vCPU has."""

    name: ClassVar[str] = "lottery"
    parameters: ClassVar[Mapping[str, int]] = {"tickets": 100}

    def __init__(self, pcpus: int) -> None:
        self.random = Random(1994)

    def pick(self, units: Sequence[Unit], now: int) -> Unit:
        return self.random.choices(units, [unit.parameters["tickets"] for unit in units])[0]

    def quantum(self, unit: Unit, contended: bool, now: int) -> int:
        return QUANTUM if contended else NO_LIMIT

    def expired(self, unit: Unit, others: Sequence[Unit], now: int) -> bool:
        return bool(others) and self.pick([unit, *others], now) is not unit


def main(engine: str = "auto") -> None:
    """Two domains on one pCPU."""
    guest = obtain()
    image, arguments = load_image(guest.kernel), kernel_arguments(1)
    with power_on([256, 256], engine, pcpus=1, policy=Lottery) as dom0:
        for name in ("heads", "tails"):
            ramdisk = build_initramfs(guest.busybox, command=Command(["echo", f"{name} ran"], "nonce"))
            spec = DomainSpec(
                name=name, image=image, kernel="", ramdisk=ramdisk, cmdline=arguments, memory_kib=256 << 10
            )
            dom0.start(dom0.create(spec))
        for domain in list(dom0.domains.values()):
            domain.wait(300)
            print(domain.console.scrollback.decode(errors="replace"))


if __name__ == "__main__":
    main()
