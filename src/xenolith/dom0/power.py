"""Switching a machine on: machine memory, an engine, the hypervisor on them, and dom0 as its first domain."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Final

from xenolith.abi.x86 import PAGE_SHIFT
from xenolith.dom0.services import Dom0
from xenolith.hypervisor.hypervisor import DEFAULT_POLICY, Hypervisor, MakePolicy
from xenolith.machine.engines.select import choose
from xenolith.machine.memory import MemoryBudget

SWITCH_SECONDS: Final = 0.0005  # how long a trap may wait for another thread's Python; Python's own default is 5 ms
XEN_MIB: Final = 16  # Xen's own frames: descriptor windows, shared_info, what the engines map
XEN_SHARE: Final = 128  # and one part in this many: the machine-to-physical table, with its alignment


def power_on(
    domains_mib: Iterable[int],
    engine: str = "auto",
    pcpus: int = 2,
    policy: MakePolicy | None = None,
    host_cpus: Sequence[int] = (),
) -> Dom0:
    """A machine with memory for domains of these sizes, and room for Xen itself.

    `policy`: a scheduling algorithm of your own; `host_cpus`: what each pCPU is pinned to, if they are.  Host memory is
    used only as guests touch theirs.  Raises EngineError when the engine cannot run here.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    mib = sum(domains_mib)
    memory = MemoryBudget(mib + mib // XEN_SHARE + XEN_MIB << 20 - PAGE_SHIFT)
    chosen = choose(engine)
    return Dom0(Hypervisor(memory, chosen.factory, None, pcpus, policy or DEFAULT_POLICY, host_cpus), chosen.name)
