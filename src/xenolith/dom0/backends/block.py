"""The block back-end: virtual block devices for guests (paper 3.4.2; public/io/blkif.h; Linux: xen-blkback).

A request names up to 11 segments (up to 256 in frames of their own, "indirect"), each a part of a granted frame.
Data goes between the disk and these frames with one preadv or pwritev, without a copy.  The back-end's thread does
this with none of the hypervisor's locks held; a slow disk delays its own device.

A front-end that has the feature "persistent" uses the same grants again and again, so they stay mapped (`Grants`), up
to as many as Linux's back-end keeps.

What a guest can do wrong.  A request is copied once and every field of it checked; one that makes no sense, or that
names a frame which was not granted, is answered with an error.  A ring that lies closes the device (`xenbus`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from xenolith.abi import blkif
from xenolith.dom0.backends import block_native
from xenolith.dom0.backends.block_native import MAX_INDIRECT_SEGMENTS, BlockStatistics
from xenolith.dom0.bell import Bell
from xenolith.dom0.disks import Disk, DiskSource
from xenolith.dom0.disks.open import open_disk
from xenolith.dom0.disks.raw import RawDisk
from xenolith.dom0.rings import RequestReader, ResponseWriter, RingError, SharedRing
from xenolith.dom0.xenbus import Backend, FrontendError, FrontendNodes
from xenolith.hypervisor.python_domain import HypercallError, MappedGrant, PythonDomain

MAX_PERSISTENT_GRANTS: Final = 1056  # a ring; as xen-blkback: 32 requests of 32 segments and an indirect frame
BATCHES: Final = 64  # in native code before the thread looks for other things to do
_REF_LIMIT: Final = 1 << 32
_PORT_LIMIT: Final = 1 << 32


@dataclass(frozen=True, kw_only=True)
class VbdSpec:
    """A virtual block device for a domain."""

    number: int  # as the guest knows it, see xen-vbd-interface(7): 51712 is xvda
    name: str
    source: DiskSource | None  # None: a drive without a medium
    cdrom: bool = False


class BadRequest(Exception):
    """A request makes no sense."""


class Grants:
    """The frames of a front-end's that one ring has mapped."""

    def __init__(self, dom0: PythonDomain, domid: int, persistent: bool) -> None:
        self._dom0: Final = dom0
        self._domid: Final = domid
        self._limit: Final = MAX_PERSISTENT_GRANTS if persistent else 0
        self._kept: Final[dict[int, MappedGrant]] = {}  # by reference
        self._passing: Final[list[MappedGrant]] = []

    def frame(self, ref: int, writable: bool) -> memoryview:
        """The frame of a grant, until `release`. Raises HypercallError."""
        kept = self._kept.get(ref)
        if kept is not None:
            return kept.view
        if len(self._kept) < self._limit:
            kept = self._kept[ref] = self._dom0.map_grant(self._domid, ref)  # it will serve requests of both kinds
            return kept.view
        passing = self._dom0.map_grant(self._domid, ref, writable)
        self._passing.append(passing)
        return passing.view

    def release(self) -> None:
        """A request is done: give up all that is not kept."""
        while self._passing:
            self._dom0.unmap_grant(self._passing.pop())

    def close(self) -> None:
        self.release()
        while self._kept:
            self._dom0.unmap_grant(self._kept.popitem()[1])


