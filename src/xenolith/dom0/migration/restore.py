"""Restoring: a domain is made of a stream.

Whoever wrote the stream may have written anything.  Lengths and places are checked as it is read (`stream`), then the
hypervisor makes the domain and checks every field, takes every reference to a frame anew and recounts them
(`domain_record`), and dom0's services check what is theirs (`services`).  What is refused has left nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from xenolith.dom0.migration import stream
from xenolith.dom0.migration.series import OpenBase, Series, bases
from xenolith.dom0.migration.services import ServicesRecord
from xenolith.dom0.migration.stream import MOST_FRAMES, Reader
from xenolith.hypervisor.control import Arrival, Control
from xenolith.hypervisor.domain_record.frames import FrameRecord
from xenolith.hypervisor.domain_record.kinds import U32, Number, Plain, Record, RecordError

if TYPE_CHECKING:
    from xenolith.machine.memory import MachineMemory


@dataclass(frozen=True)
class Received:
    """A domain that was read, and of which nothing is believed yet but the sizes."""

    max_pages: int
    vcpus: int
    arrival: Arrival
    services: ServicesRecord


class Receiver:
    """Reads a stream, first the description, then all the rest. Methods raise RecordError."""

    def __init__(self, control: Control, source: BinaryIO, open_base: OpenBase | None = None) -> None:
        """Without `open_base` a checkpoint is refused that has not all itself."""
        self._control = control
        self._open_base = open_base or _no_bases
        self._reader = Reader(source)
        section = self._reader.next()
        self.series: Series | None = None
        if section.kind == stream.SERIES:
            self.series = Series.of(self._reader.json(section))
            section = self._reader.next()
        if section.kind != stream.DESCRIPTION:
            raise RecordError(f"a section of kind {section.kind} comes where its description belongs")
        record = Record(self._reader.json(section), "the description")
        self._max_pages: int = record.get("max_pages", Number(MOST_FRAMES))
        self._vcpus: int = record.get("vcpus", U32)
        self.toolstack: Plain = record.any("toolstack")
        free = control.machine().free_pages
        if self._max_pages > free:
            raise RecordError(f"the domain may have {self._max_pages >> 8} MiB, and {free >> 8} MiB are free")

    def receive(self) -> Received:
        """Read the rest. Raises DomainCreateError besides."""
        memory = self._control.memory_for_arrival(self._max_pages)
        try:
            frames, state = self._read_into(memory)
            services = ServicesRecord.of(state.record("services"))
        except BaseException:
            memory.close()
            raise
        arrival = Arrival(memory, state.any("domain"), frames)
        return Received(self._max_pages, self._vcpus, arrival, services)

    def wait_for_word(self) -> None:
        """The sender gives the domain away. Raises RecordError where it goes away instead."""
        self._reader.payload(self._reader.expect(stream.GO), 0)

    def _read_into(self, memory: MachineMemory) -> tuple[FrameRecord, Record]:
        reader = self._reader
        if self.series is not None:
            with bases(self.series, self._open_base) as below:
                for each in below:
                    _read_pages(each, memory)
        while (section := reader.next()).kind == stream.PAGES:
            reader.pages(section, memory.b, memory.frames)
        if section.kind != stream.FRAMES:
            raise RecordError(f"a section of kind {section.kind} comes where its frames belong")
        frames = reader.frames(section, memory.frames)
        state = Record(reader.json(reader.expect(stream.STATE)), "the state")
        reader.payload(reader.expect(stream.END), 0)
        return frames, state


def _read_pages(reader: Reader, memory: MachineMemory) -> None:
    """What a base says of the memory."""
    reader.json(reader.expect(stream.DESCRIPTION))
    while (section := reader.next()).kind == stream.PAGES:
        reader.pages(section, memory.b, memory.frames)
    if section.kind != stream.FRAMES:
        raise RecordError(f"a section of kind {section.kind} comes in one of its bases")


def _no_bases(name: str) -> BinaryIO:
    raise RecordError(f"it is the part of a series that goes on from {name}")
