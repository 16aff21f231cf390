"""The xenstore wire protocol: message header, operation numbers, error names, limits and the guest's ring page.

A xenstore conversation is a stream of messages, each a 16-byte header (:data:`HEADER`) followed by at most
:data:`PAYLOAD_MAX` bytes. A reply repeats its request's ``req_id`` and ``tx_id``. The stream runs over a UNIX socket
(tools in dom0) or over a page shared with a guest, which holds one byte ring for each direction.
Source: Xen's public header ``io/xs_wire.h`` and ``docs/misc/xenstore.txt``, ``xenstore-ring.txt``.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final


class Op(IntEnum):
    """Message types (``enum xsd_sockmsg_type``). 20 was XS_RESTRICT and stays unused."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


HEADER: Final = Struct("<IIII")
"""type, req_id, tx_id, len (bytes of payload after the header)."""

PAYLOAD_MAX: Final = 4096
ABS_PATH_MAX: Final = 3072
REL_PATH_MAX: Final = 2048

ERROR_NAMES: Final[frozenset[str]] = frozenset(
    {
        "EINVAL",
        "EACCES",
        "EEXIST",
        "EISDIR",
        "ENOENT",
        "ENOMEM",
        "ENOSPC",
        "EIO",
        "ENOTEMPTY",
        "ENOSYS",
        "EROFS",
        "EBUSY",
        "EAGAIN",
        "EISCONN",
        "E2BIG",
        "EPERM",
    }
)
"""The error names that may travel in an ERROR message (``xsd_errors``)."""


# struct xenstore_domain_interface: the page shared with a guest.
RING_SIZE: Final = 1024
"""Bytes in each ring; indices run freely (mod 2**32) and are masked on use."""
REQ_RING: Final = 0
RSP_RING: Final = 1024
INDEX: Final = Struct("<I")
REQ_CONS: Final = 2048
REQ_PROD: Final = 2052
RSP_CONS: Final = 2056
RSP_PROD: Final = 2060
SERVER_FEATURES: Final = 2064
CONNECTION: Final = 2068
ERROR: Final = 2072
INTERFACE_PAGE_SIZE: Final = 4096

SERVER_FEATURE_RECONNECTION: Final = 1
SERVER_FEATURE_ERROR: Final = 2


class Connection(IntEnum):
    """The ``connection`` field: the guest asks for a fresh start, the server confirms."""

    CONNECTED = 0
    RECONNECT = 1


class RingError(IntEnum):
    """The ``error`` field: why the server has stopped listening to this ring."""

    NONE = 0
    COMM = 1
    RINGIDX = 2
    PROTO = 3
