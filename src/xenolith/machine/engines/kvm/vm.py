"""One domain's virtual machine: its memory, its local timers, and what CPUID says in it.

The machine's memory object is the virtual machine's only memory, at guest-physical address 0: guest-physical
addresses are machine addresses, and the guest's page tables are the ones that the processor (or KVM) walks.
"""

from __future__ import annotations

import functools
import os
from struct import pack_into, unpack_from
from typing import Final

from xenolith.abi.x86 import CPUID_NULL_SELECTOR_CLEARS_BASE
from xenolith.machine.cpuid import native_cpuid, xsave_size
from xenolith.machine.engines.kvm import api
from xenolith.machine.engines.kvm.api import ioctl
from xenolith.machine.engines.kvm.traits import HostTraits
from xenolith.machine.engines.protocol import EngineError
from xenolith.machine.memory import MachineMemory

_CPUID_ENTRIES: Final = 256
_RESERVED: Final = 0xFEFF_C000
CpuidTable = dict[tuple[int, int], tuple[int, int, int, int]]  # (leaf, subleaf) -> eax, ebx, ecx, edx


class VirtualMachine:
    """Raises EngineError, with the reason, where KVM cannot make one. `wants_ticks`: give vCPUs local timers."""

    def __init__(self, memory: MachineMemory, traits: HostTraits, wants_ticks: bool) -> None:
        self.memory = memory
        self.traits = traits
        self.xcr0_mask = traits.xcr0
        self.cpuid: CpuidTable | None = None  # what CPUID shall tell; None: what KVM supports
        self._device = api.open_device()
        self._vm = -1
        try:
            self._open()
            self.has_ticks = wants_ticks and self._has_local_timers()
        except (OSError, EngineError) as error:
            self.close()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"/dev/kvm cannot make a virtual machine: {error.strerror}") from error

    def _open(self) -> None:
        if not ioctl(self._device, api.KVM_CHECK_EXTENSION, api.KVM_CAP_SYNC_REGS) & api.KVM_SYNC_X86_EVENTS:
            raise EngineError("this kernel's KVM cannot share registers (KVM_CAP_SYNC_REGS); Linux 4.16 or newer can")
        self.run_size = ioctl(self._device, api.KVM_GET_VCPU_MMAP_SIZE)
        self._vm = ioctl(self._device, api.KVM_CREATE_VM)
        size = self.memory.size
        # Room that Intel processors without "unrestricted guest" want; beyond the machine's memory, below 4 GiB.
        if size <= _RESERVED:
            ioctl(self._vm, api.KVM_SET_IDENTITY_MAP_ADDR, bytearray(_RESERVED.to_bytes(8, "little")))
            ioctl(self._vm, api.KVM_SET_TSS_ADDR, _RESERVED + 0x1000)
        ioctl(
            self._vm,
            api.KVM_SET_USER_MEMORY_REGION,
            bytearray(api.MEMORY_REGION.pack(0, 0, 0, size, self.memory.address)),
        )

    def _has_local_timers(self) -> bool:
        """Give every vCPU to come a local APIC, if KVM can do that without other interrupt controllers."""
        request = api.ENABLE_CAP.pack(api.KVM_CAP_SPLIT_IRQCHIP, 0, api.IRQCHIP_ROUTES)
        try:
            ioctl(self._vm, api.KVM_ENABLE_CAP, bytearray(request))
        except OSError:
            return False
        return True

    def create_vcpu(self, number: int) -> int:
        """A descriptor of a new virtual processor. Raises OSError."""
        return ioctl(self._vm, api.KVM_CREATE_VCPU, number)

    # --- what the processor is --------------------------------------------------------------------------

    @functools.cached_property
    def xsave_size(self) -> int:
        """Bytes of an XSAVE image in the standard format with every component of this host."""
        return xsave_size(self.xcr0_mask, self.host_cpuid)

    @functools.cached_property
    def supported_cpuid(self) -> CpuidTable:
        """What KVM says it can offer."""
        table = bytearray(api.CPUID_HEADER.size + _CPUID_ENTRIES * api.CPUID_ENTRY.size)
        pack_into("<I", table, 0, _CPUID_ENTRIES)
        ioctl(self._device, api.KVM_GET_SUPPORTED_CPUID, table)
        entries: CpuidTable = {}
        for number in range(unpack_from("<I", table)[0]):
            offset = api.CPUID_HEADER.size + number * api.CPUID_ENTRY.size
            leaf, subleaf, flags, *registers = api.CPUID_ENTRY.unpack_from(table, offset)
            entries[leaf, subleaf if flags & api.CPUID_FLAG_SIGNIFICANT_INDEX else 0] = tuple(registers)
        return entries

    @functools.cached_property
    def kvm_xsave(self) -> bool:
        """Whether KVM lets a guest turn XSAVE on."""
        return bool(self.supported_cpuid.get((1, 0), (0, 0, 0, 0))[2] >> 26 & 1)

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """See protocol.Engine."""
        if self.traits.cpuid_is_native:
            answer = native_cpuid(leaf, subleaf)
        else:
            table = self.supported_cpuid
            answer = table.get((leaf, subleaf)) or (table.get((leaf, 0)) if leaf != 0xD else None) or (0, 0, 0, 0)
        if leaf == 0x8000_0021 and self.traits.null_clears_base:
            # Hosts that are virtual themselves often hide it; a guest would make two hypercalls more at each switch.
            return answer[0] | CPUID_NULL_SELECTOR_CLEARS_BASE, *answer[1:]
        return answer

    def cpuid_table(self) -> bytearray:
        """The table for KVM_SET_CPUID2."""
        entries = self.cpuid if self.cpuid is not None else self.supported_cpuid
        with_subleaves = {leaf for leaf, subleaf in entries if subleaf}
        data = api.CPUID_HEADER.pack(len(entries), 0)
        for (leaf, subleaf), registers in entries.items():
            flags = api.CPUID_FLAG_SIGNIFICANT_INDEX if leaf in with_subleaves else 0
            data += api.CPUID_ENTRY.pack(leaf, subleaf, flags, *registers)
        return bytearray(data)

    def close(self) -> None:
        for fd in (self._vm, self._device):
            if fd >= 0:
                os.close(fd)
        self._vm = self._device = -1
