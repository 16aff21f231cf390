"""The systems that are compared, each of which boots the same initramfs in its own way.

A system is optional: `prepare` finds its parts and raises Absent with the reason when it cannot run here.
"""

from __future__ import annotations

from bench.systems.base import Absent, Boot, Form, System
from bench.systems.native import Native
from bench.systems.qemu import QemuTcg
from bench.systems.uml import UserModeLinux
from bench.systems.xen_in_qemu import XenInQemu
from bench.systems.xenolith import Xenolith

SYSTEMS: tuple[System, ...] = (
    Native(),
    Xenolith("kvm"),
    Xenolith("unicorn"),
    Xenolith("unicorn", stubs=True),
    Xenolith("adaptive"),
    QemuTcg(),
    UserModeLinux(),
    XenInQemu(),
)

BY_NAME = {system.name: system for system in SYSTEMS}

__all__ = ["BY_NAME", "SYSTEMS", "Absent", "Boot", "Form", "System"]
