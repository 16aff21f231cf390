"""ELF notes by which a guest kernel tells the domain builder how it wants to be started (public/elfnote.h).

A note is three 32-bit words (name bytes, descriptor bytes, type), then name and descriptor, each padded to
four bytes. The name is "Xen"; a descriptor is a NUL-terminated string or one little-endian number.
"""

from enum import IntEnum
from typing import Final

from xenolith.abi import hypercalls as xen

NOTE_NAME: Final = b"Xen"
NOTE_HEADER: Final = "<III"  # name bytes, descriptor bytes, type
NOTE_ALIGNMENT: Final = 4

XEN_VERSION: Final = "xen-3.0"  # the only interface version there ever was
GENERIC_LOADER: Final = "generic"


class ElfNote(IntEnum):
    """Types of the notes named "Xen"."""

    INFO = 0
    ENTRY = 1
    HYPERCALL_PAGE = 2
    VIRT_BASE = 3
    PADDR_OFFSET = 4
    XEN_VERSION = 5
    GUEST_OS = 6
    GUEST_VERSION = 7
    LOADER = 8
    PAE_MODE = 9
    FEATURES = 10
    BSD_SYMTAB = 11
    HV_START_LOW = 12
    L1_MFN_VALID = 13
    SUSPEND_CANCEL = 14
    INIT_P2M = 15
    MOD_START_PFN = 16
    SUPPORTED_FEATURES = 17
    PHYS32_ENTRY = 18
    PHYS32_RELOC = 19


class Feature(IntEnum):
    """Features that a kernel can name in its notes, by their bit numbers (public/features.h).

    A name that is missing here means nothing to a PV domain: it may be supported, but not required.
    """

    writable_page_tables = xen.XENFEAT_writable_page_tables
    writable_descriptor_tables = xen.XENFEAT_writable_descriptor_tables
    auto_translated_physmap = xen.XENFEAT_auto_translated_physmap
    supervisor_mode_kernel = xen.XENFEAT_supervisor_mode_kernel
    pae_pgdir_above_4gb = xen.XENFEAT_pae_pgdir_above_4gb
    mmu_pt_update_preserve_ad = xen.XENFEAT_mmu_pt_update_preserve_ad
    gnttab_map_avail_bits = xen.XENFEAT_gnttab_map_avail_bits
    dom0 = xen.XENFEAT_dom0
