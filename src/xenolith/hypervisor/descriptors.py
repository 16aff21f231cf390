"""Segment descriptor tables: set_gdt, update_descriptor, the LDT (Xen: arch/x86/pv/descriptor-tables.c).

A guest's GDT and LDT pages are frames of type "segment descriptors": every descriptor in them was checked to
give nothing beyond ring 3, and nothing may map them writable.  The processor reads them through a window in
Xen's part of the address space: per vCPU 16 pages of GDT (14 the guest's, then Xen's own with the flat
selectors of the ABI) followed by 16 pages of LDT.  The window is mapped read-only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.errno import EINVAL
from xenolith.abi.x86 import PAGE_SIZE, PTE_A, PTE_ADDRESS, PTE_NX, PTE_P, is_canonical
from xenolith.hypervisor import paging, tlb
from xenolith.hypervisor.frames import TYPE_SEGDESC
from xenolith.hypervisor.guest_memory import READ, translate

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

SEGMENT_P: Final = 1 << 47
SEGMENT_DPL: Final = 3 << 45
SEGMENT_S: Final = 1 << 44
SEGMENT_TYPE: Final = 15 << 40
SEGMENT_CODE: Final = 1 << 43
SEGMENT_L: Final = 1 << 53
SEGMENT_DB: Final = 1 << 54
ACCESSED: Final = 1 << 40

WINDOW_SLOT: Final = 260  # L4 slot of the per-domain area
WINDOW_VA: Final = 0xFFFF_8200_0000_0000
PAGES_PER_VCPU: Final = 32
GDT_PAGES: Final = 16
MAX_GUEST_GDT_PAGES: Final = layout.FIRST_RESERVED_GDT_PAGE
MAX_LDT_ENTRIES: Final = 8192
WINDOW_ENTRY: Final = PTE_P | PTE_A | PTE_NX

# Xen's own descriptors, by selector (the ABI's FLAT_RING3_*): accessed bits set, so that loading writes nothing.
FLAT_DESCRIPTORS: Final = {
    layout.FLAT_RING3_CS32: 0x00CF_FB00_0000_FFFF,
    layout.FLAT_RING3_DS32: 0x00CF_F300_0000_FFFF,
    layout.FLAT_RING3_CS64: 0x00AF_FB00_0000_FFFF,
}


def gdt_va(vcpu_id: int) -> int:
    """Linear address of a vCPU's GDT in the window."""
    return WINDOW_VA + vcpu_id * PAGES_PER_VCPU * PAGE_SIZE


def ldt_va(vcpu_id: int) -> int:
    """Linear address of a vCPU's LDT in the window."""
    return gdt_va(vcpu_id) + GDT_PAGES * PAGE_SIZE


def checked(descriptor: int) -> int | None:
    """A guest's descriptor as it may be stored (DPL raised to 3, accessed bit set), or None if it is refused."""
    if not descriptor & SEGMENT_P:
        return descriptor  # a load of it faults
    descriptor |= SEGMENT_DPL
    if descriptor & SEGMENT_S:
        if descriptor & SEGMENT_CODE and descriptor & SEGMENT_L and descriptor & SEGMENT_DB:
            return None
        return descriptor | ACCESSED
    if descriptor & SEGMENT_TYPE == 0:
        return descriptor
    return None  # system segments; call gates too, which a 64-bit guest has no use for


def validate_descriptor_page(domain: Domain, mfn: int) -> int:
    """Check all 512 descriptors of a frame; each is stored as `checked` has it."""
    table = domain.memory.q[mfn << 9 : (mfn + 1) << 9]
    for slot, descriptor in enumerate(table):
        if descriptor:
            allowed = checked(descriptor)
            if allowed is None:
                return -EINVAL
            table[slot] = allowed
    return 0


def window_index(domain: Domain, vcpu_id: int, page: int) -> int:
    """Index (64-bit words of machine memory) of the window's L1 entry for page `page` of a vCPU."""
    number = vcpu_id * PAGES_PER_VCPU + page
    return domain.window_l1[number >> 9] << 9 | number & 511


def lookup(vcpu: Vcpu, selector: int) -> int:
    """The descriptor that the processor finds for a selector; 0 where the window shows nothing."""
    offset = selector & 0xFFF8
    if selector & 4:
        if offset >= vcpu.ldt_entries * 8:
            return 0
        page = GDT_PAGES + (offset >> 12)
    else:
        page = offset >> 12
    q = vcpu.domain.memory.q
    entry = q[window_index(vcpu.domain, vcpu.vcpu_id, page)]
    return q[(entry & PTE_ADDRESS) >> 3 | offset >> 3 & 511] if entry & PTE_P else 0


