"""The KVM engine: one virtual machine per domain, one virtual processor per vCPU.

Stale translations.  Where KVM itself keeps shadow page tables, it follows a guest's stores to its tables, but not
Python's, which arrive through another mapping.  An entry that was present and changes stays as it was in the shadow,
for ever.  So the hypervisor reports such changes (`entry_changed`), and a TLB flush stores the same values once
more from guest context, by the entry stubs (see area.EntryStubs).  Entries that were not present
are looked up afresh and need nothing.
"""

from __future__ import annotations

import os

from xenolith.machine.engines.kvm import area
from xenolith.machine.engines.kvm.changes import Changes
from xenolith.machine.engines.kvm.cpu import KvmCpu
from xenolith.machine.engines.kvm.fast_path_code import gate_pages
from xenolith.machine.engines.kvm.traits import HostTraits
from xenolith.machine.engines.kvm.vm import CpuidTable, VirtualMachine
from xenolith.machine.engines.protocol import Engine, EngineError
from xenolith.machine.memory import MachineMemory


class KvmEngine(Engine):
    """A domain's virtual machine.

    `traits`: how this host's KVM behaves (host.host_traits).  `fast_path`: use it where the host allows
    (see fast_path); the environment variable XENOLITH_FAST_PATH=off turns it off, for comparison.
    """

    name = "kvm"
    cpus_shared = False

    def __init__(self, memory: MachineMemory, traits: HostTraits, fast_path: bool | None = None) -> None:
        if fast_path is None:
            fast_path = os.environ.get("XENOLITH_FAST_PATH") != "off"
        self.memory = memory
        self.traits = traits
        self.xcr0_mask = traits.xcr0
        # A shadow does; and a processor that walks the guest's tables has paging-structure caches (SDM vol. 3, 4.10.3).
        self.caches_tables = True
        self.changes = Changes(memory.span)
        self.cpus: dict[int, KvmCpu] = {}
        self._vm = VirtualMachine(memory, traits, traits.ticks and fast_path)
        self.has_ticks = self._vm.has_ticks
        gates = gate_pages() if traits.has_fast_path and fast_path else None
        self.area = area.HypervisorArea(memory, traits.shadows_page_tables, traits.syscall_cpl, gates)
        self.l4_entries = {area.SLOT: self.area.l4_entry}
        if gates:
            self.kernel_l4_entries = {area.SLOT: self.area.kernel_l4_entry}

    def cpu(self, vcpu_id: int, regs: memoryview | None = None) -> KvmCpu:
        """The Cpu of this vCPU, made at the first call; it keeps its register file in `regs` if given then."""
        cpu = self.cpus.get(vcpu_id)
        if cpu is None:
            if vcpu_id >= area.MAX_CPUS:
                raise EngineError(f"the KVM engine has room for {area.MAX_CPUS} vCPUs")
            try:
                cpu = self.cpus[vcpu_id] = KvmCpu(self._vm, self.area, self.changes, vcpu_id, regs)
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

    # --- what the processor is --------------------------------------------------------------------------

    @property
    def xsave_size(self) -> int:
        """Bytes of an XSAVE image in the standard format with every component of this host."""
        return self._vm.xsave_size

    @property
    def supported_cpuid(self) -> CpuidTable:
        """What KVM says it can offer."""
        return self._vm.supported_cpuid

    def host_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self._vm.host_cpuid(leaf, subleaf)

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID shall tell guest code, where the host can decide that (`traits.cpuid_is_native` is False).

        Call it before any vCPU has run: KVM takes it only then.
        """
        if self.cpus:
            raise EngineError("the CPUID table of a domain is fixed once it has a vCPU")
        self._vm.cpuid = table

    def close(self) -> None:
        for cpu in self.cpus.values():
            cpu.close()
        self.cpus.clear()
        self._vm.close()
        if hasattr(self, "area"):
            self.area.release()
            del self.area