class _Queue:
    """One ring of a device, with its event channel."""

    def __init__(self, backend: BlockBackend, ref: int, remote_port: int, persistent: bool, bell: Bell) -> None:
        """Raises FrontendError."""
        dom0, domid = backend.dom0, backend.domid
        self._dom0: Final = dom0
        self._backend: Final = backend
        self._statistics: Final = backend.statistics
        with contextlib.ExitStack() as undo:
            try:
                grant = dom0.map_grant(domid, ref)
                undo.callback(dom0.unmap_grant, grant)
                self._port: Final = dom0.bind_interdomain(domid, remote_port)
                undo.callback(dom0.close, self._port)
            except HypercallError as error:
                raise FrontendError(f"its ring cannot be reached: {error}") from error
            ring = SharedRing(grant.view, blkif.REQUEST_SIZE)
            self._responses: Final = ResponseWriter(ring)
            self._requests: Final = RequestReader(ring)
            self._grants: Final = Grants(dom0, domid, persistent)
            undo.callback(self._grants.close)
            self._native: Final = None if persistent else block_native.function()
            if self._native is not None:
                self._use_native_code(ring)
                undo.callback(self._pinned.unpin)
            dom0.set_handler(self._port, lambda _: bell.ring(), bell.descriptor)
            self._undo: Final = undo.pop_all()

    def close(self) -> None:
        self._undo.close()

    def serve(self) -> bool:
        """Carry out all requests that are there; True where more have come meanwhile."""
        if self._native is not None and isinstance(self._backend.disk, RawDisk):
            return self._serve_natively(self._native, self._backend.disk)
        try:
            requests = self._requests.take()
        except RingError as error:
            raise FrontendError(str(error)) from error
        for request in requests:
            self._answer(request)
        if self._responses.push():
            self._dom0.send(self._port)
        return self._requests.rearm()

    def _use_native_code(self, ring: SharedRing) -> None:
        self._ring = ring
        self._pinned = pinned = self._dom0.grant_batch(self._backend.domid)
        self._batch = block_native.Batch(
            ring=ctypes.addressof(ring),
            pins=ctypes.addressof(pinned.pins),
            granter=pinned.granter,
            pin=pinned.native_pin,
            unpin=pinned.native_unpin,
            statistics=ctypes.addressof(self._statistics),
        )
        self._batch_address = ctypes.addressof(self._batch)

    def _serve_natively(self, serve: Callable[[int], int], disk: RawDisk) -> bool:
        """The same, with reads and writes in native code."""
        batch, address = self._batch, self._batch_address
        batch.sectors, batch.descriptor, batch.writable = disk.sectors, disk.descriptor, disk.writable
        batch.batches_left = BATCHES
        while (answer := serve(address)) not in (block_native.IDLE, block_native.MORE):
            if answer == block_native.NOTIFY:
                self._dom0.send(self._port)
            elif answer == block_native.CARRY_OUT:
                request = batch.requests[batch.at]
                request.status = self._carry_out(bytes(request.raw))[1]
                batch.at += 1
            elif answer == block_native.PIN:
                self._pinned.pin()
            elif answer == block_native.UNPIN:
                self._pinned.unpin()
            elif answer == block_native.FAILED:
                self._note_failures(disk)
            else:
                raise FrontendError(f"more requests are unanswered than a ring of {self._ring.entries} can hold")
        return answer == block_native.MORE

    def _note_failures(self, disk: RawDisk) -> None:
        for request in self._batch.requests[: self._batch.count]:
            if request.cut_off:
                self._backend.note_error(disk.cut_off(request.sector << 9))
            elif request.error:
                self._backend.note_error(OSError(request.error, os.strerror(request.error)))

    def _answer(self, request: bytes) -> None:
        number = blkif.REQUEST.unpack_from(request)[3]
        operation, status = self._carry_out(request)
        if status:
            self._statistics.errors += 1
        self._responses.put(blkif.RESPONSE.pack(number, operation, status))

    def _carry_out(self, request: bytes) -> tuple[int, int]:
        """Do what a request asks for: the operation, which an indirect one names inside, and the status."""
        operation, count, _, _, sector = blkif.REQUEST.unpack_from(request)
        status = blkif.BLKIF_RSP_OKAY
        try:
            if operation in (blkif.BLKIF_OP_READ, blkif.BLKIF_OP_WRITE):
                if not 1 <= count <= blkif.BLKIF_MAX_SEGMENTS_PER_REQUEST:
                    raise BadRequest
                self._transfer(operation, sector, request[blkif.SEGMENTS :], count)
            elif operation == blkif.BLKIF_OP_INDIRECT:
                operation = request[1]
                sector, segments, count = self._indirect(request)
                self._transfer(operation, sector, segments, count)
            elif operation == blkif.BLKIF_OP_FLUSH_DISKCACHE:
                self._flush(sector, request[blkif.SEGMENTS :], count)
            elif operation == blkif.BLKIF_OP_DISCARD:
                status = self._discard(request)
            else:
                status = blkif.BLKIF_RSP_EOPNOTSUPP
        except (BadRequest, HypercallError):
            status = blkif.BLKIF_RSP_ERROR
        except OSError as error:
            status = blkif.BLKIF_RSP_ERROR
            self._backend.note_error(error)
        self._grants.release()
        return operation, status

    def _indirect(self, request: bytes) -> tuple[int, bytes, int]:
        """Sector, segments and their number of a request whose segments lie in frames of their own."""
        _, operation, count, _, sector, _, *refs = blkif.INDIRECT.unpack_from(request)
        if operation not in (blkif.BLKIF_OP_READ, blkif.BLKIF_OP_WRITE) or not 1 <= count <= MAX_INDIRECT_SEGMENTS:
            raise BadRequest
        size = count * blkif.SEGMENT.size  # all fit one frame
        return sector, bytes(self._grants.frame(refs[0], False)[:size]), count

    def _transfer(self, operation: int, sector: int, segments: bytes, count: int) -> None:
        """Read or write. `segments` is a copy."""
        reading = operation == blkif.BLKIF_OP_READ
        if not reading and not self._backend.disk.writable:
            raise BadRequest
        frame = self._grants.frame
        buffers = []
        sectors = 0
        for ref, first, last in blkif.SEGMENT.iter_unpack(segments[: count * blkif.SEGMENT.size]):
            if first > last or last >= blkif.SECTORS_PER_PAGE:
                raise BadRequest
            memory = frame(ref, reading)
            part = last - first + 1
            buffers.append(memory if part == blkif.SECTORS_PER_PAGE else memory[first << 9 : (last + 1) << 9])
            sectors += part
        if sector + sectors > self._backend.disk.sectors:
            raise BadRequest
        statistics = self._statistics
        if reading:
            self._backend.disk.read(sector << 9, buffers)
            statistics.reads += 1
            statistics.read_bytes += sectors << 9
        else:
            self._backend.disk.write(sector << 9, buffers)
            statistics.writes += 1
            statistics.written_bytes += sectors << 9

    def _flush(self, sector: int, segments: bytes, count: int) -> None:
        """Bring what was written to stable storage; data that comes with the request is written after that and also."""
        if count > blkif.BLKIF_MAX_SEGMENTS_PER_REQUEST:
            raise BadRequest
        self._statistics.flushes += 1
        if self._backend.disk.writable:
            self._backend.disk.flush()
        if count:
            self._transfer(blkif.BLKIF_OP_WRITE, sector, segments, count)
            self._backend.disk.flush()

    def _discard(self, request: bytes) -> int:
        _, flag, _, _, sector, sectors = blkif.DISCARD.unpack_from(request)
        if not self._backend.disk.discard_granularity or flag & blkif.BLKIF_DISCARD_SECURE:
            return blkif.BLKIF_RSP_EOPNOTSUPP
        if sector + sectors > self._backend.disk.sectors:
            raise BadRequest
        self._statistics.discards += 1
        if sectors:
            self._backend.disk.discard(sector << 9, sectors << 9)
        return blkif.BLKIF_RSP_OKAY


