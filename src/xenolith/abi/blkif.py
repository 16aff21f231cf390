"""The block-device protocol as data (public/io/blkif.h, the 64-bit layout)."""

from struct import Struct
from typing import Final

PROTOCOL: Final = "x86_64-abi"
SECTOR_SIZE: Final = 512  # the protocol's unit, whatever the device's
SECTORS_PER_PAGE: Final = 8

BLKIF_OP_READ: Final = 0
BLKIF_OP_WRITE: Final = 1
BLKIF_OP_WRITE_BARRIER: Final = 2
BLKIF_OP_FLUSH_DISKCACHE: Final = 3
BLKIF_OP_DISCARD: Final = 5
BLKIF_OP_INDIRECT: Final = 6

BLKIF_RSP_OKAY: Final = 0
BLKIF_RSP_ERROR: Final = -1
BLKIF_RSP_EOPNOTSUPP: Final = -2

BLKIF_DISCARD_SECURE: Final = 1

BLKIF_MAX_SEGMENTS_PER_REQUEST: Final = 11
BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST: Final = 8
SEGMENTS_PER_INDIRECT_PAGE: Final = 512

VDISK_CDROM: Final = 1  # of the node "info"
VDISK_REMOVABLE: Final = 2
VDISK_READONLY: Final = 4

REQUEST_SIZE: Final = 112  # also of a ring entry
REQUEST: Final = Struct("<BBHxxxxQQ")  # operation, nr_segments, handle, id, sector_number
DISCARD: Final = Struct("<BBHxxxxQQQ")  # operation, flag, handle, id, sector_number, nr_sectors
INDIRECT: Final = Struct("<BBHxxxxQQH2x8I")  # operation, indirect_op, nr_segments, id, sector_number, handle, grefs
SEGMENTS: Final = 24  # where a request's segments begin
SEGMENT: Final = Struct("<IBBxx")  # gref, first_sect, last_sect
RESPONSE: Final = Struct("<QBxh4x")  # id, operation, status
