"""Series of checkpoints as files: each says which it is, and which one it goes on from.

A checkpoint is a stream (`stream`) with a section of its own at the beginning. Its pages are those that changed since
its base; whoever reads it reads the pages of its bases first, the oldest before all others, for the last counts.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Final, Self

import numpy as np

from xenolith.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenolith.dom0.migration import stream
from xenolith.dom0.migration.stream import MOST_PAGES, Reader, Section, Writer
from xenolith.hypervisor.domain_record.kinds import U32, U64, Listing, Plain, Record, RecordError, Text

MOST_BASES: Final = 256  # files that are opened together
MOST_DISKS: Final = 1024
_MOST_NAME: Final = 255
_MOST_PATH: Final = 4096

OpenBase = Callable[[str], BinaryIO]
"""Opens a checkpoint by the name of its file, which is in the same directory. Raises OSError."""


@dataclass(frozen=True)
class Series:
    """What a checkpoint says at its beginning.

    `disks`: of each disk (by virtual device number) the file that keeps what it held. `base` and `base_ident`: the file
    name and the identity of the checkpoint that this one goes on from; empty where it has all itself.
    """

    number: int
    taken: int  # seconds since the epoch
    ident: str
    base: str = ""
    base_ident: str = ""
    disks: tuple[tuple[int, str], ...] = ()

    def plain(self) -> Plain:
        """As JSON can say it."""
        return {**vars(self), "disks": [[str(number), path] for number, path in self.disks]}

    @classmethod
    def of(cls, plain: Plain) -> Self:
        """Read one back. Raises RecordError."""
        record = Record(plain, "the series")
        base = record.get("base", Text(_MOST_NAME))
        if base and (Path(base).name != base or base.startswith(".")):
            raise RecordError("a checkpoint's base is in another directory")
        return cls(
            record.get("number", U32),
            record.get("taken", U64),
            record.get("ident", Text(_MOST_NAME)),
            base,
            record.get("base_ident", Text(_MOST_NAME)),
            tuple(map(_disk, record.get("disks", Listing(Listing(Text(_MOST_PATH), 2), MOST_DISKS)))),
        )


def _disk(pair: list[str]) -> tuple[int, str]:
    if len(pair) != 2 or not pair[0].isascii() or not pair[0].isdigit() or len(pair[0]) > 10 or "\0" in pair[1]:
        raise RecordError("a checkpoint's disk is none")
    return int(pair[0]), pair[1]


def new_ident() -> str:
    return secrets.token_hex(16)


def read_series(reader: Reader) -> Series:
    """What a file says at its beginning. Raises RecordError where it is no checkpoint."""
    section = reader.next()
    if section.kind != stream.SERIES:
        raise RecordError("it is a saved domain, but no checkpoint")
    return Series.of(reader.json(section))


@contextmanager
def bases(series: Series, open_base: OpenBase) -> Iterator[list[Reader]]:
    """The checkpoints below one, the oldest first, each read as far as its series. Raises RecordError."""
    with ExitStack() as files:
        found: list[Reader] = []
        while series.base:
            if len(found) == MOST_BASES:
                raise RecordError(f"it has more than {MOST_BASES} bases")
            try:
                reader = Reader(files.enter_context(open_base(series.base)))
                below = read_series(reader)
            except OSError as error:
                raise RecordError(f"its base {series.base} cannot be read: {error.strerror}") from error
            if below.ident != series.base_ident:
                raise RecordError(f"{series.base} is not the checkpoint that it goes on from")
            found.append(reader)
            series = below
        found.reverse()
        yield found


def join(file: BinaryIO, out: BinaryIO, open_base: OpenBase) -> None:
    """Write a checkpoint once more, with all that it takes from its bases. Raises RecordError and OSError."""
    reader = Reader(file)
    series = read_series(reader)
    writer = Writer(out)
    whole = Series(series.number, series.taken, series.ident, disks=series.disks)
    writer.json(stream.SERIES, whole.plain())
    section = reader.expect(stream.DESCRIPTION)
    writer.section(stream.DESCRIPTION, reader.payload(section, stream.MOST_JSON))
    with bases(series, open_base) as below:
        for each in below:
            each.json(each.expect(stream.DESCRIPTION))
        section = _join_pages([*below, reader], writer)
    writer.section(stream.FRAMES, reader.payload(section, section.raw))
    for kind in (stream.STATE, stream.END):
        section = reader.expect(kind)
        writer.section(kind, reader.payload(section, stream.MOST_JSON))
    writer.flush()


def _join_pages(readers: Sequence[Reader], writer: Writer) -> Section:
    """Write of each frame what is said of it last; the section after the pages of the last reader."""
    said = [reader.page_places() for reader in readers]
    mfns = np.concatenate([mfns for mfns, _, _ in said])
    places = np.concatenate([places for _, places, _ in said])
    owners = np.concatenate([np.full(len(mfns), number) for number, (mfns, _, _) in enumerate(said)])
    _, from_behind = np.unique(mfns[::-1], return_index=True)
    last = len(mfns) - 1 - from_behind
    mfns, places, owners = mfns[last], places[last], owners[last]
    breaks = (np.diff(mfns) != 1) | (np.diff(places) != PAGE_SIZE) | (np.diff(owners) != 0)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(mfns)]
    for begin, end in pairwise(bounds):
        for at in range(begin, end, MOST_PAGES):
            size = min(end - at, MOST_PAGES) << PAGE_SHIFT
            writer.pages(int(mfns[at]), memoryview(readers[owners[at]].bytes_at(int(places[at]), size)))
    return said[-1][2]
