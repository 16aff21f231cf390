"""What a domain is made of, and what becomes of each part when it travels: saved, cloned, relocated.

`TABLES` has every field of the objects that are a domain's state.  A field is *saved* (its `Kind` says how it is
written and what may be read back), saved *by hand* (`state` and `load` here), *rebuilt* from what was saved, or *the
host's*, which has it anew where the domain arrives.  A test looks at a live domain for fields that are in no class.

`state` gives plain data: numbers, booleans, text, lists and dictionaries with text as keys, fit for JSON.  What `load`
gets may have been written by anybody.  It checks everything that a hypercall would have checked, and takes
nothing about frames on trust: the frame table is not in the record.  `FrameRecord` has which frames the domain
has, and which of them are pinned; every type and every count is had anew by taking the references again, through
`paging`, which validates each table and descriptor as if the guest asked for it.

Nothing in a record depends on the machine it was made on, nor on the domain's number there: ports of its own to
dom0 wait for dom0, and what it granted or offered to other domains is withdrawn, since their numbers mean others
elsewhere.
"""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np

from xenolith.abi import layout
from xenolith.abi.event_fifo import EVENT_ARRAY_PAGES, EVTCHN_FIFO_MAX_QUEUES
from xenolith.abi.grant_table import GRANT_ENTRY_SIZES, GTF_reading, GTF_transitive, GTF_type_mask, GTF_writing
from xenolith.abi.hypercalls import DOMID_INVALID, DOMID_SELF, EVTCHN_2L_NR_CHANNELS, NR_VIRQS
from xenolith.abi.layout import VCPU_INFO_SIZE
from xenolith.abi.x86 import (
    CS,
    DS,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    PAGE_SIZE,
    RFLAGS,
    RIP,
    SS,
    XSAVE_HEADER,
    XSAVE_MXCSR,
    XSTATE_SSE,
    XSTATE_X87,
    is_canonical,
)
from xenolith.hypervisor import cpuid, descriptors, event_fifo, events, paging
from xenolith.hypervisor.domain import Domain, DomainFields, Vcpu, VcpuFields
from xenolith.hypervisor.emulate import CR4_GUEST
from xenolith.hypervisor.events import EventChannels, binding_lock
from xenolith.hypervisor.frames import (
    ALLOCATED,
    INVALID_M2P_ENTRY,
    PINNED,
    TYPE_L4,
    TYPE_MASK,
    TYPE_SHIFT,
    TYPE_WRITABLE,
    VALIDATED,
)
from xenolith.hypervisor.grants import GrantTable, status_frames
from xenolith.hypervisor.guest_memory import address_ok
from xenolith.hypervisor.hypercalls import misc
from xenolith.hypervisor.hypercalls.memory_op import remove_pages
from xenolith.hypervisor.time import Timer, VcpuTimers, set_wall_clock
from xenolith.hypervisor.view import View
from xenolith.machine import segments
from xenolith.machine.clock import Clock
from xenolith.machine.engines.native_state import ModeFields
from xenolith.machine.engines.protocol import ALWAYS_SET, ENTRY_FLAGS, CpuState
from xenolith.machine.memory import LOCAL_APIC_MFN, Frames

Plain = Any  # what JSON can say

SHORT_PAUSE: Final = 10_000_000_000  # ns
MOST_XSAVE: Final = 1 << 14
MOST_E820: Final = 128
XSAVE_HEADER_END: Final = 576
_U64 = np.uint64


class RecordError(Exception):
    """A domain cannot travel, or a record is none; the text says why."""


# --- kinds of values -------------------------------------------------------------------------------


class Kind:
    """How a field is written, and what may be read back."""

    def pack(self, value: Any) -> Plain:
        """As plain data."""
        return value

    def unpack(self, plain: Plain, where: str) -> Any:
        """The value. Raises RecordError where it is none of this kind."""
        return plain


class Number(Kind):
    """least <= value < limit."""

    def __init__(self, limit: int = 1 << 64, least: int = 0) -> None:
        self.limit = limit
        self.least = least

    def unpack(self, plain: Plain, where: str) -> int:
        if type(plain) is not int or not self.least <= plain < self.limit:
            raise RecordError(f"{where} is no number from {self.least} and below {self.limit:#x}")
        return plain


class Address(Number):
    """A linear address that the processor would accept."""

    def unpack(self, plain: Plain, where: str) -> int:
        value = super().unpack(plain, where)
        if not is_canonical(value):
            raise RecordError(f"{where} is no address: {value:#x}")
        return value


class GuestAddress(Number):
    """A linear address that is the guest's own."""

    def unpack(self, plain: Plain, where: str) -> int:
        value = super().unpack(plain, where)
        if not address_ok(value):
            raise RecordError(f"{where} is no address of a guest's: {value:#x}")
        return value


