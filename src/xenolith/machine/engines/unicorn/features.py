"""What guest code can execute on Unicorn, as CPUID tells it (Intel SDM vol. 2, CPUID; observed by running each).

The model that QEMU emulates promises instructions that its translator lacks; those are taken out here.  So are the fast
string operations: a REP MOVSB moves 9 MB/s, and software that sees ERMS or FSRM would copy everything with it.
"""

from __future__ import annotations

from typing import Final

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

XSAVE_LEAF: Final = 0xD
XSAVE_ANSWERS: Final = {0: (3, 576, 576, 0), 1: (1, 0, 0, 0)}  # x87 and SSE; XSAVEOPT
POWER_LEAF: Final = 0x8000_0007
INVARIANT_TSC: Final = 1 << 8


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
