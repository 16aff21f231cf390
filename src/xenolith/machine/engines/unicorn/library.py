"""The shared object inside the `unicorn` wheel, driven directly.

The official Python binding converts every value several times: a typical system-call trap costs 23 us through it
and under 1 us when CPUX86State is read in place.  So this module loads the same shared object with ctypes and
gives typed access to its public functions and to some of QEMU's own, which the build happens to export.

Functions that last long (`emu_start`) drop Python's global lock; the others keep it, because releasing and taking it
would cost more than they do.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

from xenolith.machine.engines.protocol import EngineError

VERSION: Final = "2.1.4"  # whose private layout layout.py describes

UC_ARCH_X86: Final = 4
UC_MODE_64: Final = 8
UC_PROT_ALL: Final = 7
UC_HOOK_INTR: Final = 1
UC_HOOK_INSN: Final = 2
UC_HOOK_MEM_FETCH_PROT: Final = 0x200
UC_HOOK_INSN_INVALID: Final = 0x4000
UC_HOOK_EDGE_GENERATED: Final = 0x8000
UC_X86_INS_IN: Final = 218
UC_X86_INS_OUT: Final = 500
UC_X86_INS_CPUID: Final = 113
UC_X86_INS_SYSCALL: Final = 699
UC_X86_INS_SYSENTER: Final = 700
UC_X86_REG_MSR: Final = 248
UC_CTL_USE_EXITS: Final = 4
UC_CTL_CPU_MODEL: Final = 7
UC_CTL_TCG_BUFFER_SIZE: Final = 13

TrapCallback = ctypes.CFUNCTYPE(ctypes.c_bool, c_uint32, c_uint64, c_uint64)  # vector, error code, address


class Library:
    """Typed functions of the shared object; `env` and `cpu` are addresses of CPUX86State and CPUState."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._keeps_lock = ctypes.PyDLL(str(path))
            self._drops_lock = ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineError(f"cannot load the Unicorn engine {path}: {error}") from error
        self.strerror = self._function("uc_strerror", c_char_p, c_int)
        self.open = self._function("uc_open", c_int, c_int, c_int, POINTER(c_void_p))
        self.close = self._function("uc_close", c_int, c_void_p)
        self.ctl = self._function("uc_ctl", c_int, c_void_p, c_uint, c_uint)
        self.mem_map_ptr = self._function("uc_mem_map_ptr", c_int, c_void_p, c_uint64, c_uint64, c_uint32, c_void_p)
        self.reg_read = self._function("uc_reg_read", c_int, c_void_p, c_int, c_void_p)
        self.reg_write = self._function("uc_reg_write", c_int, c_void_p, c_int, c_void_p)
        self.hook_add = self._function(
            "uc_hook_add", c_int, c_void_p, POINTER(c_void_p), c_int, c_void_p, c_void_p, c_uint64, c_uint64, c_int
        )
        self.emu_stop = self._function("uc_emu_stop", c_int, c_void_p)
        self.emu_start = self._drops_lock["uc_emu_start"]
        self.emu_start.argtypes = (c_void_p, c_uint64, c_uint64, c_uint64, c_size_t)
        self.emu_start.restype = c_int

        self.update_cr0 = self._function("cpu_x86_update_cr0_x86_64", None, c_void_p, c_uint32)
        self.update_cr3 = self._function("cpu_x86_update_cr3_x86_64", None, c_void_p, c_uint64)
        self.update_cr4 = self._function("cpu_x86_update_cr4_x86_64", None, c_void_p, c_uint32)
        self.cpuid = self._function(
            "cpu_x86_cpuid_x86_64", None, c_void_p, c_uint32, c_uint32, *[POINTER(c_uint32)] * 4
        )
        self.set_dr = self._function("helper_set_dr_x86_64", None, c_void_p, c_int, c_uint64)
        self.update_fp_status = self._function("update_fp_status_x86_64", None, c_void_p)
        self.update_mxcsr_status = self._function("update_mxcsr_status_x86_64", None, c_void_p)

    def address(self, symbol: str) -> int:
        """Where an exported symbol lies."""
        try:
            return ctypes.cast(getattr(self._keeps_lock, symbol), c_void_p).value or 0
        except AttributeError:
            raise EngineError(f"{self.path} does not export {symbol}: {ADVICE}") from None

    def check(self, error: int, doing: str) -> None:
        """Raise EngineError if a public function returned an error."""
        if error:
            raise EngineError(f"Unicorn failed {doing}: {self.strerror(error).decode()} (error {error})")

    def _function(self, symbol: str, result: Any, *arguments: Any) -> Any:
        self.address(symbol)
        function = self._keeps_lock[symbol]  # a fresh object each time, unlike getattr
        function.argtypes = arguments
        function.restype = result
        return function


ADVICE: Final = f"the Unicorn engine needs PyPI's x86-64 Linux wheel of it (pip install unicorn=={VERSION})"


@functools.cache
def load() -> Library:
    """The library of the installed wheel. Raises EngineError when it is missing or another version."""
    try:
        version = importlib.metadata.version("unicorn")
    except importlib.metadata.PackageNotFoundError:
        raise EngineError(f"the package unicorn is not installed: {ADVICE}") from None
    if version != VERSION:
        raise EngineError(f"unicorn {version} is installed: {ADVICE}")
    spec = importlib.util.find_spec("unicorn")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        path = folder / "lib" / "libunicorn.so.2"
        if path.exists():
            return Library(path)
    raise EngineError(f"no libunicorn.so.2 in {', '.join(map(str, folders))}: {ADVICE}")