class Mask(Number):
    """Some of these bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def unpack(self, plain: Plain, where: str) -> int:
        value = super().unpack(plain, where)
        if value & ~self.bits:
            raise RecordError(f"{where} has bits that it cannot have: {value:#x}")
        return value


class Flag(Kind):
    def pack(self, value: Any) -> bool:
        return bool(value)

    def unpack(self, plain: Plain, where: str) -> bool:
        if type(plain) is not bool:
            raise RecordError(f"{where} is neither true nor false")
        return plain


class Array(Kind):
    """So many values of a kind."""

    def __init__(self, kind: Kind, count: int) -> None:
        self.kind = kind
        self.count = count

    def pack(self, value: Any) -> list[Plain]:
        return [self.kind.pack(each) for each in value]

    def unpack(self, plain: Plain, where: str) -> list[Any]:
        if type(plain) is not list or len(plain) != self.count:
            raise RecordError(f"{where} is no list of {self.count}")
        return [self.kind.unpack(each, where) for each in plain]


class Listing(Array):
    """At most so many values of a kind."""

    def unpack(self, plain: Plain, where: str) -> list[Any]:
        if type(plain) is not list or len(plain) > self.count:
            raise RecordError(f"{where} is no list of {self.count} at most")
        return [self.kind.unpack(each, where) for each in plain]


class Octets(Kind):
    """At most so many bytes, in hexadecimal digits."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def pack(self, value: Any) -> str:
        return bytes(value).hex()

    def unpack(self, plain: Plain, where: str) -> bytes:
        if type(plain) is not str or not 2 * self.least <= len(plain) <= 2 * self.most:
            raise RecordError(f"{where} is not {self.least} to {self.most} bytes")
        try:
            value = bytes.fromhex(plain)
        except ValueError:
            raise RecordError(f"{where} is not in hexadecimal digits") from None
        if not self.least <= len(value) <= self.most:
            raise RecordError(f"{where} is not {self.least} to {self.most} bytes")
        return value


class Text(Kind):
    """At most so many characters, which stand for bytes: UTF-8, and others as surrogates (PEP 383)."""

    def __init__(self, most: int) -> None:
        self.most = most

    def unpack(self, plain: Plain, where: str) -> str:
        if type(plain) is not str or len(plain) > self.most:
            raise RecordError(f"{where} is no text of {self.most} characters at most")
        try:
            plain.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise RecordError(f"{where} has characters that no bytes stand for") from None
        return plain


