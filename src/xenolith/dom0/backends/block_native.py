"""The block back-end's batches in native code (block.c), where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterable
from ctypes import c_bool, c_int16, c_int32, c_uint8, c_uint32, c_uint64
from errno import EIO
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Final, cast

from xenolith.abi import blkif
from xenolith.dom0 import rings
from xenolith.hypervisor import python_domain
from xenolith.hypervisor.python_domain import MAX_PINS, Pins
from xenolith.machine import native
from xenolith.machine.native import Fields

SOURCE: Final = Path(__file__).with_name("block.c")
BATCH: Final = 16  # requests
ENOUGH: Final = 256  # segments, after which a batch takes no more requests
MAX_INDIRECT_SEGMENTS: Final = 256  # 1 MiB a request
# What `serve` does next with a batch.
TAKE: Final = 0
GATHER: Final = 1
MOVE: Final = 2
RESPOND: Final = 3
PUSH: Final = 4
# What it leaves to Python.
IDLE: Final = 0  # nothing: an event will tell of more requests
LIES: Final = 1  # its producer index is impossible
PIN: Final = 2  # see GrantBatch
UNPIN: Final = 3
CARRY_OUT: Final = 4  # request number `at`
FAILED: Final = 5  # to tell of a failure of the storage
NOTIFY: Final = 6  # the front-end
MORE: Final = 7  # to call it again, after a look at what else there is to do
_log = logging.getLogger(__name__)


class BlockStatistics(ctypes.Structure):
    """What a device did since it was plugged in."""

    reads: int
    writes: int
    flushes: int
    discards: int
    read_bytes: int
    written_bytes: int
    errors: int

    _fields_: ClassVar[Fields] = tuple(
        (name, c_uint64) for name in ("reads", "writes", "flushes", "discards", "read_bytes", "written_bytes", "errors")
    )

    def values(self) -> list[int]:
        return [getattr(self, name) for name, _ in self._fields_]

    @classmethod
    def total(cls, statistics: Iterable[BlockStatistics]) -> BlockStatistics:
        """The sum of several devices'."""
        return cls(*map(sum, zip(*(each.values() for each in statistics), strict=True)))


class Request(ctypes.Structure):
    """A request of a batch's, as far as it was looked at."""

    raw: ctypes.Array[c_uint8]  # the entry's copy
    status: int
    error: int  # errno of the storage's failure
    cut_off: bool  # which was that the file ends before
    is_pythons: bool

    _fields_: ClassVar[Fields] = (
        ("id", c_uint64),
        ("sector", c_uint64),
        ("sectors", c_uint64),
        ("first_pin", c_uint32),
        ("segment_count", c_uint32),
        ("error", c_int32),
        ("status", c_int16),
        ("operation", c_uint8),
        ("indirect", c_bool),
        ("is_pythons", c_bool),
        ("cut_off", c_bool),
        ("raw", c_uint8 * blkif.REQUEST_SIZE),
    )


class Batch(ctypes.Structure):
    """Requests that are carried out together, and what there is of the disk."""

    count: int
    requests: ctypes.Array[Request]

    _fields_: ClassVar[Fields] = (
        ("ring", c_uint64),
        ("pins", c_uint64),
        ("granter", c_uint64),
        ("pin", c_uint64),  # see GrantBatch
        ("unpin", c_uint64),
        ("sectors", c_uint64),
        ("descriptor", c_int32),
        ("writable", c_bool),
        ("count", c_uint32),
        ("at", c_uint32),  # the request at hand
        ("stage", c_uint32),
        ("failures", c_uint32),  # requests in which the storage failed
        ("batches_left", c_uint32),  # that may be begun
        ("statistics", c_uint64),
        ("first", c_uint8 * MAX_PINS),  # sector, of each pinned frame
        ("length", c_uint8 * MAX_PINS),  # sectors
        ("requests", Request * BATCH),
    )


def declarations() -> str:
    """Of everything that block.c uses."""
    sizes = SimpleNamespace(
        SEGMENT_SIZE=blkif.SEGMENT.size,
        RESPONSE_SIZE=blkif.RESPONSE.size,
        INDIRECT_REFS=blkif.INDIRECT.size - 8 * 4,
        LARGEST=MAX_INDIRECT_SEGMENTS + 1,
        EIO=EIO,
    )
    call = "u32 (*{})(void *granter, struct pins *pins)"
    pointers = {
        "ring": "struct ring *{}",
        "pins": "struct pins *{}",
        "granter": "void *{}",
        "pin": call,
        "unpin": call,
        "statistics": "struct statistics *{}",
        "requests": "struct request {}[BATCH]",
    }
    return (
        "typedef i64 ssize_t;\n"
        + native.define(
            blkif,
            "BLKIF_OP_READ BLKIF_OP_WRITE BLKIF_OP_INDIRECT BLKIF_MAX_SEGMENTS_PER_REQUEST SECTORS_PER_PAGE "
            "SECTOR_SIZE SEGMENTS",
        )
        + f"#define BLKIF_RSP_OKAY {blkif.BLKIF_RSP_OKAY}\n#define BLKIF_RSP_ERROR ({blkif.BLKIF_RSP_ERROR})\n"
        + native.define(
            sys.modules[__name__],
            "BATCH ENOUGH MAX_INDIRECT_SEGMENTS TAKE GATHER MOVE RESPOND PUSH "
            "IDLE LIES PIN UNPIN CARRY_OUT FAILED NOTIFY MORE",
        )
        + native.define(sizes, " ".join(vars(sizes)))
        + native.define(python_domain, "MAX_PINS IS_PINNED")
        + rings.declarations()
        + native.declare("pins", Pins)
        + native.declare("statistics", BlockStatistics)
        + native.declare("request", Request)
        + native.declare("batch", Batch, pointers)
    )


@functools.cache
def _loaded() -> Callable[[int], int] | None:
    try:
        serve = ctypes.CDLL(str(native.build(SOURCE, declarations(), (rings.SOURCE,)))).serve
    except (native.Missing, OSError) as missing:
        _log.info("no native block back-end: %s", missing)
        return None
    serve.restype, serve.argtypes = c_int32, (c_uint64,)
    return cast(Callable[[int], int], serve)


def function() -> Callable[[int], int] | None:
    """`serve` of block.c, which takes the address of a Batch and answers IDLE to MORE.

    None without native code, of the hypervisor's as well: `serve` has nothing else to pin frames with.
    """
    return _loaded() if native.missing() is None and python_domain.pins_natively() else None
