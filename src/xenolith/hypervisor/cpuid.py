"""The CPUID policy: what processor a guest sees, as data (Xen: arch/x86/cpuid.c, arch-x86/cpuid.h).

A guest sees what the engine can execute, less what a paravirtual guest has no use for or Xen keeps to
itself, plus Xen's own leaves at 0x40000000.  On top of that a domain has changes of its own (xl.cfg: cpuid), which give
it no feature that guests cannot have here.

FSGSBASE guests can have but get only when they are given it: a Linux that knows of it reads and writes
MSR_KERNEL_GS_BASE at each switch of programs, two traps in the place of at most one hypercall.
"""

from __future__ import annotations

from struct import unpack
from typing import TYPE_CHECKING, Final

from xenolith.abi.x86 import CPUID_NULL_SELECTOR_CLEARS_BASE, MASK32
from xenolith.machine.cpuid import xsave_size

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import CpuidChange, Vcpu

XEN_LEAVES: Final = 0x4000_0000
LAST_SIMPLE: Final = 3  # of the leaves whose answer does not depend on ECX, where programs leave anything, ...
LAST_SIMPLE_EXTENDED: Final = 0x8000_0008  # ... and of those from 0x80000000 on
XEN_VERSION: Final = 4 << 16 | 17

# Feature bits by leaf and register that no guest sees.
# 1.edx: VME(1) PSE(3) MCE(7) APIC(9) MTRR(12) PGE(13) MCA(14) PSE36(17) DS(21) ACPI(22) TM(29) PBE(31)
HIDDEN_1_EDX: Final = sum(1 << bit for bit in (1, 3, 7, 9, 12, 13, 14, 17, 21, 22, 29, 31))
# 1.ecx: DTES64(2) MONITOR(3) DSCPL(4) VMX(5) SMX(6) EIST(7) TM2(8) xTPR(14) PDCM(15) PCID(17) DCA(18)
# x2APIC(21) TSC_DEADLINE(24)
HIDDEN_1_ECX: Final = sum(1 << bit for bit in (2, 3, 4, 5, 6, 7, 8, 14, 15, 17, 18, 21, 24))
OSXSAVE: Final = 1 << 27
XSAVE: Final = 1 << 26
HYPERVISOR: Final = 1 << 31
FSGSBASE: Final = 1 << 0
# 7.ebx: FSGSBASE(0) TSC_ADJUST(1) SGX(2) SMEP(7) INVPCID(10) PQM(12) MPX(14) PQE(15) SMAP(20) PT(25)
HIDDEN_7_EBX: Final = sum(1 << bit for bit in (0, 1, 2, 7, 10, 12, 14, 15, 20, 25))
# 7.ecx: UMIP(2) PKU(3) OSPKE(4) WAITPKG(5) CET_SS(7) LA57(16) RDPID(22) BUS_LOCK(24) ENQCMD(29) SGX_LC(30) PKS(31)
HIDDEN_7_ECX: Final = sum(1 << bit for bit in (2, 3, 4, 5, 7, 16, 22, 24, 29, 30, 31))
# 7.edx: UINTR(5) MD_CLEAR(10) RTM_ALWAYS_ABORT(11) HYBRID(15) PCONFIG(18) ARCH_LBR(19) CET_IBT(20) AMX(22,24,25),
# speculation control (26..31)
HIDDEN_7_EDX: Final = sum(1 << bit for bit in (5, 10, 11, 15, 18, 19, 20, 22, 24, 25, 26, 27, 28, 29, 30, 31))
# 80000001.edx repeats 1.edx on AMD; PAGE1GB(26) RDTSCP(27)
HIDDEN_80000001_EDX: Final = HIDDEN_1_EDX & 0x0183_F3FF | 1 << 26 | 1 << 27
# 80000001.ecx: SVM(2) EXTAPIC(3) OSVW(9) IBS(10) SKINIT(12) WDT(13) LWP(15) NODEID(19) TOPOEXT(22)
# PERFCTR(23,24,28) MONITORX(29)
HIDDEN_80000001_ECX: Final = sum(1 << bit for bit in (2, 3, 9, 10, 12, 13, 15, 19, 22, 23, 24, 28, 29))
XSAVE_FEATURES: Final = 0b0111  # D.1.eax: XSAVEOPT, XSAVEC, XGETBV1; XSAVES is for ring 0 only


