"""What guest code can execute on Unicorn, as CPUID tells it (Intel SDM vol. 2, CPUID; observed by running each).

The model that QEMU emulates promises instructions that its translator lacks; those are taken out here.  So are the fast
string operations: a REP MOVSB moves 9 MB/s, and software that sees ERMS or FSRM would copy everything with it.
"""

from __future__ import annotations

from typing import Final

from xenolith.machine.cpuid import native_cpuid

EAX, EBX, ECX, EDX = range(4)


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# (leaf, register): the feature bits that may be told; registers not named here are passed on.
EXECUTED: Final = {
    # SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE OSXSAVE RDRAND hypervisor
    (1, ECX): _bits(0, 1, 9, 13, 19, 20, 22, 23, 25, 26, 27, 30, 31),
    # FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
    (1, EDX): _bits(*range(10), 11, *range(12, 18), 19, 23, 24, 25, 26),
    # FSGSBASE BMI1 BMI2 RDSEED ADX
    (7, EBX): _bits(0, 3, 8, 18, 19),
    (7, ECX): 0,
    (7, EDX): 0,
    # LAHF/SAHF LZCNT 3DNOWPREFETCH
    (0x8000_0001, ECX): _bits(0, 5, 8),
    # SYSCALL NX 1-GiB pages RDTSCP long mode
    (0x8000_0001, EDX): _bits(11, 20, 26, 27, 29),
}
# Told although the model does not promise them.
ADDED: Final = {(7, EBX): _bits(18), (0x8000_0001, ECX): _bits(8)}

# Features that CPUID on Unicorn leaves out where programs may run elsewhere, too, (leaf, register): whatever would have
# a program that starts there use wide vectors (or REP MOVSB) in every string function, and so drive the vCPU away all
# the time.
UNTOLD: Final = {
    # FMA XSAVE OSXSAVE AVX F16C
    (1, ECX): _bits(12, 26, 27, 28, 29),
    # AVX2 ERMS AVX512
    (7, EBX): _bits(5, 9, 16, 17, 21, 26, 27, 28, 30, 31),
    # AVX512_VBMI VBMI2 VAES VPCLMULQDQ VNNI BITALG VPOPCNTDQ
    (7, ECX): _bits(1, 6, 9, 10, 11, 12, 14),
    # AVX512_4VNNIW 4FMAPS FSRM VP2INTERSECT AMX AVX512_FP16
    (7, EDX): _bits(2, 3, 4, 8, 22, 23, 24, 25),
    # XOP FMA4
    (0x8000_0001, ECX): _bits(11, 16),
}

XSAVE_LEAF: Final = 0xD
XSAVE_ANSWERS: Final = {0: (3, 576, 576, 0), 1: (1, 0, 0, 0)}  # x87 and SSE; XSAVEOPT
POWER_LEAF: Final = 0x8000_0007
INVARIANT_TSC: Final = 1 << 8
AVX_COMPONENT, AVX512_COMPONENTS = 1 << 2, 7 << 5  # of XCR0
AVX, AVX512F = 1 << 28, 1 << 16  # leaf 1, ECX; leaf 7, EBX


def told(leaf: int, subleaf: int, model: tuple[int, int, int, int], stable_tsc: bool) -> tuple[int, int, int, int]:
    """CPUID's answer, from the one of QEMU's model and whether the host's time stamp counter keeps its rate."""
    if leaf == XSAVE_LEAF:
        return XSAVE_ANSWERS.get(subleaf, (0, 0, 0, 0))
    if leaf == POWER_LEAF:
        return 0, 0, 0, INVARIANT_TSC if stable_tsc else 0
    if leaf == 7 and subleaf:
        return 0, 0, 0, 0
    eax, ebx, ecx, edx = (
        (word | ADDED.get((leaf, register), 0)) & EXECUTED.get((leaf, register), 0xFFFF_FFFF)
        for register, word in enumerate(model)
    )
    return eax, ebx, ecx, edx


def with_components(leaf: int, subleaf: int, answer: tuple[int, int, int, int], xcr0: int) -> tuple[int, int, int, int]:
    """The same where guest-user mode runs natively: the host's XSAVE components, and what a kernel enables them by."""
    eax, ebx, ecx, edx = answer
    if leaf == XSAVE_LEAF:
        return native_cpuid(leaf, subleaf)
    if (leaf, subleaf) == (7, 0) and xcr0 & AVX512_COMPONENTS == AVX512_COMPONENTS:
        ebx |= AVX512F
    if leaf == 1 and xcr0 & AVX_COMPONENT:
        ecx |= AVX
    return eax, ebx, ecx, edx
