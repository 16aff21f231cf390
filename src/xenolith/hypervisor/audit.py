"""The invariant checker: recounts every type and every reference from the page tables themselves.

`check` believes nothing that the frame table says beyond owners and which frames are page tables; it derives both
counts of every frame from who really refers to it and compares.  Run at the end of every guest test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xenolith.abi.hypercalls import DOMID_INVALID, DOMID_XEN
from xenolith.abi.layout import XEN_FIRST_SLOT, XEN_LAST_SLOT
from xenolith.abi.x86 import ENTRIES, PTE_ADDRESS, PTE_P, PTE_RW
from xenolith.hypervisor.frames import (
    ALLOCATED,
    EXISTENCE_COUNT,
    FOREIGN,
    PARTIAL,
    PINNED,
    PROGRESS_MASK,
    PROGRESS_SHIFT,
    TYPE_COUNT,
    TYPE_L1,
    TYPE_L4,
    TYPE_MASK,
    TYPE_NAMES,
    TYPE_SHIFT,
    TYPE_WRITABLE,
    UNDOING,
    VALIDATED,
)

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain
    from xenolith.hypervisor.hypervisor import Hypervisor

_U64 = np.uint64


class _Recount:
    """Expected counts of every frame of a domain's memory, and what was found wrong."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.frames = domain.frames
        self.counts = np.zeros(self.frames.frames, dtype=np.int64)
        self.types = np.zeros(self.frames.frames, dtype=np.int64)
        self.problems: list[str] = []

    def report(self, problem: str, mfn: int | None = None) -> None:
        self.problems.append(f"{self.domain!r}: {problem}" + (f": {self.frames.describe(mfn)}" if mfn else ""))

    def refer(self, mfn: int, kind: int | None = None) -> None:
        """One existence reference, and a type reference that needs type `kind`."""
        self.counts[mfn] += 1
        if kind is not None:
            self.types[mfn] += 1
            found = self.frames.type_info[mfn] & TYPE_MASK
            if found != kind:
                self.report(f"used as {TYPE_NAMES[kind >> TYPE_SHIFT]}", mfn)


def check(hypervisor: Hypervisor) -> list[str]:
    """Every violated invariant of the frame tables, as text. No vCPU may be running."""
    return [problem for domain in list(hypervisor.domains.values()) for problem in check_domain(domain)]


def check_domain(domain: Domain) -> list[str]:
    """Every violated invariant of one domain's frame table, as text. None of its vCPUs may be running."""
    frames = domain.frames
    recount = _Recount(domain)
    infos = frames.type_infos
    kinds = infos & _U64(TYPE_MASK)
    in_use = (infos & _U64(TYPE_COUNT)) != 0
    recount.counts[(frames.count_infos & _U64(ALLOCATED)) != 0] += 1
    pinned = (infos & _U64(PINNED)) != 0
    listed = sorted(domain.undo_list[: domain.undo_count])
    if listed != np.flatnonzero((infos & _U64(UNDOING)) != 0).tolist():
        recount.report(f"frames {listed} are to be undone, and others are marked")
    recount.counts[pinned] += 1
    recount.types[pinned] += 1
    for mfn in np.flatnonzero(in_use & (kinds >= _U64(TYPE_L1)) & (kinds <= _U64(TYPE_L4))).tolist():
        info = frames.type_info[mfn]
        if info & (PARTIAL | UNDOING):
            recount.refer(mfn, int(kinds[mfn]))
            _check_upper(recount, mfn, int(kinds[mfn]), (info & PROGRESS_MASK) >> PROGRESS_SHIFT)
        elif not info & VALIDATED:
            recount.report("in use but never validated", mfn)
        elif int(kinds[mfn]) == TYPE_L1:
            _check_l1(recount, mfn)
        else:
            _check_upper(recount, mfn, int(kinds[mfn]))
    for mfn, kind in domain.references():
        recount.refer(mfn, kind)
    _compare(recount)
    return recount.problems


def _check_l1(recount: _Recount, mfn: int) -> None:
    """Every mapping: of a frame that the domain may reach, writable only if that frame is writable."""
    domain, frames = recount.domain, recount.frames
    table = domain.memory.table(mfn)
    entries = table[(table & _U64(PTE_P)) != 0]
    targets = (entries & _U64(PTE_ADDRESS)) >> _U64(12)
    granted = domain.granted_frames()
    for target in targets[frames.owners[targets] != domain.domid].tolist():
        if target not in granted:
            recount.report("it maps a frame of another", target)
    writable = targets[(entries & _U64(PTE_RW)) != 0]
    for target in writable[(frames.type_infos[writable] & _U64(TYPE_MASK)) != _U64(TYPE_WRITABLE)].tolist():
        recount.report(f"mapped writable by L1 table {mfn:#x}", target)
    np.add.at(recount.counts, targets, 1)
    np.add.at(recount.types, writable, 1)


def _check_upper(recount: _Recount, mfn: int, kind: int, entries: int = ENTRIES) -> None:
    """Every link: to a table of the level below of the domain's own (or a read-only one of the same level)."""
    domain, frames = recount.domain, recount.frames
    table = domain.memory.table(mfn)[:entries]
    for slot in np.flatnonzero(table & _U64(PTE_P)).tolist():
        entry = int(table[slot])
        target = (entry & PTE_ADDRESS) >> 12
        if kind == TYPE_L4 and XEN_FIRST_SLOT <= slot <= XEN_LAST_SLOT:
            if not any(entry & ~0x60 == right & ~0x60 for right in _xen_entries(domain, slot)):
                recount.report(f"Xen's slot {slot} of L4 {mfn:#x} holds {entry:#x}")
            continue
        if target == mfn and not entry & PTE_RW:
            continue
        if frames.owner[target] != domain.domid:
            recount.report(f"L{kind >> TYPE_SHIFT} table {mfn:#x} links a frame of another: {target:#x}")
        below = kind - (1 << TYPE_SHIFT)
        linear = frames.type_info[target] & TYPE_MASK == kind and not entry & PTE_RW
        recount.refer(target, kind if linear else below)


def _xen_entries(domain: Domain, slot: int) -> list[int]:
    """What may be in this slot of Xen's in an L4 table."""
    views = [view[slot] for view in domain.engine_views if slot in view]
    return views or [domain.xen_l4_entries[slot - XEN_FIRST_SLOT]]


def _compare(recount: _Recount) -> None:
    domain, frames = recount.domain, recount.frames
    counts = (frames.count_infos & _U64(EXISTENCE_COUNT)).astype(np.int64)
    types = (frames.type_infos & _U64(TYPE_COUNT)).astype(np.int64)
    owned = (frames.owners == domain.domid) | (frames.owners == FOREIGN)
    for mfn in np.flatnonzero(owned & ((counts != recount.counts) | (types != recount.types))).tolist():
        recount.report(f"recounted {recount.counts[mfn]} references, {recount.types[mfn]} of type", mfn)
    free = frames.owners == DOMID_INVALID
    for mfn in np.flatnonzero(free & (counts + types + recount.counts != 0)).tolist():
        recount.report("free but referred to", mfn)
    for mfn in np.flatnonzero(~owned & ~free & (frames.owners != DOMID_XEN)).tolist():
        recount.report("owned by nobody who can", mfn)
    owns = int(((frames.owners == domain.domid) & ((frames.count_infos & _U64(ALLOCATED)) != 0)).sum())
    extra = 1 + len(domain.shared_frames()) if domain.domid else 0
    if domain.domid and domain.total_pages < owns - extra:
        recount.report(f"owns {owns} frames and is charged for {domain.total_pages}")