class BlockBackend(Backend):
    """A virtual block device on a disk, which it closes in the end."""

    kind: ClassVar[str] = "vbd"

    def __init__(self, dom0: PythonDomain, domid: int, spec: VbdSpec) -> None:
        """A device for the domain `domid`. Raises DiskError."""
        self.dom0: Final = dom0
        self.domid: Final = domid
        self.spec: Final = spec
        self.source = spec.source
        self.disk: Disk = open_disk(spec.source)
        self.statistics: Final = BlockStatistics()
        # Native code pins a frame in less time than the guest copies it into one that stays mapped.
        self._persistent: Final = block_native.function() is None or not isinstance(self.disk, RawDisk)
        self._info: Final = (blkif.VDISK_REMOVABLE | blkif.VDISK_CDROM if spec.cdrom else 0) | (
            0 if self.disk.writable else blkif.VDISK_READONLY
        )
        self._queues: list[_Queue] = []
        self._seen: set[int | None] = set()  # kinds of errors that were logged

    def offer(self) -> Mapping[str, str]:
        granularity = self.disk.discard_granularity
        return {
            "feature-flush-cache": "1",
            "feature-persistent": str(int(self._persistent)),
            "feature-max-indirect-segments": str(MAX_INDIRECT_SEGMENTS),
            "max-ring-page-order": "0",
            "feature-discard": str(int(bool(granularity))),
            "discard-granularity": str(granularity),
            "discard-alignment": "0",
            "discard-secure": "0",
        }

    def connect(self, nodes: FrontendNodes, bell: Bell) -> None:
        protocol = nodes.text("protocol", blkif.PROTOCOL)
        if protocol != blkif.PROTOCOL:
            raise FrontendError(f"it speaks {protocol!r}, not {blkif.PROTOCOL}")
        ref, port = nodes.number("ring-ref", _REF_LIMIT), nodes.number("event-channel", _PORT_LIMIT)
        persistent = bool(nodes.number("feature-persistent", 2, default=0)) and self._persistent
        self._queues.append(_Queue(self, ref, port, persistent, bell))

    def describe(self) -> Mapping[str, str]:
        return {
            "sectors": str(self.disk.sectors),
            "info": str(self._info),
            "sector-size": str(blkif.SECTOR_SIZE),
            "physical-sector-size": str(self.disk.physical_sector_size),
        }

    def serve(self) -> bool:
        busy = False
        for queue in self._queues:
            busy |= queue.serve()
        return busy

    def settle(self) -> None:
        try:
            if self.disk.writable:
                self.disk.flush()
        except OSError as error:
            self.note_error(error)

    def disconnect(self) -> None:
        while self._queues:
            self._queues.pop().close()

    def close(self) -> None:
        self.disk.close()

    def insert(self, disk: Disk, source: DiskSource | None) -> None:
        """Go on with another disk: the drive has a new medium. On the device's thread."""
        self.disk.close()
        self.disk, self.source = disk, source

    def note_error(self, error: OSError) -> None:
        """The storage failed. Each kind of failure has one line in the log."""
        if error.errno not in self._seen:
            self._seen.add(error.errno)
            self.dom0.log(f"d{self.domid}: {self.spec.name}: {error}")

    def nodes(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """What is in the front-end's and the back-end's directory from the beginning, as libxl writes it.

        Not the path of the file ("params"): it is none of the guest's business.
        """
        spec, kind = self.spec, "cdrom" if self.spec.cdrom else "disk"
        front = {"virtual-device": str(spec.number), "device-type": kind, "trusted": "1"}
        back = {
            "dev": spec.name,
            "type": "phy",
            "mode": "w" if self.disk.writable else "r",
            "device-type": kind,
            "removable": str(int(spec.cdrom)),
            "bootable": "1",
        }
        return front, back
