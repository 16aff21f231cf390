"""The domain builder: lays out a new domain's memory and enters its kernel (Xen: tools/libs/guest, public/xen.h).

pfn 0 is mapped at the kernel's VIRT_BASE.  From there on, in order: the kernel where its ELF headers want it, the
ramdisk (unless the kernel takes it by frame number), the p2m list (unless it has a place of its own), start_info, the
xenstore and console rings, the initial page tables, a boot stack.  Then, outside the initial map if it does not reach
so far: the p2m list that the kernel wants at INIT_P2M, and a ramdisk taken by frame number.

The initial map ends on a 4 MiB boundary with at least 512 KiB to spare; page tables are mapped read-only in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xenolith.abi import layout
from xenolith.abi.x86 import MASK64, PAGE_SHIFT, PAGE_SIZE, PTE_A, PTE_D, PTE_NX, PTE_P, PTE_RW, PTE_US
from xenolith.dom0.image import KernelImage
from xenolith.hypervisor.control import Control, DomainCreateError
from xenolith.machine.memory import Frames

MIB: Final = 1 << 20
INITIAL_MAP_ALIGNMENT: Final = 4 * MIB
INITIAL_MAP_SLACK: Final = 512 << 10
TABLE_FLAGS: Final = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D
PAGE_FLAGS: Final = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D
HYPERCALL_STUB: Final = 32  # bytes
HYPERCALL_IRET: Final = 23
START_MAGIC: Final = b"xen-3.0-x86_64"


@dataclass(frozen=True)
class BuiltDomain:
    """Where the builder put what dom0's services need."""

    domid: int
    store_mfn: int
    store_port: int
    console_mfn: int
    console_port: int


@dataclass
class _Layout:
    """The plan, in pfns."""

    ramdisk: int = 0
    p2m: int = 0
    p2m_pages: int = 0
    start_info: int = 0
    store: int = 0
    console: int = 0
    page_tables: int = 0
    page_table_pages: int = 0
    stack: int = 0
    mapped_pages: int = 0  # the initial map covers pfns below this
    end: int = 0


def build(
    control: Control, domid: int, image: KernelImage, memory_pages: int, ramdisk: bytes = b"", cmdline: str = ""
) -> BuiltDomain:
    """Fill a freshly created, empty domain with a kernel, ready to be unpaused.

    Raises DomainCreateError where the kernel and its ramdisk do not fit the memory, or the command line its field.
    """
    encoded = cmdline.encode()
    if len(encoded) >= layout.MAX_GUEST_CMDLINE or b"\0" in encoded:
        raise DomainCreateError(
            f"the kernel command line has {len(encoded)} bytes; at most {layout.MAX_GUEST_CMDLINE - 1} fit"
        )
    plan = _plan(image, memory_pages, len(ramdisk))
    if plan.end > memory_pages:
        raise DomainCreateError(
            f"the kernel, its ramdisk of {len(ramdisk) / MIB:.1f} MiB and its tables need {plan.end * 4 // 1024 + 1} "
            f"MiB before the guest has used any, the domain has {memory_pages * 4 // 1024}: give it more memory"
        )
    mfns = control.populate(domid, memory_pages)
    for segment in image.segments:
        _write(control, domid, mfns, segment.paddr - image.elf_paddr_offset, segment.data)
    if ramdisk:
        _write(control, domid, mfns, plan.ramdisk << PAGE_SHIFT, ramdisk)
    _write(control, domid, mfns, plan.p2m << PAGE_SHIFT, mfns.tobytes())
    if image.hypercall_page is not None:
        _write(control, domid, mfns, image.hypercall_page - image.virt_base, hypercall_page())
    l4_pfn = _write_page_tables(control, domid, mfns, image, plan)
    store_port = control.allocate_unbound(domid)
    console_port = control.allocate_unbound(domid)
    shared_info = control.shared_info_mfn(domid)
    info = bytearray(PAGE_SIZE)
    info[: len(START_MAGIC)] = START_MAGIC

    def put(offset: int, value: int) -> None:
        layout.U64.pack_into(info, offset, value)

    def virtual(pfn: int) -> int:
        return image.virt_base + (pfn << PAGE_SHIFT) & MASK64

    by_pfn = bool(ramdisk) and image.mod_start_pfn
    put(layout.START_INFO_NR_PAGES, memory_pages)
    put(layout.START_INFO_SHARED_INFO, shared_info << PAGE_SHIFT)
    layout.U32.pack_into(info, layout.START_INFO_FLAGS, layout.SIF_MOD_START_PFN if by_pfn else 0)
    put(layout.START_INFO_STORE_MFN, int(mfns[plan.store]))
    layout.U32.pack_into(info, layout.START_INFO_STORE_EVTCHN, store_port)
    put(layout.START_INFO_CONSOLE_MFN, int(mfns[plan.console]))
    layout.U32.pack_into(info, layout.START_INFO_CONSOLE_EVTCHN, console_port)
    put(layout.START_INFO_PT_BASE, virtual(plan.page_tables))
    put(layout.START_INFO_NR_PT_FRAMES, plan.page_table_pages)
    put(layout.START_INFO_MFN_LIST, image.init_p2m if image.init_p2m is not None else virtual(plan.p2m))
    if ramdisk:
        put(layout.START_INFO_MOD_START, plan.ramdisk if by_pfn else virtual(plan.ramdisk))
        put(layout.START_INFO_MOD_LEN, len(ramdisk))
    if image.init_p2m is not None:
        put(layout.START_INFO_FIRST_P2M_PFN, plan.p2m)
        put(layout.START_INFO_NR_P2M_FRAMES, plan.p2m_pages)
    info[layout.START_INFO_CMD_LINE : layout.START_INFO_CMD_LINE + len(encoded)] = encoded
    _write(control, domid, mfns, plan.start_info << PAGE_SHIFT, info)
    control.initialise_shared_info(domid, memory_pages)
    control.set_boot_context(
        domid,
        l4_mfn=int(mfns[l4_pfn]),
        entry=image.entry,
        stack=virtual(plan.stack + 1),
        start_info=virtual(plan.start_info),
    )
    return BuiltDomain(domid, int(mfns[plan.store]), store_port, int(mfns[plan.console]), console_port)