class Optional(Kind):
    """A value of a kind, or none."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def pack(self, value: Any) -> Plain:
        return None if value is None else self.kind.pack(value)

    def unpack(self, plain: Plain, where: str) -> Any:
        return None if plain is None else self.kind.unpack(plain, where)


# --- every field -----------------------------------------------------------------------------------


class Fate(Enum):
    """Of a field that is not simply saved."""

    BY_HAND = "saved, by `state` and `load`"
    REBUILT = "rebuilt from what was saved"
    HOST = "the host's"


BY_HAND, REBUILT, HOST = Fate

U64: Final = Number()
U32: Final = Number(1 << 32)
U16: Final = Number(1 << 16)
FLAG: Final = Flag()
ADDRESS: Final = Address()

TABLES: Final[dict[type, dict[str, Kind | Fate]]] = {
    ModeFields: {
        "kernel_l4": BY_HAND,
        "user_l4": BY_HAND,
        "kernel_sp": U64,
        "kernel_ss": U16,
        "other_gs_base": ADDRESS,
        "syscall_callback": ADDRESS,
        "event_callback": ADDRESS,
        "shared_info": REBUILT,
        "info": BY_HAND,  # its place in the frame
        "timer_look": REBUILT,  # 0: the engine knows nothing of the timer
        "timer_deadline": U64,
        "timer_interval": U64,
        "untrapped_syscalls": U64,
        "untrapped_ticks": U64,
        "native_handler": HOST,
        "native_timer": HOST,
        "native_budget": HOST,
        "now": HOST,
        "flat_pairs": REBUILT,  # a cache, empty at first
        "vcpu_id": REBUILT,
        "virq_port": REBUILT,
        "kernel_mode": FLAG,
        "compatibility": FLAG,
        "syscall_masks_events": FLAG,
        "nmi_masked": FLAG,
        "architectural_iopl": FLAG,
        "fifo": REBUILT,
        "may_run": REBUILT,
        "new_space": REBUILT,
    },
    VcpuFields: {
        "domain_address": HOST,
        "calls": HOST,
        "trap_address": Array(ADDRESS, 256),
        "trap_flags": Array(Number(256), 256),
        "iopl": Number(4),
        "ldt_entries": Number(descriptors.MAX_LDT_ENTRIES + 1),
        # A cache of what the engine here tells; what the guest was told there is in the features.
        "cpuid_count": REBUILT,
        "cpuid_table": REBUILT,
        # Of a trap that is being handled; there is none between two.
        "batch": REBUILT,
        "batch_done": REBUILT,
        "work_left": REBUILT,
        "looked_at": REBUILT,
        "call": REBUILT,
        "begun": REBUILT,
        "batch_begun": REBUILT,
        "call_begun": REBUILT,
        "control_block": BY_HAND,
        "queue_tails": BY_HAND,
        "flush_requested": REBUILT,
        "in_guest": HOST,
        "nmi_pending": FLAG,
    },
    Vcpu: {
        "domain": HOST,
        "address": HOST,
        "state": BY_HAND,
        "cpu": HOST,
        "regs": HOST,
        "thread": HOST,
        "flat_selectors": REBUILT,
        "trap_selector": Array(U16, 256),
        "failsafe_callback": ADDRESS,
        "syscall32_callback": ADDRESS,
        "sysenter_callback": ADDRESS,
        "failsafe_masks_events": FLAG,
        "syscall32_masks_events": FLAG,
        "sysenter_masks_events": FLAG,
        "task_switched": FLAG,
        "debug": BY_HAND,
        "cpuid_answers": REBUILT,
        "cr4": Mask(CR4_GUEST),
        "gdt_frames": BY_HAND,
        "gdt_entries": BY_HAND,
        "ldt_va": ADDRESS,
        "ldt_frames": REBUILT,
        "base_changed": REBUILT,
        "restarted": REBUILT,
        "in_multicall": REBUILT,
        "restart_arguments": REBUILT,
        "info_mfn": BY_HAND,
        "time_area_va": GuestAddress(),
        "runstate_area_va": GuestAddress(),
        "online": FLAG,
        "initialised": FLAG,
        "blocked": FLAG,
        "poll_port": BY_HAND,
        "pause_count": REBUILT,
        "runstate": REBUILT,  # offline until it runs
        "runstate_since": REBUILT,
        "runstate_times": Array(U64, 4),
        "context": HOST,
        "kicked": HOST,
        "unit": HOST,
        "timers": BY_HAND,
        "time_version": U32,
        "time_outdated": REBUILT,
        "set_timer_late": HOST,
    },
    CpuState: {
        "regs": BY_HAND,
        "l4_mfn": REBUILT,
        "user": REBUILT,
        "task_switched": FLAG,
        "debug": REBUILT,
        "xsave": BY_HAND,
        "xcr0": BY_HAND,
        "gdt_va": REBUILT,
        "gdt_limit": REBUILT,
        "ldt_va": REBUILT,
        "ldt_limit": REBUILT,
    },
    VcpuTimers: {
        "_vcpu": HOST,
        "_queue": HOST,
        "_clock": HOST,
        "singleshot": BY_HAND,
        "poll": BY_HAND,
        "period": U64,
        "_next_tick": REBUILT,
        "_periodic": REBUILT,
        "virtual_deadline": U64,
        "_virtual": REBUILT,
    },
    DomainFields: {
        "memory_address": HOST,
        "m2p_address": HOST,
        "owner_address": HOST,
        "type_info_address": HOST,
        "count_info_address": HOST,
        "stamp_address": HOST,
        "machine_frames": REBUILT,
        "trap_counts": Array(U64, 64),
        "hypercall_counts": Array(U64, 64),
        "xen_l4_entries": REBUILT,
        "view_slot": HOST,
        "view_entries": HOST,
        "vm_assist": U64,
        "shared_info": REBUILT,
        "flush_epoch": REBUILT,
        "domid": HOST,
        "vcpu_count": REBUILT,
        "contexts": HOST,
        "lock_word": HOST,
        "lock_wanted": HOST,
        "work_limit": HOST,
        "reference_lost": HOST,
        # Tables that are validated or undone in part are none where it goes: the guest repeats what began it.
        "undo_list": REBUILT,
        "undo_count": REBUILT,
        "vcpu_addresses": HOST,
        "event_pages": BY_HAND,
        "queues_address": HOST,
        "ldt_in_use": REBUILT,
        "caches_tables": HOST,
        "dying": HOST,
        "bells": HOST,
        "bell_count": HOST,
        "grant_entries": REBUILT,
        "grant_frames": HOST,
        "active_grants": HOST,
        "code_frames": HOST,
        "python_references": REBUILT,
    },
    Domain: {
        "hypervisor": HOST,
        "view": BY_HAND,  # which frames are its own: FrameRecord
        "memory": HOST,
        "frames": REBUILT,
        "engine": HOST,
        "lock": HOST,
        "clock": BY_HAND,
        "clock_ahead": REBUILT,
        "time_offset": BY_HAND,
        "privileged": REBUILT,
        "uuid": HOST,  # the toolstack's, who makes the domain anew
        "vcpus": BY_HAND,
        "max_pages": HOST,  # likewise
        "total_pages": REBUILT,
        "shared_info_mfn": BY_HAND,
        "engine_views": HOST,
        "window_l1": REBUILT,
        "linear": REBUILT,
        "work_left": REBUILT,
        "foreign_mapped": REBUILT,  # by dom0's services
        "memory_map": BY_HAND,
        "executable_mapped": HOST,
        "entry_changed": HOST,
        "hypercalls": HOST,
        "events": BY_HAND,
        "grants": BY_HAND,
        "port_queues": BY_HAND,
        "posted": REBUILT,  # none is left
        "code_written": REBUILT,  # likewise
        "paused_by_control": HOST,
        "shutdown_reason": REBUILT,  # one that has shut down does not travel
        "shutdown_announced": HOST,
        "shutdown_code": Optional(Number(256)),
        "crash_report": HOST,
        "watchdogs": BY_HAND,
        "emergency_console": HOST,
        "cpupool": HOST,
    },
    EventChannels: {
        "domain": HOST,
        "max_port": REBUILT,
        "valid_ports": REBUILT,
        "state": BY_HAND,
        "remote_domid": BY_HAND,
        "remote": REBUILT,
        "remote_port": BY_HAND,
        "virq": BY_HAND,
        "vcpu_id": BY_HAND,
        "posted": REBUILT,
        "pollers": REBUILT,
        "bells": HOST,
        "interrupt": HOST,
    },
    GrantTable: {
        "domain": HOST,
        "max_frames": HOST,
        "max_mappings": HOST,
        "version": BY_HAND,
        "status_frames": BY_HAND,
        "_frames": BY_HAND,
        "_length": BY_HAND,
        "_pins": REBUILT,
        "_parts": REBUILT,
        "_through": REBUILT,
        "_active": REBUILT,  # nobody has pinned an entry yet
        "_mappings": REBUILT,  # it has none, or does not travel
        "_free_handles": REBUILT,
        "_handles_lock": HOST,
    },
    View: {
        "max_pages": HOST,  # of the description
        "m2p_bytes": REBUILT,
        "memory": BY_HAND,
        "frames": REBUILT,
        "m2p_extents": REBUILT,
        "m2p": BY_HAND,
        "m2p_words": BY_HAND,
        "m2p_l4_entries": REBUILT,
        "gdt_mfn": REBUILT,
        "zero_mfn": REBUILT,
    },
}


def fields_of(thing: object) -> set[str]:
    """The names of all that an object keeps."""
    names = set(getattr(thing, "__dict__", ()))
    for kind in type(thing).__mro__:
        names.update(name for name, *_ in kind.__dict__.get("_fields_", ()))
        names.update(kind.__dict__.get("__slots__", ()))
    return names


def fates(kind: type) -> dict[str, Kind | Fate]:
    """What becomes of each field of such an object."""
    return {name: fate for each in kind.__mro__ for name, fate in TABLES.get(each, {}).items()}


def _pack(thing: object) -> dict[str, Plain]:
    kinds = fates(type(thing)).items()
    return {name: kind.pack(getattr(thing, name)) for name, kind in kinds if isinstance(kind, Kind)}


def _unpack(thing: object, record: Record) -> None:
    for name, kind in fates(type(thing)).items():
        if isinstance(kind, Kind):
            value = record.get(name, kind)
            if isinstance(getattr(thing, name), ctypes.Array):
                getattr(thing, name)[:] = value
            else:
                setattr(thing, name, value)


class Record:
    """A dictionary that somebody wrote."""

    def __init__(self, plain: Plain, where: str) -> None:
        if type(plain) is not dict:
            raise RecordError(f"{where} is no record")
        self._plain = plain
        self.where = where

    def get(self, name: str, kind: Kind) -> Any:
        """A value of this kind. Raises RecordError."""
        if name not in self._plain:
            raise RecordError(f"{self.where} has no {name}")
        return kind.unpack(self._plain[name], f"{self.where}: {name}")

    def any(self, name: str) -> Plain:
        """What is there, unchecked. Raises RecordError where nothing is."""
        return self.get(name, Kind())

    def has(self, name: str) -> bool:
        return name in self._plain

    def record(self, name: str) -> Record:
        return Record(self._plain.get(name), f"{self.where}: {name}")

    def records(self, name: str, least: int, most: int) -> list[Record]:
        plain = self._plain.get(name)
        if type(plain) is not list or not least <= len(plain) <= most:
            raise RecordError(f"{self.where}: {name} is no list of {least} to {most}")
        return [Record(each, f"{self.where}: {name} {number}") for number, each in enumerate(plain)]


# --- saving ----------------------------------------------------------------------------------------


def state(domain: Domain) -> dict[str, Plain]:
    """The record of a domain that stands still, its vCPUs' states stored. The caller holds the domain's lock.

    What others posted is delivered first. Raises RecordError where the domain cannot travel.
    """
    if domain.shutdown_reason is not None or domain.dying:
        raise RecordError("it has shut down")
    if domain.grants.maps_others:
        raise RecordError("it has frames of another domain mapped")
    timers = [_timers_state(vcpu) for vcpu in domain.vcpus]
    watchdogs = [timer and max(timer.deadline - domain.hypervisor.clock.now(), 1) for timer in domain.watchdogs]
    domain.hypervisor.timers.settle()
    events.drain(domain)
    return {
        **_pack(domain),
        "now": domain.clock.now(),
        "wall": domain.clock.wall(),
        "time_offset": domain.time_offset,
        "features": _features(domain),
        "shared_info": domain.shared_info_mfn,
        "memory_map": [list(entry) for entry in domain.memory_map],
        "watchdogs": watchdogs,
        "ports": _ports_state(domain.events),
        "fifo": event_fifo.state(domain),
        "grant_version": domain.grants.version,
        "grant_frames": list(domain.grants.frames),
        "status_frames": list(domain.grants.status_frames),
        "vcpus": [_vcpu_state(vcpu) | {"timers": times} for vcpu, times in zip(domain.vcpus, timers, strict=True)],
    }


def _vcpu_state(vcpu: Vcpu) -> dict[str, Plain]:
    state = vcpu.state
    regs = state.regs
    return {
        **_pack(vcpu),
        "kernel_l4": vcpu.kernel_l4,
        "user_l4": vcpu.user_l4,
        "debug": list(vcpu.debug),
        "gdt_frames": list(vcpu.gdt_frames),
        "gdt_entries": vcpu.gdt_entries,
        "info_mfn": vcpu.info_mfn,
        "info_offset": vcpu.info & PAGE_SIZE - 1 if vcpu.info_mfn else 0,
        "polls": [vcpu.poll_port] if vcpu.poll_port > 0 else [] if vcpu.poll_port else None,
        "cpu": {
            **_pack(state),
            "regs": regs[: RIP + 1].tolist(),
            "rflags": regs[RFLAGS],
            "selectors": [regs[index] & 0xFFFF for index in _SELECTORS],
            "fs_base": regs[FS_BASE],
            "gs_base": regs[GS_BASE],
            "xsave": bytes(state.xsave).hex(),
            "xcr0": state.xcr0,
        },
    }


_SELECTORS: Final = (ES, CS, SS, DS, FS, GS)


def _timers_state(vcpu: Vcpu) -> dict[str, Plain]:
    timers, ahead = vcpu.timers, vcpu.domain.clock_ahead
    return {
        **_pack(timers),
        **{
            name: (deadline := getattr(timers, name).deadline) and max(deadline + ahead, 1)
            for name in ("singleshot", "poll")
        },
    }


def _ports_state(channels: EventChannels) -> list[Plain]:
    """Every port in use: what it is bound to as seen from where the domain arrives."""
    ports: list[Plain] = []
    domain = channels.domain
    with binding_lock:
        for port in range(1, channels.valid_ports):
            kind = channels.state[port]
            entry = {"port": port, "vcpu": channels.vcpu_id[port]}
            if kind == events.UNBOUND:
                ports.append(entry | {"unbound": _numbered(channels.remote_domid[port], domain)})
            elif kind == events.INTERDOMAIN and channels.remote[port] is domain:
                ports.append(entry | {"local": channels.remote_port[port]})
            elif kind == events.INTERDOMAIN:
                if channels.remote_domid[port]:
                    raise RecordError(f"its event channel {port} leads to domain {channels.remote_domid[port]}")
                ports.append(entry | {"unbound": 0})
            elif kind == events.VIRQ:
                ports.append(entry | {"virq": channels.virq[port]})
            elif kind == events.IPI:
                ports.append(entry | {"ipi": True})
    return ports


def _numbered(domid: int, domain: Domain) -> int:
    """A domain's number as it goes into a record: only dom0 and the domain itself are the same elsewhere."""
    if domid in (domain.domid, DOMID_SELF):
        return DOMID_SELF
    return 0 if domid == 0 else DOMID_INVALID


