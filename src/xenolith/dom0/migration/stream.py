"""The format in which a domain travels: a file that `xl save` writes, or what goes between two daemons.

docs/relocation.md describes it.  A magic number and a version are followed by sections, each with a header of
fixed size; numbers are little-endian.  Pages are said at the machine frame numbers that they have, as often as one
likes: the last counts.  What is never said is zero.

Whoever reads trusts nothing: lengths are checked before anything is read or made room for.
"""

from __future__ import annotations

import json
import os
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenolith.hypervisor.domain_record.frames import FrameRecord
from xenolith.hypervisor.domain_record.kinds import Plain, RecordError

MAGIC: Final = b"Xen saved domain"  # xendomains restores files that begin so
VERSION: Final = 1
_PREAMBLE: Final = Struct("<16sII")  # magic, version, reserved
_SECTION: Final = Struct("<IIQQQ")  # kind, flags, bytes that follow, bytes when unpacked, first MFN (PAGES)
_COUNTS: Final = Struct("<4Q")

# Kinds of sections.
DESCRIPTION: Final = 1  # JSON: what the toolstack needs to make the domain
PAGES: Final = 2
FRAMES: Final = 3
STATE: Final = 4  # JSON: the records of the hypervisor and of dom0's services
END: Final = 5
GO: Final = 6  # between daemons: the domain is the receiver's
SERIES: Final = 7  # JSON: what series of checkpoints this is one of; the first section of those
# Of a protection, which has no end but the last of these:
BLOCKS: Final = 8  # of a disk; the place is its number << 36 | the number of the first block of 4 KiB
EPOCH: Final = 9  # the place is its number: all before this belongs together
DISMISS: Final = 10  # the domain needs no protection any more

ZSTD: Final = 1  # flag: the section is one frame of zstd
LEVEL: Final = 1
_NOT_SAID: Final = -1  # by a frame of zstd, how long it is when unpacked
MOST_PAGES: Final = 1024  # in a section
MOST_JSON: Final = 64 << 20
MOST_FRAMES: Final = 1 << 36


class Section(NamedTuple):
    """A section's header."""

    kind: int
    flags: int
    stored: int
    raw: int
    first: int


class Writer:
    """Writes a stream; with `compress`, what gets smaller by it is compressed."""

    def __init__(self, out: BinaryIO, compress: bool = False, preamble: bool = True) -> None:
        self._out = out
        self._compressor = zstandard.ZstdCompressor(level=LEVEL) if compress else None
        self.pages_written = 0
        if preamble:
            out.write(_PREAMBLE.pack(MAGIC, VERSION, 0))

    def json(self, kind: int, plain: Plain) -> None:
        self.section(kind, json.dumps(plain, separators=(",", ":")).encode())

    def pages(self, first: int, contents: memoryview) -> None:
        """Consecutive frames, at most MOST_PAGES."""
        self.pages_written += len(contents) >> PAGE_SHIFT
        self.section(PAGES, contents, first)

    def frames(self, frames: FrameRecord) -> None:
        mfns = frames.mfns
        starts = np.flatnonzero(np.diff(mfns, prepend=mfns[0] - np.uint64(2)) != 1)
        lengths = np.diff(starts, append=len(mfns)).astype(np.uint64)
        runs = np.stack((mfns[starts], lengths), axis=1)
        counts = _COUNTS.pack(len(runs), len(mfns), len(frames.pinned), len(frames.given_up))
        arrays = (runs, frames.pfns, frames.pinned, frames.levels, frames.given_up)
        self.section(FRAMES, counts + b"".join(array.astype("<u8").tobytes() for array in arrays))

    def end(self) -> None:
        self.section(END, b"")
        self.flush()

    def flush(self) -> None:
        self._out.flush()

    def section(self, kind: int, payload: bytes | memoryview, first: int = 0) -> None:
        flags, raw = 0, len(payload)
        if self._compressor is not None and raw:
            packed = self._compressor.compress(payload)
            if len(packed) < raw:
                flags, payload = ZSTD, packed
        self._out.write(_SECTION.pack(kind, flags, len(payload), raw, first))
        self._out.write(payload)


