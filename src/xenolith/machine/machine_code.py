"""Functions of a few machine instructions, callable from Python.

Python has no locked instructions and no way to read the time stamp counter.  Both are needed often, and a
handful of bytes of x86-64 code in an executable page provides them at the cost of a ctypes call (0.2 us),
with no compiler.  The calls keep the GIL.  System V calling convention: arguments in rdi, rsi, rdx; result in rax.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_pages: list[mmap.mmap] = []  # never unmapped: functions live as long as the process


def function(code: bytes, result: Any, *arguments: Any) -> Any:
    """Make a callable of position-independent machine code with these ctypes result and argument types.

    Raises OSError where the host forbids executable memory (no engine can run there either).
    """
    page = mmap.mmap(-1, max(mmap.PAGESIZE, len(code)), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if _libc.mprotect(address, len(page), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "this host forbids executable memory, which Xenolith needs to run guests")
    _pages.append(page)
    return ctypes.PYFUNCTYPE(result, *arguments)(address)