# What needs AVX: 1.ecx: FMA(12) AVX(28) F16C(29); 7.ebx: AVX2, AVX512*; 7.ecx: AVX512*, VAES, VPCLMULQDQ; 7.edx: AVX512
AVX: Final = 1 << 28
NEEDS_AVX_1_ECX: Final = sum(1 << bit for bit in (12, 28, 29))
NEEDS_AVX_7: Final = (
    0,
    sum(1 << bit for bit in (5, 16, 17, 21, 26, 27, 28, 30, 31)),
    sum(1 << bit for bit in (1, 6, 9, 10, 11, 12, 14)),
    sum(1 << bit for bit in (2, 3, 8, 23)),
)
WITH_SUBLEAVES: Final = (4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18)
# Registers (leaf, number) that tell of no features, and may say anything: names, versions, sizes
DESCRIPTIONS: Final = frozenset(
    [(leaf, register) for leaf in (0, 2, 4, *range(0x8000_0002, 0x8000_0007)) for register in range(4)]
    + [(1, 0), (1, 1), (0x8000_0000, 0), (0x8000_0001, 0), (0x8000_0001, 1), (0x8000_0008, 0), (0x8000_0008, 2)]
    + [(XEN_LEAVES, 0)]
)


def asked(leaf: int, ecx: int) -> tuple[int, int]:
    """Leaf and subleaf of a question."""
    simple = leaf <= LAST_SIMPLE or 0x8000_0000 <= leaf <= LAST_SIMPLE_EXTENDED
    return leaf, 0 if simple else ecx


