"""A domain's record as a whole: made of one that stands still, and given to one that was just made."""

from __future__ import annotations

from typing import Final

from xenolith.hypervisor import event_fifo, events
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.domain_record.features import check_features, features
from xenolith.hypervisor.domain_record.fields import pack, unpack
from xenolith.hypervisor.domain_record.frames import FrameRecord, FrameTypes, pin_tables, take_frames
from xenolith.hypervisor.domain_record.kinds import U64, Array, Listing, Number, Optional, Plain, Record, RecordError
from xenolith.hypervisor.domain_record.ports import load_fifo, load_ports, ports_state
from xenolith.hypervisor.domain_record.vcpus import (
    load_cpu,
    load_timers,
    load_vcpu,
    take_references,
    timers_state,
    vcpu_state,
)
from xenolith.hypervisor.hypercalls.memory_op import remove_pages
from xenolith.hypervisor.time import Timer, set_wall_clock
from xenolith.machine.clock import Clock

SHORT_PAUSE: Final = 10_000_000_000  # ns
MOST_E820: Final = 128


def domain_state(domain: Domain) -> dict[str, Plain]:
    """The record of a domain that stands still, its vCPUs' states stored. The caller holds the domain's lock.

    What others posted is delivered first. Raises RecordError where the domain cannot travel.
    """
    if domain.shutdown_reason is not None or domain.dying:
        raise RecordError("it has shut down")
    if domain.grants.maps_others:
        raise RecordError("it has frames of another domain mapped")
    timers = [timers_state(vcpu) for vcpu in domain.vcpus]
    watchdogs = [timer and max(timer.deadline - domain.hypervisor.clock.now(), 1) for timer in domain.watchdogs]
    domain.hypervisor.timers.settle()
    events.drain(domain)
    return {
        **pack(domain),
        "now": domain.clock.now(),
        "wall": domain.clock.wall(),
        "time_offset": domain.time_offset,
        "features": features(domain),
        "shared_info": domain.shared_info_mfn,
        "memory_map": [list(entry) for entry in domain.memory_map],
        "watchdogs": watchdogs,
        "ports": ports_state(domain.events),
        "fifo": event_fifo.state(domain),
        "grant_version": domain.grants.version,
        "grant_frames": list(domain.grants.frames),
        "status_frames": list(domain.grants.status_frames),
        "vcpus": [vcpu_state(vcpu) | {"timers": times} for vcpu, times in zip(domain.vcpus, timers, strict=True)],
    }


def clock_ahead(record: Record, clock: Clock) -> int:
    """How far ahead of a clock the domain's has to be.

    Its time goes on from where it stood.  A short pause, as of a relocation, is made up for, so that what it takes for
    the wall-clock time stays right; after a longer one the guest had better be told.
    """
    moment = Number(1 << 62)
    gap = clock.wall() - record.get("wall", moment)
    return int(record.get("now", moment)) + (gap if 0 <= gap <= SHORT_PAUSE else 0) - clock.now()


def load_domain(domain: Domain, plain: Plain, frames: FrameRecord, types: FrameTypes | None = None) -> None:
    """Give a domain that was just made, on memory with these frames' contents, its state.

    With the `types` of a domain of this machine, of which it is a copy, page tables are not validated anew.
    Raises RecordError; the domain can then only be destroyed.
    """
    record = Record(plain, "the domain")
    vcpus = record.records("vcpus", len(domain.vcpus), len(domain.vcpus))
    check_features(record, domain)
    unpack(domain, record)
    _load_memory_map(domain, record)
    take_frames(domain, record, frames, types)
    for vcpu, its in zip(domain.vcpus, vcpus, strict=True):
        unpack(vcpu, its)
        load_vcpu(vcpu, its)
    if types is None:
        pin_tables(domain, frames)
    for vcpu, its in zip(domain.vcpus, vcpus, strict=True):
        take_references(vcpu, its)
        load_cpu(vcpu, its.record("cpu"))
    if types is None:
        for mfn in frames.given_up.tolist():
            remove_pages(domain, mfn)
    load_ports(domain, record)
    load_fifo(domain, record)
    for vcpu, its in zip(domain.vcpus, vcpus, strict=True):
        load_timers(vcpu, its)
    _load_watchdogs(domain, record)
    if record.has("time_offset"):
        domain.time_offset = record.get("time_offset", Number(1 << 32, -(1 << 32)))
    set_wall_clock(domain)


def _load_memory_map(domain: Domain, record: Record) -> None:
    entries = record.get("memory_map", Listing(Array(U64, 3), MOST_E820))
    if any(kind >= 1 << 32 for *_, kind in entries):
        raise RecordError("the memory map has a type that there is not")
    domain.memory_map = [tuple(entry) for entry in entries]


def _load_watchdogs(domain: Domain, record: Record) -> None:
    now = domain.hypervisor.clock.now()
    for number, left in enumerate(record.get("watchdogs", Array(Optional(U64), 2))):
        if left is not None:
            timer = domain.watchdogs[number] = Timer(lambda: events.post_watchdog(domain))
            domain.hypervisor.timers.set(timer, now + left)
