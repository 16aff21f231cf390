"""The Unicorn engine: QEMU's code translator, inside this process, as the domain's processor.

It needs no privileges and no hardware virtualisation.  One instance serves all vCPUs of a domain, one at a time,
because its LOCK prefix is not atomic between instances.  See docs/engine-unicorn.md.
"""

from __future__ import annotations

import ctypes
from typing import Final

from xenolith.abi.x86 import XSTATE_SSE, XSTATE_X87
from xenolith.machine import tsc
from xenolith.machine.engines.protocol import Engine
from xenolith.machine.engines.unicorn import features, library
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.engines.unicorn.instance import Instance
from xenolith.machine.engines.unicorn.verify import verify
from xenolith.machine.memory import MachineMemory

# Family 5, model 9. What a kernel reads from the family alone: that `rep movs` and `rep stos` are no faster than a loop
# (in TCG every repetition costs a block) and that nothing is executed speculatively (so no retpolines, which TCG cannot
# predict). Both are true here, and on family 6 Linux would assume neither. Features come from their own bits.
SIGNATURE: Final = 0x590


class UnicornEngine(Engine):
    """A domain's engine on Unicorn. Raises EngineError when the installed Unicorn is not the one it knows."""

    name = "unicorn"
    cpus_shared = True
    xcr0_mask = XSTATE_X87 | XSTATE_SSE

    def __init__(self, memory: MachineMemory) -> None:
        lib = library.load()
        verify(lib)
        self._instance = Instance(lib, memory)
        self._cpu = UnicornCpu(self._instance, memory)
        self.l4_entries: dict[int, int] = {}
        self.executable_mapped = self._cpu.executable_mapped

    def cpu(self, vcpu_id: int) -> UnicornCpu:
        """The one Cpu of all vCPUs."""
        return self._cpu

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """What CPUID tells of instructions that guest code can really execute: eax, ebx, ecx, edx."""
        words = [ctypes.c_uint32() for _ in range(4)]
        self._instance.lib.cpuid(self._instance.env, leaf, subleaf, *map(ctypes.byref, words))
        eax, ebx, ecx, edx = (word.value for word in words)
        return features.told(leaf, subleaf, (eax, ebx, ecx, edx), tsc.is_stable())

    def close(self) -> None:
        """Release everything. No Cpu may be running."""
        self._cpu.close()
