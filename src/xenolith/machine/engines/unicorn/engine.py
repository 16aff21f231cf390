"""The Unicorn engine: QEMU's code translator, inside this process, as the domain's processor.

It needs no privileges and no hardware virtualisation.  One instance serves all vCPUs of a domain, one at a time,
because its LOCK prefix is not atomic between instances.  See docs/engine-unicorn.md.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Final

from xenolith.abi.x86 import XSTATE_SSE, XSTATE_X87
from xenolith.machine import tsc
from xenolith.machine.engines.protocol import Engine
from xenolith.machine.engines.unicorn import features, library
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.engines.unicorn.instance import Instance
from xenolith.machine.engines.unicorn.user import host
from xenolith.machine.engines.unicorn.user.cpu import NativeUserCpu
from xenolith.machine.engines.unicorn.verify import verify
from xenolith.machine.memory import MachineMemory

# Family 5, model 9. What a kernel reads from the family alone: that `rep movs` and `rep stos` are no faster than a loop
# (in TCG every repetition costs a block) and that nothing is executed speculatively (so no retpolines, which TCG cannot
# predict). Both are true here, and on family 6 Linux would assume neither. Features come from their own bits.
SIGNATURE: Final = 0x590
_log = logging.getLogger(__name__)


class UnicornEngine(Engine):
    """A domain's engine on Unicorn. Raises EngineError when the installed Unicorn is not the one it knows."""

    name = "unicorn"
    cpus_shared = True

    def __init__(self, memory: MachineMemory, native_user: str = host.OFF) -> None:
        """`native_user`: whether guests' user mode may run in stub processes, see user/host.py."""
        lib = library.load()
        verify(lib)
        self._instance = Instance(lib, memory)
        self._user: NativeUserCpu | None = None
        if native_user != host.OFF and not memory.private and self._stubs_work(native_user):
            self._user = NativeUserCpu(self._instance, memory, native_user == host.FORCE)
            self.entry_changed = self._user.spaces.entry_changed
        self._cpu: UnicornCpu = self._user or UnicornCpu(self._instance, memory)
        self.l4_entries: dict[int, int] = {}
        self.executable_mapped = self._cpu.executable_mapped
        self.code_frames = self._instance.code_frames

    @staticmethod
    def _stubs_work(native_user: str) -> bool:
        reason = host.missing()
        if reason is not None:
            _log.warning("%s=%s, but programs run on Unicorn: %s", host.SETTING, native_user, reason)
        return reason is None

    @property
    def xcr0_mask(self) -> int:  # type: ignore[override]
        return host.components() if self._user is not None else XSTATE_X87 | XSTATE_SSE

    def cpu(self, vcpu_id: int) -> UnicornCpu:
        """The one Cpu of all vCPUs. With a second vCPU, user mode runs on Unicorn."""
        if vcpu_id and self._user is not None:
            self._user.become_plain()
            self._user = None
        return self._cpu

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """What CPUID tells of instructions that guest code can really execute: eax, ebx, ecx, edx."""
        words = [ctypes.c_uint32() for _ in range(4)]
        self._instance.lib.cpuid(self._instance.env, leaf, subleaf, *map(ctypes.byref, words))
        eax, ebx, ecx, edx = (word.value for word in words)
        answer = features.told(leaf, subleaf, (eax, ebx, ecx, edx), tsc.is_stable())
        return answer if self._user is None else features.with_components(leaf, subleaf, answer, self.xcr0_mask)

    def close(self) -> None:
        """Release everything. No Cpu may be running."""
        self._cpu.close()