# What a guest may have found in CPUID and rely on: registers (0: EAX ... 3: EDX) of leaves in which bits are features.
_FEATURE_LEAVES: Final = {
    (1, 0): (2, 3),
    (7, 0): (1, 2, 3),
    (0xD, 1): (0,),
    (0x8000_0001, 0): (2, 3),
    (0x8000_0007, 0): (3,),
    (0x8000_0021, 0): (0,),
}
INVARIANT_TSC: Final = 1 << 8  # CPUID 8000_0007 EDX
TSC_TOLERANCE: Final = 200  # one part in this many: the rate is measured anew by each process
_REGISTER_NAMES: Final = ("eax", "ebx", "ecx", "edx")


def _features(domain: Domain) -> dict[str, Plain]:
    engine = domain.engine
    assert engine is not None
    return {"xcr0": engine.xcr0_mask, "tsc_hz": domain.hypervisor.tsc_hz, **_feature_words(domain)}


def _feature_words(domain: Domain) -> dict[str, int]:
    return {
        f"{leaf:x}.{subleaf}.{_REGISTER_NAMES[register]}": cpuid.answer(domain.vcpus[0], leaf, subleaf)[register]
        for (leaf, subleaf), registers in _FEATURE_LEAVES.items()
        for register in registers
    }