def set_up_window(vcpu: Vcpu) -> None:
    """The window of a vCPU without a GDT: empty descriptors, then Xen's own. No LDT."""
    domain = vcpu.domain
    view = domain.view
    for page in range(GDT_PAGES):
        mfn = view.gdt_mfn if page == layout.FIRST_RESERVED_GDT_PAGE else view.zero_mfn
        domain.memory.q[window_index(domain, vcpu.vcpu_id, page)] = mfn << 12 | WINDOW_ENTRY


def _map(vcpu: Vcpu, page: int, mfn: int) -> None:
    """Show frame `mfn` (0: nothing) in the vCPU's window."""
    domain = vcpu.domain
    index = window_index(domain, vcpu.vcpu_id, page)
    domain.memory.q[index] = mfn << 12 | WINDOW_ENTRY if mfn else 0
    if domain.entry_changed is not None:
        domain.entry_changed(index, PTE_P, 0)
    tlb.flush_page([vcpu], gdt_va(vcpu.vcpu_id) + page * PAGE_SIZE)


def set_gdt_frames(vcpu: Vcpu, mfns: list[int], entries: int) -> int:
    """Replace the vCPU's GDT."""
    domain = vcpu.domain
    if entries > layout.FIRST_RESERVED_GDT_ENTRY or len(mfns) > MAX_GUEST_GDT_PAGES:
        return -EINVAL
    for taken, mfn in enumerate(mfns):
        if paging.get_page_and_type(domain, mfn, TYPE_SEGDESC):
            for other in mfns[:taken]:
                paging.put_page_and_type(domain, other)
            return -EINVAL
    destroy_gdt(vcpu)
    vcpu.gdt_frames, vcpu.gdt_entries = mfns, entries
    for page, mfn in enumerate(mfns):
        _map(vcpu, page, mfn)
    return 0


def destroy_gdt(vcpu: Vcpu) -> None:
    """The vCPU's GDT holds only Xen's own descriptors from here on."""
    old, vcpu.gdt_frames, vcpu.gdt_entries = vcpu.gdt_frames, [], 0
    vcpu.forget_flat_pairs()
    for page, mfn in enumerate(old):
        _map(vcpu, page, vcpu.domain.view.zero_mfn)
        paging.put_page_and_type(vcpu.domain, mfn)


# --- the LDT ---------------------------------------------------------------------------------------
# The LDT is given by linear address.  Its pages are taken and shown in the window when it is set or when the
# base pointer changes.  A page that is not mapped or no descriptor page stays away; loading a selector in it
# faults.  When the guest withdraws a mapping of a page in use as LDT, the LDT is dropped and taken anew.


def set_ldt(vcpu: Vcpu, va: int, entries: int) -> int:
    """MMUEXT_SET_LDT: `entries` descriptors at page-aligned linear address `va`; 0 entries: none."""
    if va & 0xFFF or not is_canonical(va) or entries > MAX_LDT_ENTRIES:
        return -EINVAL
    unload_ldt(vcpu)
    vcpu.ldt_va, vcpu.ldt_entries = (va, entries) if entries else (0, 0)
    vcpu.domain.ldt_in_use = any(each.ldt_entries for each in vcpu.domain.vcpus)
    load_ldt(vcpu)
    return 0


def load_ldt(vcpu: Vcpu) -> None:
    """Take and show the pages of the vCPU's LDT that are fit for it."""
    domain = vcpu.domain
    for page in range((vcpu.ldt_entries + 511) // 512):
        address = translate(vcpu, vcpu.ldt_va + page * PAGE_SIZE, READ)
        mfn = address >> 12
        if address >= 0 and not paging.get_page_and_type(domain, mfn, TYPE_SEGDESC):
            vcpu.ldt_frames[page] = mfn
            _map(vcpu, GDT_PAGES + page, mfn)
    if vcpu.cpu is not None:
        limit = vcpu.ldt_entries * 8 - 1 if vcpu.ldt_entries else 0
        vcpu.cpu.set_ldt(ldt_va(vcpu.vcpu_id), limit)
    vcpu.state.ldt_va = ldt_va(vcpu.vcpu_id)
    vcpu.state.ldt_limit = vcpu.ldt_entries * 8 - 1 if vcpu.ldt_entries else 0


def unload_ldt(vcpu: Vcpu) -> None:
    """Release the pages of the vCPU's LDT; its address and size stay."""
    frames, vcpu.ldt_frames = vcpu.ldt_frames, {}
    vcpu.forget_flat_pairs()
    for page, mfn in frames.items():
        _map(vcpu, GDT_PAGES + page, 0)
        paging.put_page_and_type(vcpu.domain, mfn)


def drop_ldt(domain: Domain) -> None:
    """A mapping of some descriptor page went away: no LDT may rest on it."""
    for vcpu in domain.vcpus:
        if vcpu.ldt_frames:
            unload_ldt(vcpu)
