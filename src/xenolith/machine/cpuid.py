"""The processor's own CPUID instruction (Intel SDM vol. 2)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

from xenolith.abi.x86 import XSAVE_EXTENDED
from xenolith.machine.machine_code import function

_Registers = ctypes.c_uint32 * 4

_cpuid: Final = function(
    bytes.fromhex(
        "53"  # push rbx
        "49 89 d0"  # mov r8, rdx
        "89 f8"  # mov eax, edi
        "89 f1"  # mov ecx, esi
        "0f a2"  # cpuid
        "41 89 00"  # mov [r8], eax
        "41 89 58 04"  # mov [r8 + 4], ebx
        "41 89 48 08"  # mov [r8 + 8], ecx
        "41 89 50 0c"  # mov [r8 + 12], edx
        "5b c3"  # pop rbx; ret
    ),
    None,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_void_p,
)


@functools.cache
def native_cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """eax, ebx, ecx, edx as user programs of this host see them."""
    registers = _Registers()
    _cpuid(leaf, subleaf, ctypes.addressof(registers))
    eax, ebx, ecx, edx = registers
    return eax, ebx, ecx, edx


def xsave_size(components: int, cpuid: Callable[[int, int], tuple[int, int, int, int]]) -> int:
    """Bytes of an XSAVE image in the standard format with these components (SDM vol. 1, 13.4), as `cpuid` has them."""
    size = XSAVE_EXTENDED
    for component in range(2, 63):
        if components >> component & 1:
            length, offset, _, _ = cpuid(0xD, component)
            size = max(size, offset + length)
    return size