@dataclass(frozen=True)
class FrameRecord:
    """A domain's frames: `mfns` ascending, `pfns` what the machine-to-physical table says of each.

    `pinned`: (MFN, level 1..4) of each pinned table; `given_up`: frames that are its own no more, but still in use.
    """

    mfns: Frames
    pfns: Frames
    pinned: Frames
    levels: Frames
    given_up: Frames


@dataclass(frozen=True)
class FrameTypes:
    """What the frame table says of a domain's frames, for a copy on the same machine, which need not validate anew.

    `types` and `counts` of each of its frames, without the references of the domain's own state; `linear` as in Domain.
    """

    types: Frames
    counts: Frames
    linear: dict[int, int]


def frame_types(domain: Domain, mfns: Frames) -> FrameTypes:
    """The frame table's entries for these frames of a domain's. The caller holds its lock."""
    frames = domain.frames
    types, counts = frames.type_infos.copy(), frames.count_infos.copy()
    for mfn, kind in domain.references():
        counts[mfn] -= _U64(1)
        if kind is not None:
            types[mfn] -= _U64(1)
    return FrameTypes(types[mfns], counts[mfns], dict(domain.linear))


def frame_record(domain: Domain) -> FrameRecord:
    """Which frames a domain has. The caller holds its lock."""
    frames = domain.frames
    mfns = np.flatnonzero(frames.owners == domain.domid).astype(np.uint64)
    infos = frames.type_infos[mfns]
    pinned = (infos & _U64(PINNED)) != 0
    shared = np.array([domain.shared_info_mfn, *domain.shared_frames()], dtype=np.uint64)
    given_up = mfns[(frames.count_infos[mfns] & _U64(ALLOCATED)) == 0]
    return FrameRecord(
        mfns=mfns,
        pfns=domain.view.m2p_words[mfns].copy(),
        pinned=mfns[pinned],
        levels=(infos[pinned] & _U64(TYPE_MASK)) >> _U64(TYPE_SHIFT),
        given_up=given_up[~np.isin(given_up, shared)],
    )


# --- loading ---------------------------------------------------------------------------------------


def check_frames(record: FrameRecord, frames: int) -> None:
    """Whether these can be frames of a domain whose machine has so many. Raises RecordError."""
    mfns = record.mfns
    if not len(mfns) or len(mfns) != len(record.pfns) or len(record.pinned) != len(record.levels):
        raise RecordError("the lists of its frames do not belong together")
    if not (mfns[1:] > mfns[:-1]).all() or int(mfns[0]) < 1 or int(mfns[-1]) >= frames:
        raise RecordError("the list of its frames is out of order, or names frames that its machine has not")
    if np.isin(LOCAL_APIC_MFN, mfns):
        raise RecordError("one of its frames cannot be memory")
    for some in (record.pinned, record.given_up):
        if len(some) and not ((some[1:] > some[:-1]).all() and np.isin(some, mfns).all()):
            raise RecordError("a list of some of its frames is out of order, or names others")
    if len(record.levels) and not ((record.levels >= 1) & (record.levels <= 4)).all():
        raise RecordError("a page table has a level that there is not")


def clock_ahead(record: Record, clock: Clock) -> int:
    """How far ahead of a clock the domain's has to be.

    Its time goes on from where it stood.  A short pause, as of a relocation, is made up for, so that what it takes for
    the wall-clock time stays right; after a longer one the guest had better be told.
    """
    moment = Number(1 << 62)
    gap = clock.wall() - record.get("wall", moment)
    return int(record.get("now", moment)) + (gap if 0 <= gap <= SHORT_PAUSE else 0) - clock.now()