class Reader:
    """Reads a stream. Methods raise RecordError where it is none."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        magic, version, _ = _PREAMBLE.unpack(self._read(_PREAMBLE.size))
        if magic != MAGIC:
            raise RecordError("it is no saved domain")
        if version != VERSION:
            raise RecordError(f"it is in version {version} of the format; this is version {VERSION}")

    def next(self) -> Section:
        """The header of the next section, which has to be read next."""
        return Section._make(_SECTION.unpack(self._read(_SECTION.size)))

    def expect(self, kind: int) -> Section:
        section = self.next()
        if section.kind != kind:
            raise RecordError(f"a section of kind {section.kind} comes where one of kind {kind} belongs")
        return section

    def json(self, section: Section) -> Plain:
        try:
            return json.loads(self.payload(section, MOST_JSON))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"section {section.kind} is not JSON: {error}") from None

    def payload(self, section: Section, most: int) -> bytes:
        """What a section holds, `most` bytes of it at most."""
        room = bytearray(self._checked_length(section, most))
        self._into(section, memoryview(room))
        return bytes(room)

    def pages(self, section: Section, memory: memoryview, frames: int) -> tuple[int, int]:
        """Put a section's pages into memory of so many frames; the first MFN and how many."""
        first, count = self.check_pages(section, frames)
        self._into(section, memory[first << PAGE_SHIFT : (first + count) << PAGE_SHIFT])
        return first, count

    def check_pages(self, section: Section, frames: int) -> tuple[int, int]:
        """The first MFN of a section of pages of a domain with so many frames, and how many pages."""
        length = self._checked_length(section, MOST_PAGES * PAGE_SIZE)
        count, first = length >> PAGE_SHIFT, section.first
        if length % PAGE_SIZE or not count or not 1 <= first <= frames - count:
            raise RecordError(f"{length} bytes at frame {first:#x} are no pages of a domain with {frames} frames")
        return first, count

    def page_places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Section]:
        """The MFNs of all pages that the next sections of a file say, where in the file each page stands, and the
        section after them. Compressed ones are refused.
        """
        mfns: list[npt.NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        places = list(mfns)
        while (section := self.next()).kind == PAGES:
            length = self._checked_length(section, MOST_PAGES * PAGE_SIZE)
            if length % PAGE_SIZE or not length or section.first >= MOST_FRAMES or section.flags:
                raise RecordError(f"{length} bytes at frame {section.first:#x} are no pages of a checkpoint")
            pages = np.arange(length >> PAGE_SHIFT)
            mfns.append(section.first + pages)
            places.append(self._source.tell() + (pages << PAGE_SHIFT))
            self._source.seek(length, os.SEEK_CUR)
        return np.concatenate(mfns), np.concatenate(places), section

    def bytes_at(self, place: int, count: int) -> bytes:
        """What stands at a place of a file that can be sought; it goes on being read where it was."""
        here = self._source.tell()
        self._source.seek(place)
        data = self._read(count)
        self._source.seek(here)
        return data

    def frames(self, section: Section, frames: int) -> FrameRecord:
        """The list of a domain's frames, whose machine has so many."""
        payload = self.payload(section, _COUNTS.size + 8 * 6 * (frames + 1))
        if len(payload) < _COUNTS.size:
            raise RecordError("the list of its frames is cut off")
        run_count, count, pinned, given_up = _COUNTS.unpack_from(payload)
        lengths = (2 * run_count, count, pinned, pinned, given_up)
        if count > frames or sum(lengths) * 8 != len(payload) - _COUNTS.size:
            raise RecordError("the list of its frames is not as long as it says")
        words = np.frombuffer(payload, dtype="<u8", offset=_COUNTS.size).astype(np.uint64)
        flat, pfns, pins, levels, gone = np.split(words, np.cumsum(lengths)[:-1])
        firsts, sizes = flat[0::2], flat[1::2]
        if (sizes > frames).any() or (firsts > frames).any() or int(sizes.sum()) != count:
            raise RecordError("the list of its frames has runs that are none")
        starts = np.cumsum(sizes) - sizes
        mfns = np.repeat(firsts - starts, sizes.astype(np.int64)) + np.arange(count, dtype=np.uint64)
        return FrameRecord(mfns, pfns, pins, levels, gone)

    def _checked_length(self, section: Section, most: int) -> int:
        if section.flags & ~ZSTD or section.raw > most or section.stored > most:
            raise RecordError(f"a section of kind {section.kind} and {section.stored} bytes is no such section")
        if not section.flags and section.stored != section.raw:
            raise RecordError("a section says two lengths")
        return section.raw

    def _into(self, section: Section, room: memoryview) -> None:
        if not section.flags:
            self._fill(room)
            return
        packed = self._read(section.stored)
        try:
            if zstandard.frame_content_size(packed) not in (len(room), _NOT_SAID):  # room is made for what it says
                raise RecordError("a section has another length when it is unpacked than it says")
            unpacked = zstandard.ZstdDecompressor().decompress(packed, max_output_size=len(room))
        except zstandard.ZstdError as error:
            raise RecordError(f"a section cannot be unpacked: {error}") from None
        if len(unpacked) != len(room):
            raise RecordError("a section has another length when it is unpacked than it says")
        room[:] = unpacked

    def _read(self, count: int) -> bytes:
        room = bytearray(count)
        self._fill(memoryview(room))
        return bytes(room)

    def _fill(self, room: memoryview) -> None:
        while len(room):
            count = self._source.readinto(room)  # type: ignore[attr-defined]
            if not count:
                raise RecordError("it is cut off")
            room = room[count:]
