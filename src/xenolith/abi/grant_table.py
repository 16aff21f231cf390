"""Grant tables as data: entries, status codes, flags and the structures of grant_table_op (public/grant_table.h)."""

from struct import Struct
from typing import Final

# --- entries -----------------------------------------------------------------------------------------
# Version 1: u16 flags, u16 domid, u32 frame.  Version 2, whose marks are in a word of its own (grant_status_t):
# u16 flags, u16 domid, and u32, u64 frame, or u16 offset, u16 length, u64 frame (GTF_sub_page),
# or u16 domid, u16, u32 reference (GTF_transitive).
GRANT_ENTRY_SIZES: Final = {1: 8, 2: 16}
GRANT_ENTRIES_PER_FRAME: Final = 512  # of version 1
GRANT_STATUS_PER_FRAME: Final = 2048
GNTTAB_NR_RESERVED_ENTRIES: Final = 8
GTF_invalid: Final = 0
GTF_permit_access: Final = 1
GTF_accept_transfer: Final = 2
GTF_transitive: Final = 3
GTF_type_mask: Final = 3
GTF_readonly: Final = 1 << 2
GTF_reading: Final = 1 << 3
GTF_writing: Final = 1 << 4
GTF_sub_page: Final = 1 << 8

GNTTAB_RESERVED_CONSOLE: Final = 0  # what a domain's builder grants to dom0
GNTTAB_RESERVED_XENSTORE: Final = 1

# --- status of one operation -------------------------------------------------------------------------
GNTST_okay: Final = 0
GNTST_general_error: Final = -1
GNTST_bad_domain: Final = -2
GNTST_bad_gntref: Final = -3
GNTST_bad_handle: Final = -4
GNTST_bad_virt_addr: Final = -5
GNTST_bad_dev_addr: Final = -6
GNTST_no_device_space: Final = -7
GNTST_permission_denied: Final = -8
GNTST_bad_page: Final = -9
GNTST_bad_copy_arg: Final = -10
GNTST_address_too_big: Final = -11
GNTST_eagain: Final = -12

# --- flags -------------------------------------------------------------------------------------------
GNTMAP_device_map: Final = 1 << 0
GNTMAP_host_map: Final = 1 << 1
GNTMAP_readonly: Final = 1 << 2
GNTMAP_application_map: Final = 1 << 3
GNTMAP_contains_pte: Final = 1 << 4
GNTMAP_guest_avail_shift: Final = 16  # bits for the entry's own use, from here on
GNTCOPY_source_gref: Final = 1 << 0
GNTCOPY_dest_gref: Final = 1 << 1

# --- structures --------------------------------------------------------------------------------------
SETUP_TABLE: Final = Struct("<HxxIh6xQ")  # dom, nr_frames, status, frame_list (a pointer)
SETUP_TABLE_STATUS: Final = 8
QUERY_SIZE: Final = Struct("<HxxIIhxx")  # dom, nr_frames, max_nr_frames, status
MAP_GRANT_REF: Final = Struct("<QIIHhIQ")  # host_addr, flags, ref, dom, status, handle, dev_bus_addr
MAP_GRANT_REF_ANSWER: Final = Struct("<hIQ")  # status, handle, dev_bus_addr
MAP_GRANT_REF_STATUS: Final = 18
UNMAP_GRANT_REF: Final = Struct("<QQIhxx")  # host_addr, dev_bus_addr, handle, status
UNMAP_GRANT_REF_STATUS: Final = 20
UNMAP_AND_REPLACE: Final = Struct("<QQIhxx")  # host_addr, new_addr, handle, status
COPY: Final = Struct("<QHH4xQHH4xHHhxx")  # source: ref or frame, dom, offset; dest likewise; len, flags, status
COPY_STATUS: Final = 36
TRANSFER: Final = Struct("<QHxxIh6x")  # mfn, dom, ref, status
TRANSFER_STATUS: Final = 16
SWAP_GRANT_REF: Final = Struct("<IIhxx")  # ref_a, ref_b, status
SWAP_GRANT_REF_STATUS: Final = 8
GET_VERSION: Final = Struct("<HxxI")  # dom, version
GET_STATUS_FRAMES_STATUS: Final = 6
GET_STATUS_FRAMES: Final = Struct("<IHhQ")  # nr_frames, dom, status, frame_list (a pointer)
CACHE_FLUSH: Final = Struct("<QHHI")  # address or ref, offset, length, operation
