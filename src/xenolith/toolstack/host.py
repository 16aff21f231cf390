"""The machine underneath: which engines it offers, and switching one on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from xenolith.hypervisor.sched.algorithms import ALGORITHMS, DEFAULT
from xenolith.machine.engines.select import ENGINES as ENGINES

if TYPE_CHECKING:
    from xenolith.dom0.services import Dom0

SCHEDULERS: Final = tuple(ALGORITHMS)
DEFAULT_SCHEDULER: Final = DEFAULT
_FRAMES: Final = 1024  # of a machine to try an engine on


def survey() -> Iterator[tuple[str, str]]:
    """(name, what is to be said) of each engine, of native code, of stub processes, and of what `auto` takes."""
    from xenolith.machine.engines.select import choose

    logging.getLogger("xenolith").setLevel(logging.ERROR)  # the reasons are told here
    for name in ENGINES:
        if name != "auto":
            yield name, _found(name)
    yield "native", _native()
    yield "stubs", _stubs()
    choice = choose()
    yield "auto", f"{choice.name}: {choice.reason}"


def _native() -> str:
    """Whether the commonest traps are handled in native code, or what that lacks."""
    from xenolith.hypervisor import ring0

    reason = ring0.missing()
    return f"traps are Python's: {reason.splitlines()[0]}" if reason else "the commonest traps are handled in C"


def _stubs() -> str:
    """Whether programs can run natively without KVM, and whether they do."""
    from xenolith.machine.engines.protocol import EngineError
    from xenolith.machine.engines.unicorn.user import host

    if reason := host.missing():
        return f"programs cannot run natively beside Unicorn: {reason}"
    try:
        setting = host.setting()
    except EngineError as error:
        return f"refused: {error}"
    if setting == host.OFF:
        return f"programs can run natively beside Unicorn: {host.SETTING}={host.ON}"
    return f"programs run natively beside Unicorn, {host.SETTING}={setting}"


def _found(name: str) -> str:
    """Whether an engine works here, and what kind it is or what it lacks."""
    from xenolith.machine.engines.protocol import EngineError
    from xenolith.machine.engines.select import choose
    from xenolith.machine.memory import MachineMemory

    memory = MachineMemory(_FRAMES)
    try:
        choice = choose(name)
        choice.factory(memory).close()
    except EngineError as error:
        return f"refused: {error}"
    finally:
        memory.close()
    return f"works: {choice.title}{choice.kind and ': '}{choice.kind}"


def power_on(
    memory_mib: int, engine: str, pcpus: int, scheduler: str = DEFAULT_SCHEDULER, host_cpus: Sequence[int] = ()
) -> Dom0:
    """A machine for domains of this size together. Raises EngineError, OSError, MemoryError and ValueError.

    `scheduler` is one of SCHEDULERS. `host_cpus`: the CPUs of the host that the pCPUs are pinned to, if they are.
    """
    from xenolith.dom0 import power

    if host_cpus and (len(host_cpus) != pcpus or not os.sched_getaffinity(0).issuperset(host_cpus)):
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ValueError(f"{pcpus} pCPUs are pinned to one CPU each of {there}, not to {','.join(map(str, host_cpus))}")
    return power.power_on([memory_mib], engine, pcpus, ALGORITHMS[scheduler], host_cpus)
