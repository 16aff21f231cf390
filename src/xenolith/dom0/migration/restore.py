"""Restoring: a domain is made of a stream.

Whoever wrote the stream may have written anything.  Lengths and places are checked as it is read (`stream`), then the
hypervisor makes the domain and checks every field, takes every reference to a frame anew and recounts them
(`domain_record`), and dom0's services check what is theirs (`services`).  What is refused has left nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from xenolith.dom0.migration import stream
from xenolith.dom0.migration.services import ServicesRecord
from xenolith.dom0.migration.stream import Reader
from xenolith.hypervisor.control import Arrival, Control
from xenolith.hypervisor.domain_record import U32, FrameRecord, Number, Plain, Record, RecordError

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

    def __init__(self, control: Control, source: BinaryIO) -> None:
        self._control = control
        self._reader = Reader(source)
        record = Record(self._reader.json(self._reader.expect(stream.DESCRIPTION)), "the description")
        self._max_pages: int = record.get("max_pages", Number(1 << 36))
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
        while (section := reader.next()).kind == stream.PAGES:
            reader.pages(section, memory.b, memory.frames)
        if section.kind != stream.FRAMES:
            raise RecordError(f"a section of kind {section.kind} comes where its frames belong")
        frames = reader.frames(section, memory.frames)
        state = Record(reader.json(reader.expect(stream.STATE)), "the state")
        reader.payload(reader.expect(stream.END), 0)
        return frames, state