def answer(vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """eax, ebx, ecx, edx for a guest's CPUID."""
    found = _by_default(vcpu, leaf, subleaf)
    if not vcpu.domain.cpuid_changes:
        return found
    registers = list(found)
    for change in vcpu.domain.cpuid_changes:
        if _concerns(change, leaf, subleaf):
            registers[change.register] = _changed(vcpu, leaf, subleaf, registers[change.register], change)
    if leaf == 1:
        if not registers[2] & XSAVE:
            registers[2] &= ~(OSXSAVE | NEEDS_AVX_1_ECX)
        elif not registers[2] & AVX:
            registers[2] &= ~NEEDS_AVX_1_ECX
    elif leaf in (7, 0xD):
        features = answer(vcpu, 1, 0)[2]
        if leaf == 7 and not features & AVX:
            registers = [word & ~lost for word, lost in zip(registers, NEEDS_AVX_7, strict=True)]
        if leaf == 0xD and not features & XSAVE:
            registers = [0, 0, 0, 0]
    eax, ebx, ecx, edx = registers
    return eax, ebx, ecx, edx


def _concerns(change: CpuidChange, leaf: int, subleaf: int) -> bool:
    if leaf != change.leaf:
        return False
    return subleaf == (change.subleaf or 0) if leaf in WITH_SUBLEAVES else not change.subleaf


def _changed(vcpu: Vcpu, leaf: int, subleaf: int, word: int, change: CpuidChange) -> int:
    engine = vcpu.domain.engine
    hosts = engine.host_cpuid(leaf, subleaf)[change.register] if engine is not None else 0
    wanted = change.ones | change.hosts & hosts
    if (leaf, change.register) not in DESCRIPTIONS:
        possible = word
        if (leaf, subleaf, change.register) == (7, 0, 1):
            possible |= hosts & FSGSBASE
        wanted &= possible
    return word & ~(change.zeros | change.hosts) | wanted


def has_fsgsbase(vcpu: Vcpu) -> bool:
    """Whether the guest was told of FSGSBASE, which it may enable then."""
    return bool(answer(vcpu, 7, 0)[1] & FSGSBASE)


def _by_default(vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    if XEN_LEAVES <= leaf < XEN_LEAVES + 0x100:
        return _xen_leaf(vcpu, leaf - XEN_LEAVES, subleaf)
    engine = vcpu.domain.engine
    if engine is None:
        return 0, 0, 0, 0
    highest = engine.host_cpuid(leaf & 0x8000_0000, 0)[0]
    if leaf & 0x7FFF_FFFF > max(highest & 0x7FFF_FFFF, 0x16 if not leaf & 0x8000_0000 else 0):
        return 0, 0, 0, 0
    eax, ebx, ecx, edx = engine.host_cpuid(leaf, subleaf)
    if leaf == 0:
        return max(eax, 0x16), ebx, ecx, edx
    if leaf == 1:
        ebx = ebx & 0x0000_FFFF | vcpu.vcpu_id * 2 << 24 | 1 << 16
        ecx = ecx & ~HIDDEN_1_ECX | HYPERVISOR
        ecx = ecx | OSXSAVE if ecx & XSAVE else ecx & ~OSXSAVE
        return eax, ebx, ecx, edx & ~HIDDEN_1_EDX & ~(1 << 28)
    if leaf == 4:
        return eax & 0x3FFF, ebx, ecx, edx
    if leaf in (5, 6, 8, 9, 0xA, 0xB, 0xF, 0x10, 0x12, 0x14, 0x15, 0x17, 0x18, 0x19, 0x1A, 0x1B, 0x1F):
        return 0, 0, 0, 0
    if leaf == 7:
        if subleaf:
            return 0, 0, 0, 0
        return 0, ebx & ~HIDDEN_7_EBX, ecx & ~HIDDEN_7_ECX, edx & ~HIDDEN_7_EDX
    if leaf == 0xD:
        return _xsave_leaf(vcpu, subleaf, (eax, ebx, ecx, edx))
    if leaf == 0x16:
        mhz = vcpu.domain.hypervisor.tsc_hz // 1_000_000
        return mhz, mhz, 100, 0
    if leaf == 0x8000_0001:
        return eax, ebx, ecx & ~HIDDEN_80000001_ECX, edx & ~HIDDEN_80000001_EDX
    if leaf == 0x8000_0007:
        return 0, 0, 0, edx & 1 << 8  # invariant TSC
    if leaf == 0x8000_0008:
        return eax & 0xFFFF, 0, 0, 0
    if leaf == 0x8000_0021:
        return eax & CPUID_NULL_SELECTOR_CLEARS_BASE, 0, 0, 0
    if leaf in (0x8000_000A, 0x8000_001D, 0x8000_001E, 0x8000_001F, 0x8000_0020):
        return 0, 0, 0, 0
    return eax, ebx, ecx, edx


def _xsave_leaf(vcpu: Vcpu, subleaf: int, host: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    engine = vcpu.domain.engine
    assert engine is not None
    mask = engine.xcr0_mask
    if subleaf == 0:
        return mask & MASK32, _xsave_size(vcpu, vcpu.state.xcr0), _xsave_size(vcpu, mask), mask >> 32
    if subleaf == 1:
        return host[0] & XSAVE_FEATURES, _xsave_size(vcpu, vcpu.state.xcr0) if host[0] & 2 else 0, 0, 0
    return host if subleaf < 63 and mask >> subleaf & 1 else (0, 0, 0, 0)


def _xsave_size(vcpu: Vcpu, mask: int) -> int:
    """Bytes of a standard-format XSAVE image with these components (SDM vol. 1, 13.4)."""
    engine = vcpu.domain.engine
    assert engine is not None
    return xsave_size(mask, engine.host_cpuid)


def _xen_leaf(vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """Xen's own leaves (public/arch-x86/cpuid.h)."""
    domain = vcpu.domain
    if leaf == 0:
        ebx, ecx, edx = unpack("<III", b"XenVMMXenVMM")
        return XEN_LEAVES + 5, ebx, ecx, edx
    if leaf == 1:
        return XEN_VERSION, 0, 0, 0
    if leaf == 2:
        return 1, 0x4000_0000, 0, 0  # one hypercall page, its MSR, PV features: none
    if leaf == 3:  # time
        hz = domain.hypervisor.tsc_hz
        if subleaf == 0:
            # bit 2: the TSC is the host's own and safe to use; TSC mode 2: never emulated
            return 1 << 2, 2, hz // 1000, 0
        if subleaf == 2:
            return hz // 1000, 0, 0, 0
        return 0, 0, 0, 0
    if leaf == 5:
        return 0, max(domain.memory.span - 1, 1).bit_length() + 12, 0, 0
    return 0, 0, 0, 0
