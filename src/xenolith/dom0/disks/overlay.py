"""A copy-on-write overlay: only the blocks that were changed of another disk.

An overlay is a sparse file: a header that names the disk below (its backing), a bitmap with a bit for each block of
4 KiB that the overlay has, and the blocks, each at its own place.  What it does not have is read from the backing,
which is never written and may be an overlay again; so any number of disks can share one base.

A snapshot of a running disk takes constant time: an empty overlay takes the file's name, and what there was stays as
its backing under a name of its own.  In memory a table has for each block the layer it is in, which a new layer on top
leaves as it is.

A flush that returned holds, whatever dies afterwards.  Data goes to its place at once, but its bit is set on the file
by the next flush, after the data has reached stable storage, and the flush returns after the bit has too.  Dying
before, a block has what it had at the last flush or what was written since, as on a disk with a write cache.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from xenolith.dom0.disks import SECTOR, Buffers, Disk, DiskError, DiskFormat, DiskSource, cut, rest
from xenolith.dom0.disks.raw import WHOLE, RawDisk

BLOCK: Final = 4096
SHIFT: Final = 12
HEADER_BYTES: Final = 4096
MAX_LAYERS: Final = 255
MAX_SECTORS: Final = 1 << 35  # 16 TiB, whose bitmap takes 512 MiB of this process
_MAGIC: Final = b"Xenolith overlay 1\n"
_BITMAP_PAGE: Final = 4096
_TABLE_PIECE: Final = 1 << 16
_COPIED_AT_ONCE: Final = 256  # blocks

OpenDisk = Callable[[DiskSource], Disk]


@dataclass(frozen=True)
class Header:
    """What the first page of an overlay says."""

    sectors: int
    backing: str | None  # a path, relative to the overlay's directory if it is; None: zeros
    backing_format: DiskFormat

    @property
    def blocks(self) -> int:
        return -(-self.sectors * SECTOR // BLOCK)

    @property
    def bitmap_bytes(self) -> int:
        return -(-self.blocks // 8)

    @property
    def data(self) -> int:
        """Where block 0 is in the file."""
        return HEADER_BYTES + -(-self.bitmap_bytes // _BITMAP_PAGE) * _BITMAP_PAGE

    @property
    def file_size(self) -> int:
        return self.data + self.blocks * BLOCK

    def encode(self) -> bytes:
        """Raises DiskError."""
        text = json.dumps(
            {"sectors": self.sectors, "backing": self.backing, "format": self.backing_format}, ensure_ascii=True
        )
        if len(_MAGIC) + len(text) > HEADER_BYTES:
            raise DiskError("the name of the backing is too long for an overlay's header")
        return (_MAGIC + text.encode()).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def decode(cls, page: bytes, path: Path) -> Header:
        """Raises DiskError."""
        if not page.startswith(_MAGIC):
            raise DiskError(f"{path} is no overlay of this version of Xenolith")
        try:
            record = json.loads(page[len(_MAGIC) :].rstrip(b"\0"))
            backing = record["backing"]
            named = None if backing is None else str(backing)
            header = cls(int(record["sectors"]), named, DiskFormat(record["format"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DiskError(f"{path} has a damaged header: {error}") from error
        if not 0 < header.sectors <= MAX_SECTORS:
            raise DiskError(f"{path} has a damaged header: {header.sectors} sectors")
        return header


def create_overlay(path: Path, backing: DiskSource | None, sectors: int) -> None:
    """Make an overlay that as yet has nothing. Raises DiskError; FileExistsError is one too."""
    if sectors > MAX_SECTORS:
        raise DiskError(f"the overlay {path} would have {sectors} sectors, and no more than {MAX_SECTORS} are possible")
    header = Header(
        sectors,
        None if backing is None else str(backing.path),
        DiskFormat.RAW if backing is None else backing.format,
    )
    data = header.encode()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            os.truncate(descriptor, header.file_size)
            os.pwrite(descriptor, data, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_directory(path.parent)
    except OSError as error:
        raise DiskError(f"cannot create the overlay {path}: {error.strerror}") from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class _Layer:
    """An overlay's file."""

    file: RawDisk
    header: Header

    @classmethod
    def open(cls, path: Path, writable: bool) -> _Layer:
        """Raises DiskError."""
        file = RawDisk(path, writable)
        try:
            if file.sectors * SECTOR < HEADER_BYTES:
                raise DiskError(f"{path} is no overlay: it is too short")
            page = bytearray(HEADER_BYTES)
            file.read(0, [memoryview(page)])
            header = Header.decode(bytes(page), path)
            if file.sectors * SECTOR < header.file_size:
                raise DiskError(f"{path} has been cut off")
            return cls(file, header)
        except OSError as error:
            file.close()
            raise DiskError(f"cannot read {path}: {error}") from error
        except DiskError:
            file.close()
            raise

    def bitmap(self) -> bytearray:
        """A copy of it."""
        bits = bytearray(self.header.bitmap_bytes)
        self.file.read(HEADER_BYTES, [memoryview(bits)])
        return bits

    def backing(self) -> DiskSource | None:
        if self.header.backing is None:
            return None
        return DiskSource(
            path=self.file.path.parent / self.header.backing, format=self.header.backing_format, writable=False
        )


