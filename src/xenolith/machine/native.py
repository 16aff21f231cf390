"""Native code: C that this machine's compiler builds when it is first wanted.

What Python does at every trap can be done by C in a twentieth of the time.  It is never needed: a machine without a
compiler, or with XENOLITH_NATIVE=off, runs the Python that remains the reference for all of it, and `missing` says why.

C and Python work on the same state: classes derived from `ctypes.Structure` hold it, `declare` writes them down as C
structures, and `define` numbers as C constants, so neither is stated twice.  The shared object is kept in the user's
cache under a name that is a checksum of the source and of everything declared to it, so it is never out of date.
The code needs nothing but a compiler: no headers but the compiler's own, no library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from xenolith.abi.x86 import MASK64

OPTIONS: Final = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-nostdlib", "-ffreestanding", "-fno-strict-aliasing")
# XENOLITH_NATIVE=sanitize, for tests (`make sanitize`): the first bad access or undefined operation ends the process.
# The sanitizers' libraries have to be loaded before Python.
SANITIZERS: Final = ("-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMPILERS: Final = ("cc", "gcc", "clang")
COMPILE_SECONDS: Final = 120.0
PRELUDE: Final = """\
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef int64_t i64;
static inline u64 load64(const u8 *at) { u64 value; __builtin_memcpy(&value, at, 8); return value; }
static inline bool is_canonical(u64 va) { return va + (1ull << 47) < 1ull << 48; }
/* As abi.x86.is_canonical_range: `size` bytes, at least one, in one canonical half, with no way round the end. */
static inline bool is_canonical_range(u64 va, u64 size)
{
    u64 last = va + size - 1;
    return is_canonical(va) && is_canonical(last) && last >= va && !((va ^ last) >> 63);
}
"""
_TYPES: Final = {
    ctypes.c_bool: "bool",
    ctypes.c_uint8: "u8",
    ctypes.c_uint16: "u16",
    ctypes.c_int16: "int16_t",
    ctypes.c_uint16: "u16",
    ctypes.c_uint32: "u32",
    ctypes.c_int32: "int32_t",
    ctypes.c_uint64: "u64",
    ctypes.c_int64: "i64",
}


Fields = Sequence[tuple[str, Any]]  # the type of a structure's _fields_


class Missing(Exception):
    """There is no native code; the text says why."""


def declare(name: str, structure: type[ctypes.Structure], pointers: Mapping[str, str] | None = None) -> str:
    """`struct name` in C. `pointers`: C declarations, as `struct domain *{}`, of fields that hold addresses."""
    lines = [f"struct {name} {{"]
    classes = [each for each in reversed(structure.__mro__) if "_fields_" in vars(each)]  # a base's fields come first
    for field in (field for each in classes for field in vars(each)["_fields_"]):
        member, kind = field[0], field[1]
        suffix = ""
        while issubclass(kind, ctypes.Array):
            suffix += f"[{kind._length_}]"  # the outermost dimension first
            kind = kind._type_
        if pointers and member in pointers:
            lines.append(f"    {pointers[member].format(member)};")
        else:
            lines.append(f"    {_TYPES[kind]} {member}{suffix};")
    size = ctypes.sizeof(structure)
    return "\n".join([*lines, "};", f'_Static_assert(sizeof(struct {name}) == {size}, "{name}");', ""])


def define(module: Any, names: str) -> str:
    """These integers of a module as C macros; `names` is separated by spaces."""
    return "".join(f"#define {name} {getattr(module, name) & MASK64:#x}ull\n" for name in names.split())


def load(source: Path, declarations: str = "", halves: Sequence[Path] = ()) -> ctypes.PyDLL:
    """Compile a C file, unless that was done before, and load it. Raises Missing.

    Its functions are called with Python's lock held; for one that runs long, open `build` with ctypes.CDLL.
    """
    return _load(build(source, declarations, halves))


def build(source: Path, declarations: str = "", halves: Sequence[Path] = ()) -> Path:
    """Compile a C file, unless that was done before: the shared object. Raises Missing.

    `halves` are C files that precede it in the same translation unit, in this order: each the C half of the Python
    beside it.
    """
    reason = missing()
    if reason is not None:
        raise Missing(reason)
    texts = (f'#line 1 "{part.name}"\n{part.read_text()}' for part in (*halves, source))
    return _build(PRELUDE + declarations + "".join(texts), source.stem)


@functools.cache
def _load(path: Path) -> ctypes.PyDLL:
    try:
        return ctypes.PyDLL(str(path))
    except OSError as error:
        raise Missing(f"cannot load {path}: {error}") from error


@functools.cache
def _build(text: str, name: str) -> Path:
    program = _compiler()
    assert program is not None
    compiler = (program, *_wanted()[1:])
    options = OPTIONS + SANITIZERS if os.environ.get("XENOLITH_NATIVE") == "sanitize" else OPTIONS
    key = hashlib.sha256("\0".join((text, *compiler, *options)).encode()).hexdigest()[:32]
    path = _cache() / f"{name}-{key}.so"
    if not path.exists():
        _compile(compiler, options, text, path)
    return path


def function_address(function: Any) -> int:
    """Where a ctypes function or callback lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def buffer_address(buffer: Any) -> int:
    """Where the bytes of a writable buffer lie, which has to be kept."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _compile(compiler: Sequence[str], options: Sequence[str], text: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / path.name
            command = [*compiler, *options, "-x", "c", "-", "-o", str(made)]
            result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if result.returncode or not made.exists():
                why = result.stderr.strip() or f"it ends with status {result.returncode} and makes nothing"
                raise Missing(f"{shlex.join(compiler)} cannot compile {path.stem.rpartition('-')[0]}.c: {why}")
            made.rename(path)
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{shlex.join(compiler)} has not ended after {COMPILE_SECONDS} seconds") from error
    except OSError as error:
        raise Missing(f"cannot compile into {path.parent}: {error}") from error


@functools.cache
def _compiler() -> str | None:
    """The program: the one that CC names, or the first of COMPILERS that there is."""
    return next(filter(None, map(shutil.which, _wanted()[:1] or COMPILERS)), None)


def _wanted() -> list[str]:
    """What CC says: a program, and perhaps arguments."""
    return shlex.split(os.environ.get("CC", ""))


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return base / "xenolith" / "native"


def missing() -> str | None:
    """Why there is no native code here; None: there is."""
    if os.environ.get("XENOLITH_NATIVE") == "off":
        return "XENOLITH_NATIVE=off"
    try:
        compiler = _compiler()
    except ValueError as error:
        return f"CC={os.environ['CC']} is no command: {error}"
    if compiler is None and os.environ.get("CC"):
        return f"CC={os.environ['CC']} names no program that is here"
    if compiler is None:
        return "there is no C compiler (Debian: apt install gcc)"
    return None
