"""A core file of a domain, for gdb and for tools that know Xen's dumps.

The file is an ELF core twice over, with the same bytes of memory. Its program headers are those of a process core: a
PT_NOTE segment with a process status (the registers) for each vCPU, which debuggers show as threads, and a PT_LOAD
segment for each virtual address range at which the guest's kernel has some of it mapped. Its sections are
those of Xen's own dump format: `.note.Xen`, `.xen_prstatus` with the vCPU contexts, `.xen_p2m` with the pfn and gmfn
of each page and `.xen_pages` with the pages in the same order.

    ELF header | program headers | notes | vCPU contexts | p2m | pages ... | section names | section headers

Source: gABI (ELF), Linux's elf_prstatus for x86-64 as in <sys/procfs.h>, Xen's docs/misc/dump-core-format.txt.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Protocol, TypeAlias

from xenolith.abi.x86 import PAGE_SIZE
from xenolith.toolstack.client import OnProgress, Progress, ToolstackError, no_progress

Buffer: TypeAlias = "bytes | bytearray | memoryview"


REGISTERS: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
"""The general registers in the order of a process status."""


@dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU: its registers by the names of REGISTERS, and its vcpu_guest_context as Xen's interface has it."""

    registers: dict[str, int]
    guest_context: bytes = b""


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """Consecutive frames of the domain. `chunks` yields their contents, `frames` pages in all, when it is written."""

    pfn: int
    frames: int
    gmfns: Sequence[int]  # of each frame
    chunks: Iterable[Buffer]


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where the guest's kernel has consecutive frames mapped. Frames may be mapped in several places, or nowhere."""

    vaddr: int
    pfn: int
    frames: int


class SupportsWrite(Protocol):
    """A binary file, as far as it is needed here."""

    def write(self, data: Buffer, /) -> object: ...


_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NOTE_HEADER = struct.Struct("<III")

_PRSTATUS = struct.Struct("<iiih2xQQiiii64x27Qi4x")  # elf_prstatus of x86-64, 336 bytes
_PRPSINFO = struct.Struct("<bcbb4xQIIiiii16s80s")  # elf_prpsinfo of x86-64, 136 bytes

_ET_CORE, _EM_X86_64 = 4, 62
_PT_LOAD, _PT_NOTE = 1, 4
_PF_RWX = 7
_SHT_PROGBITS, _SHT_STRTAB, _SHT_NOTE = 1, 3, 7
_NT_PRSTATUS, _NT_PRPSINFO = 1, 3
_MAX_SEGMENTS: Final = 0xFFFE  # e_phnum has 16 bits, and 0xffff means something else

_XEN_NOTE_NONE, _XEN_NOTE_HEADER, _XEN_NOTE_VERSION, _XEN_NOTE_FORMAT = range(0x2000000, 0x2000004)
_XEN_MAGIC: Final = 0xF00FEBED  # a PV domain's dump, with .xen_p2m
_XEN_FORMAT: Final = 1


def write_core(
    file: SupportsWrite,
    name: str,
    vcpus: Sequence[VcpuState],
    memory: Sequence[MemoryRun],
    mappings: Sequence[Mapping],
    progress: OnProgress = no_progress,
) -> None:
    """Write a core of the domain `name` to `file`, which need not be seekable.

    Frames that are mapped but not part of `memory` are left out; of too many mappings the smallest are.
    """
    runs = sorted(memory, key=lambda run: run.pfn)
    segments = _segments(runs, mappings)
    layout = _Layout(name, vcpus, runs, segments)
    file.write(layout.head)
    _write_memory(file, runs, progress)
    file.write(layout.tail)