def check_features(record: Record, domain: Domain) -> None:
    """The engine must be able to do all that the guest was told where it comes from. Raises RecordError.

    A guest that knows of an invariant TSC may tell time by it, and by the rate that it was told.
    """
    theirs = record.record("features")
    rate, rate_here = theirs.get("tsc_hz", Number(1 << 40)), domain.hypervisor.tsc_hz
    if theirs.get("80000007.0.edx", U32) & INVARIANT_TSC and abs(rate - rate_here) * TSC_TOLERANCE > rate:
        raise RecordError(
            f"the domain may tell time by an invariant TSC of {rate / 1e6:.1f} MHz, and this host's has "
            f"{rate_here / 1e6:.1f} MHz"
        )
    for name, here in _feature_words(domain).items():
        lacking = theirs.get(name, U32) & ~here
        if lacking:
            raise RecordError(
                f"the domain has seen processor features that the engine {domain.engine and domain.engine.name} lacks "
                f"here: CPUID {name}, bits {lacking:#x}"
            )


def load(domain: Domain, plain: Plain, frames: FrameRecord, types: FrameTypes | None = None) -> None:
    """Give a domain that was just made, on memory with these frames' contents, its state.

    With the `types` of a domain of this machine, of which it is a copy, page tables are not validated anew.
    Raises RecordError; the domain can then only be destroyed.
    """
    record = Record(plain, "the domain")
    vcpus = record.records("vcpus", len(domain.vcpus), len(domain.vcpus))
    check_features(record, domain)
    _unpack(domain, record)
    _load_memory_map(domain, record)
    _take_frames(domain, record, frames, types)
    for vcpu, its in zip(domain.vcpus, vcpus, strict=True):
        _unpack(vcpu, its)
        _load_vcpu(vcpu, its)
    if types is None:
        _pin(domain, frames)
    for vcpu, its in zip(domain.vcpus, vcpus, strict=True):
        _take_references(vcpu, its)
        _load_cpu(vcpu, its.record("cpu"))
    if types is None:
        for mfn in frames.given_up.tolist():
            remove_pages(domain, mfn)
    _load_ports(domain, record)
    _load_fifo(domain, record)
    for vcpu, its in zip(domain.vcpus, vcpus, strict=True):
        _load_timers(vcpu, its)
    _load_watchdogs(domain, record)
    if record.has("time_offset"):
        domain.time_offset = record.get("time_offset", Number(1 << 32, -(1 << 32)))
    set_wall_clock(domain)


def _load_memory_map(domain: Domain, record: Record) -> None:
    entries = record.get("memory_map", Listing(Array(U64, 3), MOST_E820))
    if any(kind >= 1 << 32 for *_, kind in entries):
        raise RecordError("the memory map has a type that there is not")
    domain.memory_map = [tuple(entry) for entry in entries]


def _take_frames(domain: Domain, record: Record, frames: FrameRecord, types: FrameTypes | None) -> None:
    """The domain has these frames, and as yet none of them is in use but by its allocation."""
    table, view = domain.frames, domain.view
    mfns = frames.mfns
    shared_info = record.get("shared_info", U64)
    grants = record.get("grant_frames", Listing(U64, domain.grants.max_frames))
    version = record.get("grant_version", Number(3)) if record.has("grant_version") else 1
    status = record.get("status_frames", Listing(U64, status_frames(len(grants)))) if version == 2 else []
    if version not in GRANT_ENTRY_SIZES or (version == 2 and len(status) != status_frames(len(grants))):
        raise RecordError("its grant table cannot be one")
    shared = [shared_info, *grants, *status]
    if len(set(shared)) != len(shared) or not np.isin(np.array(shared, dtype=np.uint64), mfns).all():
        raise RecordError("the frames that it shares with Xen are not among its frames")
    if len(mfns) - len(shared) > domain.max_pages:
        raise RecordError(f"it has {len(mfns)} frames and may have {domain.max_pages}")
    table.assign(mfns, domain.domid)
    view.m2p_words[mfns] = frames.pfns
    for mfn in shared:
        table.share_with_guest(mfn, domain.domid)
        view.m2p[mfn] = INVALID_M2P_ENTRY
    if types is not None:
        _copy_types(domain, frames, types, shared)
    domain.total_pages = len(mfns) - len(shared)
    domain.grants.version, domain.grants.status_frames = version, status
    domain.shared_info_mfn, domain.grants.frames = shared_info, grants
    domain.shared_info = shared_info * PAGE_SIZE
    for vcpu in domain.vcpus:
        vcpu.shared_info = domain.shared_info
        vcpu.info = domain.shared_info + vcpu.vcpu_id * VCPU_INFO_SIZE
    _withdraw_grants(domain)


def _copy_types(domain: Domain, frames: FrameRecord, types: FrameTypes, shared: list[int]) -> None:
    table, memory = domain.frames, domain.memory
    table.type_infos[frames.mfns], table.count_infos[frames.mfns] = types.types, types.counts
    for mfn in shared:
        table.type_info[mfn] += 1
        table.count_info[mfn] += 1
    domain.linear = dict(types.linear)
    domain.python_references = True
    kinds = types.types & _U64(TYPE_MASK | VALIDATED)
    for mfn in frames.mfns[kinds == _U64(TYPE_L4 | VALIDATED)].tolist():
        memory.table(mfn)[layout.XEN_FIRST_SLOT : layout.XEN_LAST_SLOT + 1] = domain.xen_l4_entries


