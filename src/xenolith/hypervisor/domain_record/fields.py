"""Every field of the objects that are a domain's state, and what becomes of it when the domain travels.

A field is *saved* (its `Kind` says how it is written and what may be read back), saved *by hand* (in the module here
that has its subject), *rebuilt* from what was saved, or *the host's*, which has it anew where the domain arrives.
A test looks at a live domain for fields that are in no class.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from typing import Final

from xenolith.hypervisor import descriptors
from xenolith.hypervisor.domain import Domain, DomainFields, Vcpu, VcpuFields
from xenolith.hypervisor.domain_record.kinds import (
    ADDRESS,
    FLAG,
    U16,
    U32,
    U64,
    Array,
    GuestAddress,
    Kind,
    Mask,
    Number,
    Optional,
    Plain,
    Record,
)
from xenolith.hypervisor.emulate import CR4_GUEST
from xenolith.hypervisor.events import EventChannels
from xenolith.hypervisor.grants import GrantTable
from xenolith.hypervisor.time import VcpuTimers
from xenolith.hypervisor.view import View
from xenolith.machine.engines.native_state import ModeFields
from xenolith.machine.engines.protocol import CpuState


class Fate(Enum):
    """Of a field that is not simply saved."""

    BY_HAND = "saved, by the module of its subject"
    REBUILT = "rebuilt from what was saved"
    HOST = "the host's"


BY_HAND, REBUILT, HOST = Fate

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
        "cpuid_changes": HOST,  # the toolstack's, with the configuration
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


def pack(thing: object) -> dict[str, Plain]:
    """The fields of an object that are simply saved."""
    kinds = fates(type(thing)).items()
    return {name: kind.pack(getattr(thing, name)) for name, kind in kinds if isinstance(kind, Kind)}


def unpack(thing: object, record: Record) -> None:
    """Give an object the fields that `pack` wrote. Raises RecordError."""
    for name, kind in fates(type(thing)).items():
        if isinstance(kind, Kind):
            value = record.get(name, kind)
            if isinstance(getattr(thing, name), ctypes.Array):
                getattr(thing, name)[:] = value
            else:
                setattr(thing, name, value)