def hypercall_page() -> bytes:
    """The page of hypercall stubs: 32 bytes for each number (public/arch-x86/xen-x86_64.h)."""
    page = bytearray(b"\xcc" * PAGE_SIZE)
    for number in range(PAGE_SIZE // HYPERCALL_STUB):
        load_number = b"\xb8" + number.to_bytes(4, "little")
        if number == HYPERCALL_IRET:  # push %rcx; push %r11; push %rax; mov $number,%eax; syscall
            stub = b"\x51\x41\x53\x50" + load_number + b"\x0f\x05"
        else:  # push %rcx; push %r11; mov $number,%eax; syscall; pop %r11; pop %rcx; ret
            stub = b"\x51\x41\x53" + load_number + b"\x0f\x05\x41\x5b\x59\xc3"
        page[number * HYPERCALL_STUB : number * HYPERCALL_STUB + len(stub)] = stub
    return bytes(page)


def _pages(size: int) -> int:
    return (size + PAGE_SIZE - 1) >> PAGE_SHIFT


def _plan(image: KernelImage, memory_pages: int, ramdisk_bytes: int) -> _Layout:
    plan = _Layout()
    plan.p2m_pages = _pages(memory_pages * 8)
    pfn = _pages(image.paddr_end - image.elf_paddr_offset)
    if ramdisk_bytes and not image.mod_start_pfn:
        plan.ramdisk, pfn = pfn, pfn + _pages(ramdisk_bytes)
    if image.init_p2m is None:
        plan.p2m, pfn = pfn, pfn + plan.p2m_pages
    plan.start_info, plan.store, plan.console, plan.page_tables = pfn, pfn + 1, pfn + 2, pfn + 3
    tables = 0
    while True:  # the tables must map themselves
        end = image.virt_base + (plan.page_tables + tables + 1 << PAGE_SHIFT) + INITIAL_MAP_SLACK
        end = -(-end // INITIAL_MAP_ALIGNMENT) * INITIAL_MAP_ALIGNMENT
        needed = sum(len(_table_bases(ranges)) for ranges in _table_ranges(image, end, plan.p2m_pages)) + 1
        if needed <= tables:
            break
        tables = needed
    plan.page_table_pages = tables
    plan.stack = plan.page_tables + tables
    plan.mapped_pages = end - image.virt_base >> PAGE_SHIFT
    pfn = plan.stack + 1
    if image.init_p2m is not None:
        plan.p2m, pfn = pfn, pfn + plan.p2m_pages
    if ramdisk_bytes and image.mod_start_pfn:
        plan.ramdisk, pfn = pfn, pfn + _pages(ramdisk_bytes)
    plan.end = pfn
    plan.mapped_pages = min(plan.mapped_pages, memory_pages)
    return plan


def _table_ranges(image: KernelImage, end: int, p2m_pages: int) -> list[list[tuple[int, int, int]]]:
    """For L1, L2 and L3: the linear ranges (start, end, shift of what one table covers) that need tables."""
    ranges = [(image.virt_base, end)]
    if image.init_p2m is not None:
        ranges.append((image.init_p2m, image.init_p2m + (p2m_pages << PAGE_SHIFT)))
    return [[(first, last, shift) for first, last in ranges] for shift in (21, 30, 39)]


def _table_bases(ranges: list[tuple[int, int, int]]) -> list[int]:
    """The linear addresses, in ascending order, at which tables that cover these ranges begin."""
    bases = {base << shift for start, end, shift in ranges for base in range(start >> shift, (end - 1 >> shift) + 1)}
    return sorted(bases)


def _write_page_tables(control: Control, domid: int, mfns: Frames, image: KernelImage, plan: _Layout) -> int:
    """Write the initial page tables; the pfn of the L4 table, which is the first of them."""
    end = image.virt_base + (plan.mapped_pages << PAGE_SHIFT)
    levels = _table_ranges(image, end, plan.p2m_pages)
    free = iter(range(plan.page_tables + 1, plan.page_tables + plan.page_table_pages))
    tables_of_level = [{base: next(free) for base in _table_bases(ranges)} for ranges in levels]
    first_table = plan.page_tables
    executable = _executable_pages(image, len(mfns))
    for base, pfn in tables_of_level[0].items():
        entries = np.zeros(512, dtype=np.uint64)
        vas = np.arange(512, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(base)
        for start, stop, first_pfn in _mappings(image, plan, end):
            slots = np.flatnonzero((vas >= np.uint64(start)) & (vas <= np.uint64(stop - 1)))
            if len(slots):
                pfns = ((vas[slots] - np.uint64(start)) >> np.uint64(PAGE_SHIFT)).astype(np.int64) + first_pfn
                flags = np.full(len(slots), PAGE_FLAGS, dtype=np.uint64)
                flags[(pfns >= first_table) & (pfns < first_table + plan.page_table_pages)] &= ~np.uint64(PTE_RW)
                flags[~executable[pfns]] |= np.uint64(PTE_NX)
                entries[slots] = mfns[pfns] << np.uint64(PAGE_SHIFT) | flags
        _write(control, domid, mfns, pfn << PAGE_SHIFT, entries.tobytes())
    for level, shift in ((1, 21), (2, 30)):
        for base, pfn in tables_of_level[level].items():
            _write_table(control, domid, mfns, pfn, tables_of_level[level - 1], base, shift)
    _write_table(control, domid, mfns, first_table, tables_of_level[2], None, 39)
    return first_table


def _executable_pages(image: KernelImage, memory_pages: int) -> npt.NDArray[np.bool_]:
    """Which pfns the initial map lets the kernel execute.

    All of them, as Xen has it, because a small kernel may load code anywhere. Linux says in its ELF headers what it
    executes and has the rest no-execute soon anyway; until then its data would be slow to write on an engine that
    watches executable pages for changed code (Unicorn: 15 % of a boot). From 6.18 on its initial code lies in the
    segment of its data, without PF_X: where the kernel is entered it executes, whatever the header says.
    """
    if image.guest_os != "linux":
        return np.ones(memory_pages, dtype=np.bool_)
    pages = np.zeros(memory_pages, dtype=np.bool_)
    for segment in image.segments:
        entered = 0 <= image.entry - image.virtual(segment.paddr) < segment.memsz
        if segment.executable or entered:
            start = segment.paddr - image.elf_paddr_offset
            pages[start >> PAGE_SHIFT : _pages(start + segment.memsz)] = True
    return pages


def _mappings(image: KernelImage, plan: _Layout, end: int) -> list[tuple[int, int, int]]:
    """(first linear address, end, first pfn) of what the initial tables map."""
    mappings = [(image.virt_base, end, 0)]
    if image.init_p2m is not None:
        mappings.append((image.init_p2m, image.init_p2m + (plan.p2m_pages << PAGE_SHIFT), plan.p2m))
    return mappings


def _write_table(
    control: Control, domid: int, mfns: Frames, pfn: int, below: dict[int, int], base: int | None, shift: int
) -> None:
    """Write an L2..L4 table with links to the tables below that lie in it."""
    entries = np.zeros(512, dtype=np.uint64)
    for address, table in below.items():
        if base is None or address >> shift + 9 == base >> shift + 9:
            entries[address >> shift & 511] = int(mfns[table]) << PAGE_SHIFT | TABLE_FLAGS
    _write(control, domid, mfns, pfn << PAGE_SHIFT, entries.tobytes())


def _write(control: Control, domid: int, mfns: Frames, address: int, data: bytes | bytearray | memoryview) -> None:
    """Copy to a guest-physical address, across frames."""
    position = 0
    size = len(data)
    while position < size:
        pfn, offset = divmod(address + position, PAGE_SIZE)
        run = 1  # frames that are contiguous in machine memory too
        wanted = _pages(offset + size - position)
        if wanted > 1:
            window = mfns[pfn : pfn + wanted]
            breaks = np.flatnonzero(np.diff(window.astype(np.int64)) != 1)
            run = int(breaks[0]) + 1 if len(breaks) else len(window)
        count = min(run * PAGE_SIZE - offset, size - position)
        control.write_frames(domid, int(mfns[pfn]), offset, data[position : position + count])
        position += count
