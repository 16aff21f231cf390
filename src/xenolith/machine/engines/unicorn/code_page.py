"""One page for all the machine code of an instance, given back with it."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Final

from xenolith.machine.engines.protocol import EngineError

ALIGNMENT: Final = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class CodePage:
    """Writable until `seal`, executable afterwards."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._used = 0

    def place(self, code: bytes) -> int:
        """Put position-independent machine code here; its address."""
        start = self._used
        self._page[start : start + len(code)] = code
        self._used = start + len(code) + ALIGNMENT - 1 & -ALIGNMENT
        return self._address + start

    def function(self, code: bytes, result: Any, *arguments: Any) -> Any:
        """The same, as a Python callable with these ctypes result and argument types, which keeps the GIL."""
        return ctypes.PYFUNCTYPE(result, *arguments)(self.place(code))

    def seal(self) -> None:
        """Make it executable. Raises EngineError where the host forbids that."""
        if _libc.mprotect(self._address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            raise EngineError("this host forbids executable memory, without which Unicorn cannot run guests")
