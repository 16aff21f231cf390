"""The network protocol as data (public/io/netif.h)."""

from struct import Struct
from typing import Final

NETTXF_csum_blank: Final = 1  # the checksum field holds the pseudo-header's sum alone
NETTXF_data_validated: Final = 2
NETTXF_more_data: Final = 4  # the packet goes on in the next request
NETTXF_extra_info: Final = 8  # the next entry is extra information
NETTXF_ALL: Final = 15

NETRXF_data_validated: Final = 1
NETRXF_csum_blank: Final = 2
NETRXF_more_data: Final = 4
NETRXF_extra_info: Final = 8

NETIF_RSP_NULL: Final = 1
NETIF_RSP_OKAY: Final = 0
NETIF_RSP_ERROR: Final = -1
NETIF_RSP_DROPPED: Final = -2

NETIF_EXTRA_TYPE_GSO: Final = 1
NETIF_EXTRA_FLAG_MORE: Final = 1
NETIF_GSO_TYPE_TCPV4: Final = 1

NETIF_NR_SLOTS_MIN: Final = 18  # that each side takes for one packet
ENTRIES: Final = 256  # of both rings

TX_ENTRY_SIZE: Final = 12
TX_REQUEST: Final = Struct("<IHHHH")  # gref, offset, flags, id, size (of the first: of the whole packet)
TX_RESPONSE: Final = Struct("<Hh")  # id, status
RX_ENTRY_SIZE: Final = 8
RX_REQUEST: Final = Struct("<HxxI")  # id, gref
RX_RESPONSE: Final = Struct("<HHHh")  # id, offset, flags, status: the length
EXTRA_GSO: Final = Struct("<BBHBBH")  # type, flags, gso size, gso type, pad, gso features
