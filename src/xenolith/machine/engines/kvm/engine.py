"""The KVM engine: one virtual machine per domain, one virtual processor per vCPU.

The machine's memory object is the virtual machine's only memory, at guest-physical address 0: guest-physical
addresses are machine addresses, and the guest's page tables are the ones that the processor (or KVM) walks.

Stale translations.  Where KVM itself keeps shadow page tables, it follows a guest's stores to its tables, but not
Python's, which arrive through another mapping.  An entry that was present and changes stays as it was in the shadow,
for ever.  So the hypervisor reports such changes (`entry_changed`), and a TLB flush stores the same values once
more from guest context, by the entry stubs (see area.EntryStubs).  Entries that were not present
are looked up afresh and need nothing.
"""

from __future__ import annotations

import functools
import os
from struct import pack_into, unpack_from
from typing import Final

from xenolith.abi.x86 import PTE_A, PTE_D
from xenolith.machine.cpuid import native_cpuid
from xenolith.machine.engines.kvm import api, area
from xenolith.machine.engines.kvm.api import ioctl
from xenolith.machine.engines.kvm.changes import Changes
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.fast_path import gate_pages
from xenolith.machine.engines.kvm.traits import HostTraits
from xenolith.machine.engines.protocol import Engine, EngineError
from xenolith.machine.memory import MachineMemory

_CPUID_ENTRIES: Final = 256
NULL_SELECTOR_CLEARS_BASE: Final = 1 << 6  # CPUID 80000021.eax
CpuidTable = dict[tuple[int, int], tuple[int, int, int, int]]  # (leaf, subleaf) -> eax, ebx, ecx, edx


class KvmEngine(Engine):
    """A domain's virtual machine.

    `traits`: how this host's KVM behaves; found out once where not given.  `fast_path`: use it where the host allows
    (see fast_path); the environment variable XENOLITH_FAST_PATH=off turns it off, for comparison.
    """

    name = "kvm"
    cpus_shared = False

    def __init__(self, memory: MachineMemory, traits: HostTraits | None = None, fast_path: bool | None = None) -> None:
        if fast_path is None:
            fast_path = os.environ.get("XENOLITH_FAST_PATH") != "off"
        if traits is None:
            from xenolith.machine.engines.kvm.host import host_traits

            traits = host_traits()
        self.memory = memory
        self.traits = traits
        self.xcr0_mask = traits.xcr0
        # A shadow does; and a processor that walks the guest's tables has paging-structure caches (SDM vol. 3, 4.10.3).
        self.caches_tables = True
        self.changes = Changes(memory.frames)
        self.cpus: dict[int, KvmCpu] = {}
        self._cpuid: CpuidTable | None = None
        self._device = api.open_device()
        self._vm = -1
        try:
            self._open_vm()
            self.has_ticks = traits.ticks and fast_path and self._has_local_timers()
        except OSError as error:
            self.close()
            raise EngineError(f"/dev/kvm cannot make a virtual machine: {error.strerror}") from error
        gates = gate_pages() if traits.has_fast_path and fast_path else None
        self.area = area.HypervisorArea(memory, alias=traits.shadows_page_tables, gates=gates)
        self.l4_entries = {area.SLOT: self.area.l4_entry}
        if gates:
            self.kernel_l4_entries = {area.SLOT: self.area.kernel_l4_entry}

    def _open_vm(self) -> None:
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

    # --- what the processor is --------------------------------------------------------------------------

    @functools.cached_property
    def xsave_size(self) -> int:
        """Bytes of an XSAVE image in the standard format with every component of this host."""
        size = 576
        for component in range(2, 63):
            if self.xcr0_mask >> component & 1:
                length, offset, _, _ = self.host_cpuid(0xD, component)
                size = max(size, offset + length)
        return size

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
        if self.traits.cpuid_is_native:
            answer = native_cpuid(leaf, subleaf)
        else:
            table = self.supported_cpuid
            answer = table.get((leaf, subleaf)) or (table.get((leaf, 0)) if leaf != 0xD else None) or (0, 0, 0, 0)
        if leaf == 0x8000_0021 and self.traits.null_clears_base:
            # Hosts that are virtual themselves often hide it; a guest would make two hypercalls more at each switch.
            return answer[0] | NULL_SELECTOR_CLEARS_BASE, *answer[1:]
        return answer

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID shall tell guest code, where the host can decide that (`traits.cpuid_is_native` is False).

        Call it before any vCPU has run: KVM takes it only then.
        """
        if self.cpus:
            raise EngineError("the CPUID table of a domain is fixed once it has a vCPU")
        self._cpuid = table

    def cpuid_table(self) -> bytearray:
        """The table for KVM_SET_CPUID2."""
        entries = self._cpuid if self._cpuid is not None else self.supported_cpuid
        with_subleaves = {leaf for leaf, subleaf in entries if subleaf}
        data = api.CPUID_HEADER.pack(len(entries), 0)
        for (leaf, subleaf), registers in entries.items():
            flags = api.CPUID_FLAG_SIGNIFICANT_INDEX if leaf in with_subleaves else 0
            data += api.CPUID_ENTRY.pack(leaf, subleaf, flags, *registers)
        return bytearray(data)

    # --- running ------------------------------------------------------------------------------------------

    def cpu(self, vcpu_id: int, regs: memoryview | None = None) -> KvmCpu:
        """The Cpu of this vCPU, made at the first call; it keeps its register file in `regs` if given then."""
        cpu = self.cpus.get(vcpu_id)
        if cpu is None:
            if vcpu_id >= area.MAX_CPUS:
                raise EngineError(f"the KVM engine has room for {area.MAX_CPUS} vCPUs")
            try:
                cpu = self.cpus[vcpu_id] = KvmCpu(self, vcpu_id, self._vm, regs)
            except OSError as error:
                raise EngineError(f"KVM cannot make virtual processor {vcpu_id}: {error.strerror}") from error
        return cpu

    def entry_changed(self, index: int, old: int, new: int) -> None:
        """Ring 0 changed a page-table entry that was present; `index` counts 64-bit words of machine memory.

        It may stay in force until the next flush, as on any processor.  Entry 0 stands for its whole table: report
        it when a frame stops being a page table.
        """
        if self.traits.shadows_page_tables:
            self.changes.note(index, old, new)

    def has_view(self, l4_mfn: int, view: int) -> bool:
        """Whether this L4 table maps the area in the view of the guest's user (0) or kernel (1)."""
        entry = self.area.kernel_l4_entry if view else self.area.l4_entry
        return not (int(self.memory.q[l4_mfn << 9 | area.SLOT]) ^ entry) & ~(PTE_A | PTE_D)

    def close(self) -> None:
        for cpu in self.cpus.values():
            cpu.close()
        self.cpus.clear()
        for fd in (self._vm, self._device):
            if fd >= 0:
                os.close(fd)
        self._vm = self._device = -1
        if hasattr(self, "area"):
            self.area.release()
            del self.area


_RESERVED: Final = 0xFEFF_C000