def _withdraw_grants(domain: Domain) -> None:
    """No entry is in use yet, and those for other domains than dom0 are for nobody."""
    words = GRANT_ENTRY_SIZES[domain.grants.version] // 8
    for mfn in domain.grants.frames:
        entries = domain.memory.table(mfn).reshape(-1, words)
        headers = entries[:, 0]
        others = (headers >> _U64(16) & _U64(0xFFFF)) != 0
        if words == 2:
            others |= headers & _U64(GTF_type_mask) == _U64(GTF_transitive)
        entries[others] = 0
        headers &= _U64(~(GTF_reading | GTF_writing) & (1 << 64) - 1)
    for mfn in domain.grants.status_frames:
        domain.memory.table(mfn)[:] = 0


def _pin(domain: Domain, frames: FrameRecord) -> None:
    """Pin every table that was pinned. One with read-only links to others of its level has to come after those."""
    waiting = list(zip(frames.pinned.tolist(), frames.levels.tolist(), strict=True))
    while waiting:
        refused = [each for each in waiting if paging.pin(domain, each[0], each[1] << TYPE_SHIFT)]
        if len(refused) == len(waiting):
            raise RecordError(f"frame {refused[0][0]:#x} cannot be the L{refused[0][1]} table that it is said to be")
        waiting = refused


def _load_vcpu(vcpu: Vcpu, record: Record) -> None:
    if vcpu.time_area_va & 7 or (vcpu.ldt_entries and vcpu.ldt_va & PAGE_SIZE - 1):
        raise RecordError(f"{record.where} has an area at an address where it cannot be")
    for number, value in enumerate(record.get("debug", Array(U64, 8))):
        if value and misc.do_set_debugreg(vcpu, number, value):
            raise RecordError(f"{record.where} has a debug register that it cannot have")
    vcpu.state.debug = list(vcpu.debug)
    entries = record.get("gdt_entries", Number(layout.FIRST_RESERVED_GDT_ENTRY + 1))
    if descriptors.set_gdt_frames(vcpu, record.get("gdt_frames", Listing(U64, 14)), entries):
        raise RecordError(f"{record.where}: what is said to be its GDT cannot be one")


def _take_references(vcpu: Vcpu, record: Record) -> None:
    domain = vcpu.domain
    kernel, user = record.get("kernel_l4", U64), record.get("user_l4", U64)
    for taken in (kernel, user):
        if taken and paging.get_page_and_type(domain, taken, TYPE_L4):
            raise RecordError(f"{record.where}: frame {taken:#x} cannot be its L4 table")
    if kernel:
        paging.set_bases(vcpu, kernel, user)
    if (vcpu.initialised and not kernel) or (user and not kernel) or (vcpu.online and not vcpu.initialised):
        raise RecordError(f"{record.where} runs without page tables")
    if not vcpu.kernel_mode and not user:
        raise RecordError(f"{record.where} is in guest-user mode without a table for it")
    info, offset = record.get("info_mfn", U64), record.get("info_offset", Number(PAGE_SIZE - VCPU_INFO_SIZE + 1))
    if info:
        if offset & 7 or paging.get_page_and_type(domain, info, TYPE_WRITABLE):
            raise RecordError(f"{record.where}: frame {info:#x} cannot have its vcpu_info")
        vcpu.info_mfn, vcpu.info = info, info * PAGE_SIZE + offset
    vcpu.state.l4_mfn, vcpu.state.user = (kernel, False) if vcpu.kernel_mode else (user, True)
    if vcpu.ldt_entries:
        domain.ldt_in_use = True
        if kernel:
            descriptors.load_ldt(vcpu)
    vcpu.time_outdated = True
    vcpu.flush_requested = True


def _load_cpu(vcpu: Vcpu, record: Record) -> None:
    state = vcpu.state
    _unpack(state, record)
    regs = state.regs
    regs[: RIP + 1] = memoryview(array("Q", record.get("regs", Array(U64, RIP + 1))))
    regs[RFLAGS] = record.get("rflags", U64) & ENTRY_FLAGS | ALWAYS_SET
    regs[FS_BASE], regs[GS_BASE] = record.get("fs_base", ADDRESS), record.get("gs_base", ADDRESS)
    if not is_canonical(regs[RIP]):
        raise RecordError(f"{record.where} is at no address: {regs[RIP]:#x}")
    for index, selector in zip(_SELECTORS, record.get("selectors", Array(U16, 6)), strict=True):
        regs[index] = selector
    if vcpu.initialised:
        _check_code_stack(vcpu, record)
    _load_extended(vcpu, record)


def _check_code_stack(vcpu: Vcpu, record: Record) -> None:
    def read(selector: int) -> bytes | None:
        descriptor = descriptors.lookup(vcpu, selector) if selector < 1 << 16 else 0
        return descriptor.to_bytes(8, "little") if descriptor else None

    regs = vcpu.state.regs
    try:
        segments.code_segment(regs[CS], read)
        if regs[SS]:
            segments.stack_segment(regs[SS], read)
    except ValueError as error:
        raise RecordError(f"{record.where}: {error}") from error


def _load_extended(vcpu: Vcpu, record: Record) -> None:
    """x87, SSE and the rest, which the processor would refuse to load if they were not as they have to be."""
    engine, state = vcpu.domain.engine, vcpu.state
    assert engine is not None
    xcr0 = record.get("xcr0", U64)
    avx512, mpx, amx = xcr0 & 0xE0, xcr0 & 0x18, xcr0 & 0x6_0000
    if xcr0 & ~engine.xcr0_mask:
        raise RecordError(f"{record.where}: the engine {engine.name} has not all components of XCR0 {xcr0:#x}")
    if not xcr0 & 1 or xcr0 & 6 == 4 or (avx512 and (avx512 != 0xE0 or not xcr0 & 4)) or mpx not in (0, 0x18):
        raise RecordError(f"{record.where}: XCR0 cannot be {xcr0:#x}")
    if amx not in (0, 0x6_0000):
        raise RecordError(f"{record.where}: XCR0 cannot be {xcr0:#x}")
    image = record.get("xsave", Octets(XSAVE_HEADER_END, MOST_XSAVE))
    components = int.from_bytes(image[XSAVE_HEADER : XSAVE_HEADER + 8], "little")
    mxcsr = int.from_bytes(image[XSAVE_MXCSR : XSAVE_MXCSR + 4], "little")
    if components & ~(xcr0 | XSTATE_X87 | XSTATE_SSE) or any(image[XSAVE_HEADER + 8 : XSAVE_HEADER_END]) or mxcsr >> 16:
        raise RecordError(f"{record.where}: its XSAVE image is none")
    state.xcr0, state.xsave = xcr0, bytearray(image)