class OverlayDisk:
    """A disk that is an overlay, the overlays below it, and a base below these."""

    physical_sector_size: Final = BLOCK

    def __init__(self, base: Disk | None, layers: list[_Layer], writable: bool, discard: bool, keeps: bool) -> None:
        """`layers` from the lowest to the one that is written. Without `keeps` a flush has nothing to do."""
        self.writable: Final = writable
        self.discard_granularity: Final = BLOCK if discard and writable else 0
        self._base: Final = base
        self._base_bytes: Final = base.sectors * SECTOR if base else 0
        self._layers: Final = layers
        self._keeps: Final = keeps
        self._lock: Final = threading.Lock()  # of _pending, and of copying parts of blocks up
        self._flushing: Final = threading.Lock()
        # By block: 0 the base, 1 the lowest layer, ... Pages of it that are not touched take no memory.
        self._layer_of: Final = mmap.mmap(-1, layers[-1].header.blocks)
        self._pending: list[tuple[int, int]] = []  # blocks from .. to that the file's bitmap does not have yet
        self._bitmap = bytearray()
        table = np.frombuffer(self._layer_of, dtype=np.uint8)
        for number, layer in enumerate(layers, start=1):
            self._bitmap = layer.bitmap()[: -(-len(table) // 8)]
            bits = np.frombuffer(self._bitmap, dtype=np.uint8)
            for start in np.unique(np.flatnonzero(bits) // _BITMAP_PAGE) * _BITMAP_PAGE:
                blocks = np.flatnonzero(np.unpackbits(bits[start : start + _BITMAP_PAGE], bitorder="little"))
                table[blocks[blocks + int(start) * 8 < len(table)] + int(start) * 8] = number

    @classmethod
    def open(cls, path: Path, writable: bool, discard: bool, open_base: OpenDisk) -> Self:
        """`open_base` opens what the lowest overlay is of. Raises DiskError."""
        layers: list[_Layer] = []
        base: Disk | None = None
        try:
            layers.append(_Layer.open(path, writable))
            while (backing := layers[0].backing()) is not None:
                if backing.format is not DiskFormat.OVERLAY:
                    base = open_base(backing)
                    break
                if len(layers) == MAX_LAYERS:
                    raise DiskError(f"{path} has more than {MAX_LAYERS} overlays below it")
                layers.insert(0, _Layer.open(backing.path, False))
            return cls(base, layers, writable, discard, keeps=True)
        except BaseException:
            for layer in layers:
                layer.file.close()
            if base is not None:
                base.close()
            raise

    @classmethod
    def over(cls, base: Disk, discard: bool = True) -> Self:
        """An overlay of an open disk that is gone when it is closed, in the directory for temporary files."""
        with tempfile.TemporaryDirectory(prefix="xenolith-") as directory:
            path = Path(directory, "overlay")
            create_overlay(path, None, base.sectors)
            return cls(base, [_Layer.open(path, True)], True, discard, keeps=False)

    @property
    def sectors(self) -> int:
        return self._layers[-1].header.sectors

    def measure(self) -> None:
        """Its header says how large it is."""

    # --- reading ---------------------------------------------------------------------------------------

    def _runs(self, position: int, length: int) -> Iterator[tuple[int, int, int]]:
        """A range by layers: layer, position, length."""
        end = position + length
        layers = self._layer_of[position >> SHIFT : (end - 1 >> SHIFT) + 1]
        if layers.count(layers[0]) == len(layers):
            yield layers[0], position, length
            return
        block = position >> SHIFT
        for layer, run in groupby(layers):
            block += sum(1 for _ in run)
            until = min(block << SHIFT, end)
            yield layer, position, until - position
            position = until

    def read(self, position: int, buffers: Buffers) -> None:
        for layer, place, count in self._runs(position, sum(map(len, buffers))):
            self._read_layer(layer, place, cut(buffers, count))
            buffers = rest(buffers, count)

    def _read_layer(self, number: int, position: int, buffers: Buffers) -> None:
        if number:
            layer = self._layers[number - 1]
            layer.file.read(layer.header.data + position, buffers)
            return
        inside = max(min(self._base_bytes - position, sum(map(len, buffers))), 0)  # the base may be shorter
        if inside and self._base is not None:
            self._base.read(position, cut(buffers, inside))
        for buffer in rest(buffers, inside):
            buffer[:] = bytes(len(buffer))

    # --- writing ---------------------------------------------------------------------------------------

    def write(self, position: int, buffers: Buffers) -> None:
        end = position + sum(map(len, buffers))
        first, last = position >> SHIFT, end - 1 >> SHIFT
        top = len(self._layers)
        layers = self._layer_of[first : last + 1]
        layer = self._layers[-1]
        if layers.count(top) == len(layers):
            layer.file.write(layer.header.data + position, buffers)
        elif not (position | end) & BLOCK - 1:
            layer.file.write(layer.header.data + position, buffers)
            with self._lock:
                self._have(first, last + 1)
        else:
            with self._lock:  # two writes to parts of a block must not both bring the rest of it up
                before = self._copy(first << SHIFT, position)
                after = self._copy(end, last + 1 << SHIFT)
                layer.file.write(layer.header.data + position - len(before), [before, *buffers, after])
                self._have(first, last + 1)

    def _copy(self, start: int, end: int) -> memoryview:
        """What part of a block holds, for it to be written to the uppermost layer; nothing if it is there."""
        if self._layer_of[start >> SHIFT] == len(self._layers):
            return memoryview(b"")
        part = memoryview(bytearray(end - start))
        if end > start:
            self._read_layer(self._layer_of[start >> SHIFT], start, [part])
        return part

    def _have(self, first: int, end: int) -> None:
        """The uppermost layer has these blocks now."""
        self._layer_of[first:end] = bytes((len(self._layers),)) * (end - first)
        self._pending.append((first, end))

    def flush(self) -> None:
        if not self._keeps:
            return
        with self._flushing:
            with self._lock:
                pending, self._pending = self._pending, []
            try:
                self._layers[-1].file.flush()
                if pending:
                    self._write_bitmap(pending)
            except OSError:
                with self._lock:
                    self._pending += pending
                raise

    def _write_bitmap(self, pending: list[tuple[int, int]]) -> None:
        """Set the bits of blocks that are on stable storage."""
        bitmap = self._bitmap
        pages: set[int] = set()
        for first, end in pending:
            whole_first, whole_end = -(-first // 8), end // 8
            if whole_first < whole_end:
                bitmap[whole_first:whole_end] = b"\xff" * (whole_end - whole_first)
            for block in (*range(first, min(whole_first * 8, end)), *range(max(whole_end * 8, first), end)):
                bitmap[block >> 3] |= 1 << (block & 7)
            pages.update(range((first >> 3) // _BITMAP_PAGE, (end - 1 >> 3) // _BITMAP_PAGE + 1))
        file = self._layers[-1].file
        for page in pages:
            start = page * _BITMAP_PAGE
            file.write(HEADER_BYTES + start, [memoryview(bitmap)[start : start + _BITMAP_PAGE]])
        file.flush()

    def discard(self, position: int, length: int) -> None:
        """The whole blocks of the range read as zeros afterwards."""
        first, end = -(-position // BLOCK), position + length >> SHIFT
        if first < end:
            layer = self._layers[-1]
            with self._lock:
                layer.file.discard(layer.header.data + (first << SHIFT), end - first << SHIFT)
                self._have(first, end)

    # --- layers ----------------------------------------------------------------------------------------

    def snapshot(self, path: Path) -> None:
        """Keep what the disk holds now in a file `path`, which must not exist, and go on in a new overlay of it.

        The new overlay takes the file's name, so that the disk stays where it was.  `path` can be the backing of other
        overlays at once.  No other method may run meanwhile.  Raises DiskError, and OSError where the flush failed.
        """
        file = self._layers[-1].file
        if not self.writable or not self._keeps:
            raise DiskError(f"{file.path} is not written to: there is nothing to take a snapshot of")
        if len(self._layers) == MAX_LAYERS:
            raise DiskError(f"{file.path} has {MAX_LAYERS} layers; no more can be told apart")
        self.flush()
        aside = file.path.with_name(f".{file.path.name}.{os.getpid()}.new")
        backing = DiskSource(path=Path(os.path.relpath(path, file.path.parent)), format=DiskFormat.OVERLAY)
        create_overlay(aside, backing, self.sectors)
        try:
            layer = _Layer.open(aside, True)
            try:
                os.link(file.path, path)  # both names are the old file's until the next line
                os.rename(aside, file.path)
            except BaseException:
                layer.file.close()
                raise
            layer.file.path = file.path
            file.path = path
            _sync_directory(path.parent)
            _sync_directory(layer.file.path.parent)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise DiskError(f"cannot keep a snapshot of {file.path} as {path}: {error.strerror}") from error
        file.freeze()
        self._layers.append(layer)
        self._bitmap = bytearray(layer.header.bitmap_bytes)

    def join(self, path: Path) -> None:
        """Put what the layer of this file has into the one below it, see `join_layers`.

        No other method may run meanwhile.  Raises DiskError, also where there is no such layer between others.
        """
        numbers = [number for number, layer in enumerate(self._layers, start=1) if layer.file.path == path]
        if not numbers or not 1 < numbers[0] < len(self._layers):
            raise DiskError(f"{path} is no layer of {self._layers[-1].file.path} that could be joined with another")
        (number,) = numbers  # in the table
        below, layer = self._layers[number - 2 : number]
        below.file.unlock(WHOLE)  # others who use it have it locked
        try:
            join_layers(below.file.path, path)
        finally:
            below.file.freeze()
        table = np.frombuffer(self._layer_of, dtype=np.uint8)
        for start in range(0, len(table), _TABLE_PIECE):
            piece = table[start : start + _TABLE_PIECE]
            if piece.any():  # what nobody touched stays without memory
                piece[piece >= number] -= 1
        del self._layers[number - 1]
        layer.file.close()
        below.file.path = path

    def close(self) -> None:
        try:
            if self.writable:
                self.flush()
        finally:
            for layer in self._layers:
                layer.file.close()
            if self._base is not None:
                self._base.close()


def join_layers(lower: Path, upper: Path) -> None:
    """Put what an overlay has into the one below it, which takes its name; what that held before is nowhere then.

    Neither is written to by others meanwhile, and nothing else may have `lower` as its backing.  Dying at any moment
    leaves all overlays above with what they had.  Raises DiskError, also where `lower` is not the backing of `upper`.
    """
    above = _Layer.open(upper, False)
    try:
        below = _Layer.open(lower, True)
    except DiskError:
        above.file.close()
        raise
    try:
        backing = above.backing()
        if backing is None or backing.format is not DiskFormat.OVERLAY or not backing.path.samefile(lower):
            raise DiskError(f"{lower} is not what {upper} is an overlay of")
        if below.header.sectors != above.header.sectors:
            raise DiskError(f"{lower} and {upper} differ in size")
        bits = [np.frombuffer(layer.bitmap(), dtype=np.uint8) for layer in (below, above)]
        _copy_blocks(above, below, np.flatnonzero(np.unpackbits(bits[1], bitorder="little")))
        below.file.flush()
        below.file.write(HEADER_BYTES, [memoryview((bits[0] | bits[1]).tobytes())])
        below.file.flush()
        os.rename(lower, upper)
        _sync_directory(upper.parent)
    except OSError as error:
        raise DiskError(f"cannot join {upper} and {lower}: {error.strerror}") from error
    finally:
        below.file.close()
        above.file.close()


def _copy_blocks(source: _Layer, sink: _Layer, blocks: npt.NDArray[np.int64]) -> None:
    """These blocks, in ascending order."""
    end = source.header.sectors * SECTOR
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1) if len(blocks) else ():
        for at in range(0, len(run), _COPIED_AT_ONCE):
            position = int(run[at]) << SHIFT
            length = min(min(len(run) - at, _COPIED_AT_ONCE) << SHIFT, -(-end // BLOCK) * BLOCK - position)
            buffer = memoryview(bytearray(length))
            source.file.read(source.header.data + position, [buffer])
            sink.file.write(sink.header.data + position, [buffer])
