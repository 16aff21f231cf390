"""Atomic operations on machine memory that running guest code shares with ring 0 (Intel SDM vol. 3, 9.1).

On an engine whose vCPUs run in parallel on host processors (KVM), guests change the words they share with Xen
by locked instructions at any time: event-pending bits, grant flags.  Python's read-modify-write would lose
such a change.  Unicorn's emulated LOCK is no more than a plain read and write, so there these words
are in addition changed on the domain's own thread only.

Addresses are host addresses: `MachineMemory.address` plus the machine address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

from xenolith.machine.machine_code import function

set_bit: Final[Callable[[int, int], int]] = function(
    bytes.fromhex(
        "f0 48 0f ab 37"  # lock bts [rdi], rsi
        "0f 92 c0"  # setc al
        "0f b6 c0"  # movzx eax, al
        "c3"
    ),
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_size_t,
)
"""Set bit number `arg 2` of the bit string at address `arg 1` (8-aligned); 1 if it was set before, else 0."""

clear_bit: Final[Callable[[int, int], int]] = function(
    bytes.fromhex(
        "f0 48 0f b3 37"  # lock btr [rdi], rsi
        "0f 92 c0"
        "0f b6 c0"
        "c3"
    ),
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_size_t,
)
"""Clear a bit of a bit string; 1 if it was set before, else 0."""

compare_exchange_32: Final[Callable[[int, int, int], int]] = function(
    bytes.fromhex(
        "89 f0"  # mov eax, esi
        "f0 0f b1 17"  # lock cmpxchg [rdi], edx
        "c3"
    ),
    ctypes.c_uint32,
    ctypes.c_size_t,
    ctypes.c_uint32,
    ctypes.c_uint32,
)
"""Store `arg 3` in the 32-bit word at `arg 1` if it holds `arg 2`; what it held before."""

compare_exchange_16: Final[Callable[[int, int, int], int]] = function(
    bytes.fromhex(
        "89 f0"  # mov eax, esi
        "66 f0 0f b1 17"  # lock cmpxchg [rdi], dx
        "0f b7 c0"  # movzx eax, ax
        "c3"
    ),
    ctypes.c_uint16,
    ctypes.c_size_t,
    ctypes.c_uint16,
    ctypes.c_uint16,
)
"""The same for a 16-bit word."""

fence: Final[Callable[[], None]] = function(
    bytes.fromhex(
        "f0 83 0c 24 00"  # lock or dword [rsp], 0
        "c3"
    ),
    None,
)
"""No load after this is carried out before any store before it."""
