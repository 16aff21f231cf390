"""Protection: another daemon holds what a domain was a moment ago, and goes on with it when this one dies (Remus,
NSDI 2008).

Time is cut into epochs. At the end of each the domain stands still while what has changed is copied: pages, blocks of
its disks, its state. Then it runs on, while that is sent; what it says to the network from then on belongs to the next
epoch. Nothing of an epoch leaves the machine (`network.port.Plug`) until the other side has said that it holds the
epoch's end, so nobody outside has ever seen what could be forgotten.

The other side (`Standby`) keeps an epoch apart until it is complete. When the connection breaks it takes the last
complete one for the domain. A connection that breaks while both sides live makes two of it: who must not risk that
cuts one of them off from the others (fencing) by other means.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from xenolith.abi.x86 import PAGE_SHIFT
from xenolith.dom0.disks import SECTOR
from xenolith.dom0.disks.mirrored import BLOCK, MirroredDisk
from xenolith.dom0.migration import stream
from xenolith.dom0.migration.changes import Changes
from xenolith.dom0.migration.live import READY, Refused
from xenolith.dom0.migration.restore import Received
from xenolith.dom0.migration.save import held
from xenolith.dom0.migration.services import ServicesRecord
from xenolith.dom0.migration.stream import MOST_FRAMES, Reader, Section, Writer
from xenolith.dom0.network.port import Plug
from xenolith.hypervisor.control import Arrival, Control
from xenolith.hypervisor.domain_record.frames import FrameRecord
from xenolith.hypervisor.domain_record.kinds import U32, Number, Plain, Record, RecordError

if TYPE_CHECKING:
    from xenolith.dom0.backends.block import BlockBackend
    from xenolith.dom0.services import Dom0, GuestDomain
    from xenolith.dom0.xenbus import Device

MOST_SECTORS: Final = 1 << 35
MOST_DISKS: Final = 64
MOST_STAGED: Final = 1 << 30  # bytes of an epoch, beside the memory once
BLOCK_BITS: Final = 36  # of a section's place: the block; above them the number of the disk
_BLOCKS_AT_ONCE: Final = 256
_LINE: Final = 1000


@dataclass(frozen=True)
class Epoch:
    """What one took."""

    number: int
    pages: int
    blocks: int
    stood_ns: int
    took_ns: int  # until the other side held it


class Protection:
    """Of one domain, from its own side. Close it, whatever happens: the domain then runs as it would alone."""

    def __init__(self, dom0: Dom0, domain: GuestDomain, out: BinaryIO, answers: BinaryIO, description: Plain) -> None:
        """Raises NotTracked where the host cannot tell what is written, and OSError and Refused."""
        self._dom0, self._domain = dom0, domain
        self._out, self._answers = out, answers
        self._number = 0
        self._changes = Changes(dom0.control, domain.domid)
        self._mirrors: dict[int, MirroredDisk] = {}
        self._plugs: list[Plug] = []
        try:
            self._begin(description)
        except BaseException:
            self.close()
            raise

    def _begin(self, description: Plain) -> None:
        """Send all that there is, while the domain runs."""
        domain, control = self._domain, self._dom0.control
        for number, device in domain.disks.items():
            if device.backend.disk.writable:
                device.ask(lambda device=device, number=number: self._mirror(number, device))  # type: ignore[misc]
        info = control.info(domain.domid)
        writer = Writer(self._out)
        writer.json(
            stream.DESCRIPTION,
            {
                "max_pages": info.ceiling_pages,
                "vcpus": info.max_vcpus,
                "engine": info.engine,
                "toolstack": description,
                "disks": [{"number": number, "sectors": disk.sectors} for number, disk in self._mirrors.items()],
            },
        )
        writer.flush()
        _expect(self._answers, READY)
        self._changes.say(writer, self._changes.look())
        for number, disk in self._mirrors.items():
            for first, data in disk.filled():
                writer.section(stream.BLOCKS, data, number << BLOCK_BITS | first)
        self.epoch()
        for net in domain.nets.values():
            plug = Plug(self._dom0.network.router, net.backend.vif)
            self._plugs.append(plug)
        self.epoch()

    def _mirror(self, number: int, device: Device[BlockBackend]) -> None:
        self._mirrors[number] = device.backend.disk = MirroredDisk(device.backend.disk)

    def epoch(self) -> Epoch:
        """End an epoch, and wait until the other side holds it. Raises OSError, Refused and RecordError."""
        dom0, domain, clock = self._dom0, self._domain, self._dom0.hypervisor.clock
        staged = io.BytesIO()
        writer = Writer(staged, preamble=False)
        began = clock.now()
        blocks = 0
        try:
            with held(dom0, domain) as services:
                with dom0.control.standing_still(domain.domid) as still:
                    pages = self._changes.say_rest(writer, still)
                for number, disk in self._mirrors.items():
                    for first, data in disk.changed():
                        writer.section(stream.BLOCKS, data, number << BLOCK_BITS | first)
                        blocks += len(data) // BLOCK
                for plug in self._plugs:
                    plug.mark()
        finally:
            dom0.control.unpause(domain.domid)
        stood = clock.now() - began
        writer.frames(still.frames)
        writer.json(stream.STATE, {"domain": still.record, "services": services.plain()})
        self._number += 1
        writer.section(stream.EPOCH, b"", self._number)
        self._out.write(staged.getbuffer())
        self._out.flush()
        _expect(self._answers, b"epoch %d\n" % self._number)
        for plug in self._plugs:
            plug.release()
        return Epoch(self._number, pages, blocks, stood, clock.now() - began)

    def dismiss(self) -> None:
        """Tell the other side that it is not wanted any more. Raises OSError."""
        Writer(self._out, preamble=False).section(stream.DISMISS, b"")
        self._out.flush()

    def close(self) -> None:
        """Follow the domain no more, and let out what waits."""
        self._changes.close()
        for plug in self._plugs:
            plug.close()
        for number, mirror in self._mirrors.items():
            device = self._domain.disks.get(number)
            if device is not None and device.backend.disk is mirror:
                device.backend.disk = mirror.disk


def _expect(answers: BinaryIO, wanted: bytes) -> None:
    line = answers.readline(_LINE)
    if line != wanted:
        raise Refused(line.decode("utf-8", "replace").strip())


class Standby:
    """The other side: holds the last complete epoch. Close it if it does not become a domain."""

    def __init__(self, control: Control, source: BinaryIO, out: BinaryIO, directory: Path) -> None:
        """`directory` is where its disks are kept. Raises RecordError, DomainCreateError and OSError."""
        self._reader = Reader(source)
        self._out = out
        self.epoch = 0
        record = Record(self._reader.json(self._reader.expect(stream.DESCRIPTION)), "the description")
        self._max_pages: int = record.get("max_pages", Number(MOST_FRAMES))
        self._vcpus: int = record.get("vcpus", U32)
        self.toolstack: Plain = record.any("toolstack")
        if self._max_pages > control.machine().free_pages:
            raise RecordError(f"the domain may have {self._max_pages >> 8} MiB, and there are not so many free")
        self._staged: list[tuple[Section, bytes]] = []
        self._staged_bytes = 0
        self._last: tuple[FrameRecord, Record] | None = None
        self._disks: dict[int, tuple[int, int]] = {}  # descriptor and number of blocks
        self.disk_paths: dict[int, Path] = {}
        self._memory = control.memory_for_arrival(self._max_pages)
        try:
            for disk in record.records("disks", 0, MOST_DISKS):
                self._make_disk(directory, disk.get("number", U32), disk.get("sectors", Number(MOST_SECTORS)))
        except BaseException:
            self.close()
            raise

    def _make_disk(self, directory: Path, number: int, sectors: int) -> None:
        if number in self._disks:
            raise RecordError(f"it has the disk {number} twice")
        path = directory / f"disk-{number}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._disks[number] = descriptor, -(-sectors * SECTOR // BLOCK)
        self.disk_paths[number] = path
        os.truncate(descriptor, sectors * SECTOR)

    def follow(self) -> bool:
        """Hold epoch after epoch until the connection breaks; False: it is not wanted any more. Raises RecordError
        where there has not been a complete one.
        """
        try:
            self._out.write(READY)
            self._out.flush()
            while (section := self._reader.next()).kind != stream.DISMISS:
                self._take(section)
        except (OSError, RecordError) as error:
            if self._last is None:
                raise RecordError(f"it broke off before there was a whole domain: {error}") from error
            return True
        return False

    def _take(self, section: Section) -> None:
        reader, frames = self._reader, self._memory.frames
        if section.kind == stream.PAGES:
            reader.check_pages(section, frames)
            self._stage(section, reader.payload(section, section.raw))
        elif section.kind == stream.BLOCKS:
            _, blocks = self._disks.get(section.first >> BLOCK_BITS, (0, 0))
            first = section.first & (1 << BLOCK_BITS) - 1
            data = reader.payload(section, _BLOCKS_AT_ONCE * BLOCK)
            if not data or len(data) % BLOCK or first + len(data) // BLOCK > blocks:
                raise RecordError(f"{len(data)} bytes at block {first} are none of a disk of its")
            self._stage(section, data)
        elif section.kind == stream.FRAMES:
            record = reader.frames(section, frames)
            state = Record(reader.json(reader.expect(stream.STATE)), "the state")
            end = reader.expect(stream.EPOCH)
            reader.payload(end, 0)
            self._commit(record, state, end.first)
        else:
            raise RecordError(f"a section of kind {section.kind} comes in an epoch")

    def _stage(self, section: Section, data: bytes) -> None:
        if self._last is None:  # there is nothing that it could spoil
            self._apply(section, data)
            return
        self._staged_bytes += len(data)
        if self._staged_bytes > MOST_STAGED + (self._memory.frames << PAGE_SHIFT):
            raise RecordError("an epoch is larger than can be held")
        self._staged.append((section, data))

    def _apply(self, section: Section, data: bytes) -> None:
        if section.kind == stream.PAGES:
            start = section.first << PAGE_SHIFT
            self._memory.b[start : start + len(data)] = data
            return
        descriptor, _ = self._disks[section.first >> BLOCK_BITS]
        os.pwrite(descriptor, data, (section.first & (1 << BLOCK_BITS) - 1) * BLOCK)

    def _commit(self, frames: FrameRecord, state: Record, number: int) -> None:
        for section, data in self._staged:
            self._apply(section, data)
        self._staged.clear()
        self._staged_bytes = 0
        self._last, self.epoch = (frames, state), number
        self._out.write(b"epoch %d\n" % number)
        self._out.flush()

    def take_over(self) -> Received:
        """The domain as it was at the end of the last complete epoch, once. Raises RecordError."""
        assert self._last is not None
        frames, state = self._last
        services = ServicesRecord.of(state.record("services"))
        for descriptor, _ in self._disks.values():
            os.fdatasync(descriptor)
        return Received(self._max_pages, self._vcpus, Arrival(self._memory, state.any("domain"), frames), services)

    def close_disks(self) -> None:
        for descriptor, _ in self._disks.values():
            os.close(descriptor)
        self._disks.clear()

    def close(self) -> None:
        """Give up all of it."""
        self._memory.close()
        self.close_disks()
        for path in self.disk_paths.values():
            path.unlink(missing_ok=True)