def _load_ports(domain: Domain, record: Record) -> None:
    channels = domain.events
    vcpu_id = Number(len(domain.vcpus))
    for entry in record.records("ports", 0, channels.max_port):
        port = entry.get("port", Number(channels.max_port + 1))
        if not port or channels.state[port] != events.FREE:
            raise RecordError(f"{entry.where} is in use twice")
        channels.vcpu_id[port] = entry.get("vcpu", vcpu_id)
        _load_port(channels, port, entry)
        channels.make_valid(port)
    for port in range(1, channels.valid_ports):
        if channels.state[port] == events.INTERDOMAIN:
            other = channels.remote_port[port]
            if channels.state[other] != events.INTERDOMAIN or channels.remote_port[other] != port:
                raise RecordError(f"event channel {port} leads nowhere")


def _load_port(channels: EventChannels, port: int, entry: Record) -> None:
    domain = channels.domain
    if entry.has("unbound"):
        remote = entry.get("unbound", U16)
        channels.state[port] = events.UNBOUND
        channels.remote_domid[port] = domain.domid if remote == DOMID_SELF else 0 if remote == 0 else DOMID_INVALID
    elif entry.has("local"):
        channels.state[port] = events.INTERDOMAIN
        channels.remote[port], channels.remote_domid[port] = domain, domain.domid
        channels.remote_port[port] = entry.get("local", Number(channels.max_port + 1))
    elif entry.has("virq"):
        virq = entry.get("virq", Number(NR_VIRQS))
        vcpu = domain.vcpus[channels.vcpu_id[port] if virq in events.PER_VCPU_VIRQS else 0]
        if vcpu.virq_port[virq]:
            raise RecordError(f"{entry.where}: VIRQ {virq} is bound twice")
        channels.state[port], channels.virq[port] = events.VIRQ, virq
        vcpu.virq_port[virq] = port
    else:
        entry.get("ipi", FLAG)
        channels.state[port] = events.IPI


def _load_fifo(domain: Domain, record: Record) -> None:
    if not record.has("fifo") or record.any("fifo") is None:
        if domain.events.valid_ports > EVTCHN_2L_NR_CHANNELS:
            raise RecordError(f"it has an event channel beyond its bitmaps of {EVTCHN_2L_NR_CHANNELS}")
        return
    fifo = record.record("fifo")
    ports = len(domain.port_queues) // event_fifo.QUEUE_BYTES
    queues = fifo.get("queues", Octets(0, len(domain.port_queues)))
    domain.port_queues[: len(queues)] = queues
    limits = EVTCHN_FIFO_MAX_QUEUES, EVTCHN_FIFO_MAX_QUEUES, len(domain.vcpus), 2
    if any(value >= limits[at % event_fifo.QUEUE_BYTES] for at, value in enumerate(queues)):
        raise RecordError(f"{fifo.where}: a port is in a queue that there is not")
    controls = fifo.get("controls", Array(Optional(Array(U64, 2)), len(domain.vcpus)))
    tails = fifo.get("tails", Array(Array(Number(ports), EVTCHN_FIFO_MAX_QUEUES), len(domain.vcpus)))
    for vcpu, control, last in zip(domain.vcpus, controls, tails, strict=True):
        vcpu.queue_tails[:] = last
        if control is not None:
            mfn, offset = control
            if event_fifo.init_control(domain, vcpu, mfn, offset, 0):
                raise RecordError(f"{fifo.where}: {vcpu!r} has its control block where it cannot be")
    if not domain.fifo:
        raise RecordError(f"{fifo.where}: no vCPU has a control block")
    for mfn in fifo.get("pages", Listing(U64, EVENT_ARRAY_PAGES)):
        if event_fifo.expand_array(domain, mfn):
            raise RecordError(f"{fifo.where}: frame {mfn:#x} cannot have event words")


def _load_timers(vcpu: Vcpu, record: Record) -> None:
    times, timers = record.record("timers"), vcpu.timers
    _unpack(timers, times)
    if timers.period and timers.period < 1_000_000:
        raise RecordError(f"{record.where} has a timer that ticks all the time")
    for name in ("singleshot", "poll"):
        deadline = times.get(name, U64)
        if deadline:
            timers.arm(getattr(timers, name), deadline)
    polls = record.get("polls", Optional(Listing(Number(vcpu.domain.events.max_port + 1), 1)))
    if polls is not None:
        if not vcpu.blocked or polls == [0]:
            raise RecordError(f"{record.where} polls without waiting")
        vcpu.poll_port = polls[0] if polls else -1
        vcpu.domain.events.pollers.append(vcpu)


def _load_watchdogs(domain: Domain, record: Record) -> None:
    now = domain.hypervisor.clock.now()
    for number, left in enumerate(record.get("watchdogs", Array(Optional(U64), 2))):
        if left is not None:
            timer = domain.watchdogs[number] = Timer(lambda: events.post_watchdog(domain))
            domain.hypervisor.timers.set(timer, now + left)