def _write_memory(file: SupportsWrite, runs: Sequence[MemoryRun], progress: OnProgress) -> None:
    total = sum(run.frames for run in runs)
    done = 0
    for run in runs:
        expected = run.frames * PAGE_SIZE
        for chunk in run.chunks:
            expected -= memoryview(chunk).nbytes
            if expected < 0:
                break
            file.write(chunk)
            progress(Progress("writing memory", done + run.frames - expected // PAGE_SIZE, total))
        if expected:
            raise ToolstackError(f"the memory run at pfn {run.pfn:#x} is not {run.frames} pages long")
        done += run.frames


class _Layout:
    """Where everything is in the file: `head` comes before the pages, `tail` after them."""

    def __init__(
        self, name: str, vcpus: Sequence[VcpuState], runs: Sequence[MemoryRun], loads: Sequence[_Segment]
    ) -> None:
        frames = sum(run.frames for run in runs)
        process_notes = _prpsinfo(name) + b"".join(_prstatus(number, vcpu) for number, vcpu in enumerate(vcpus))
        xen_notes = _xen_notes(len(vcpus), frames)
        contexts = b"".join(vcpu.guest_context for vcpu in vcpus)
        p2m = _p2m(runs)

        notes_at = _ELF_HEADER.size + _PROGRAM_HEADER.size * (1 + len(loads))
        xen_notes_at = notes_at + len(process_notes)
        contexts_at = xen_notes_at + len(xen_notes)
        p2m_at = contexts_at + len(contexts)
        pages_at = -(-(p2m_at + len(p2m)) // PAGE_SIZE) * PAGE_SIZE
        names_at = pages_at + frames * PAGE_SIZE

        segments = [_PROGRAM_HEADER.pack(_PT_NOTE, 0, notes_at, 0, 0, len(process_notes) + len(xen_notes), 0, 4)]
        segments += [_load_segment(load, pages_at) for load in loads]
        sections = _Sections()
        sections.add(".note.Xen", _SHT_NOTE, xen_notes_at, len(xen_notes), 0)
        context_size = len(contexts) // len(vcpus) if vcpus else 0
        sections.add(".xen_prstatus", _SHT_PROGBITS, contexts_at, len(contexts), context_size)
        sections.add(".xen_p2m", _SHT_PROGBITS, p2m_at, len(p2m), 16)
        sections.add(".xen_pages", _SHT_PROGBITS, pages_at, frames * PAGE_SIZE, PAGE_SIZE)
        names, headers = sections.finish(names_at)

        elf_header = _ELF_HEADER.pack(
            b"\x7fELF\x02\x01\x01",
            _ET_CORE,
            _EM_X86_64,
            1,
            0,
            _ELF_HEADER.size,
            names_at + len(names),
            0,
            _ELF_HEADER.size,
            _PROGRAM_HEADER.size,
            len(segments),
            _SECTION_HEADER.size,
            len(headers) // _SECTION_HEADER.size,
            len(headers) // _SECTION_HEADER.size - 1,
        )
        start = elf_header + b"".join(segments) + process_notes + xen_notes + contexts + p2m
        self.head = start + bytes(pages_at - len(start))
        self.tail = names + headers


@dataclass(frozen=True, slots=True)
class _Segment:
    """Frames at a virtual address, of which the first is page number `index` in the file."""

    vaddr: int
    pfn: int
    index: int
    frames: int


def _segments(runs: Sequence[MemoryRun], mappings: Sequence[Mapping]) -> list[_Segment]:
    """What is mapped of the runs, by virtual address."""
    starts = [run.pfn for run in runs]
    indices = list(accumulate((run.frames for run in runs), initial=0))
    found = []
    for mapping in mappings:
        pfn, end = mapping.pfn, mapping.pfn + mapping.frames
        for number in range(max(bisect_right(starts, pfn) - 1, 0), bisect_left(starts, end)):
            run = runs[number]
            first, last = max(pfn, run.pfn), min(end, run.pfn + run.frames)
            if first < last:
                vaddr = mapping.vaddr + (first - pfn) * PAGE_SIZE
                found.append(_Segment(vaddr, first, indices[number] + first - run.pfn, last - first))
    largest = sorted(found, key=lambda segment: -segment.frames)[:_MAX_SEGMENTS]
    return sorted(largest, key=lambda segment: segment.vaddr)


def _load_segment(load: _Segment, pages_at: int) -> bytes:
    offset, size = pages_at + load.index * PAGE_SIZE, load.frames * PAGE_SIZE
    address = load.pfn * PAGE_SIZE
    return _PROGRAM_HEADER.pack(_PT_LOAD, _PF_RWX, offset, load.vaddr, address, size, size, PAGE_SIZE)


class _Sections:
    """Section headers and the table of their names."""

    def __init__(self) -> None:
        self._names = bytearray(b"\0")
        self._headers = bytearray(_SECTION_HEADER.size)  # the first one is all zeroes

    def add(self, name: str, kind: int, offset: int, size: int, entry_size: int) -> None:
        self._headers += _SECTION_HEADER.pack(len(self._names), kind, 0, 0, offset, size, 0, 0, 8, entry_size)
        self._names += name.encode() + b"\0"

    def finish(self, names_at: int) -> tuple[bytes, bytes]:
        """The names, padded, and the headers; the names stand at `names_at` in the file."""
        size = len(self._names) + len(b".shstrtab\0")
        self.add(".shstrtab", _SHT_STRTAB, names_at, size, 0)
        return bytes(self._names) + bytes(-len(self._names) % 8), bytes(self._headers)


def _note(owner: bytes, kind: int, content: bytes) -> bytes:
    padding = bytes(-len(owner) % 4), bytes(-len(content) % 4)
    return _NOTE_HEADER.pack(len(owner), len(content), kind) + owner + padding[0] + content + padding[1]


def _prpsinfo(name: str) -> bytes:
    text = name.encode(errors="replace")
    return _note(b"CORE\0", _NT_PRPSINFO, _PRPSINFO.pack(0, b"R", 0, 0, 0, 0, 0, 1, 0, 0, 0, text[:15], text[:79]))


def _prstatus(number: int, vcpu: VcpuState) -> bytes:
    """The registers of a vCPU; it is thread number + 1, since 0 is no thread."""
    registers = [vcpu.registers.get(name, 0) & 2**64 - 1 for name in REGISTERS]
    return _note(b"CORE\0", _NT_PRSTATUS, _PRSTATUS.pack(0, 0, 0, 0, 0, 0, number + 1, 0, 0, 0, *registers, 0))


def _xen_notes(vcpus: int, frames: int) -> bytes:
    header = struct.pack("<QQQQ", _XEN_MAGIC, vcpus, frames, PAGE_SIZE)
    version = struct.pack("<QQ16s64s16s64s1024s64sQQ", 4, 17, b"", b"", b"", b"", b"", b"", 0, PAGE_SIZE)
    return (
        _note(b"Xen\0", _XEN_NOTE_NONE, b"")
        + _note(b"Xen\0", _XEN_NOTE_HEADER, header)
        + _note(b"Xen\0", _XEN_NOTE_VERSION, version)
        + _note(b"Xen\0", _XEN_NOTE_FORMAT, struct.pack("<Q", _XEN_FORMAT))
    )


def _p2m(runs: Sequence[MemoryRun]) -> bytes:
    entries = bytearray()
    for run in runs:
        if len(run.gmfns) != run.frames:
            raise ToolstackError(
                f"the memory run at pfn {run.pfn:#x} has {len(run.gmfns)} gmfns for {run.frames} pages"
            )
        for index, gmfn in enumerate(run.gmfns):
            entries += struct.pack("<QQ", run.pfn + index, gmfn)
    return bytes(entries)
