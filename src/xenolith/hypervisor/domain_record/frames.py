"""The frames of a domain in its record: which it has, which are pinned tables, which it shares with Xen.

The frame table is not in a record. Every type and every count is had anew by taking the references again, through
`paging`, which validates each table and descriptor as if the guest asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenolith.abi import layout
from xenolith.abi.grant_table import GRANT_ENTRY_SIZES, GTF_reading, GTF_transitive, GTF_type_mask, GTF_writing
from xenolith.abi.layout import VCPU_INFO_SIZE
from xenolith.abi.x86 import MASK64, PAGE_SIZE
from xenolith.hypervisor import paging
from xenolith.hypervisor.domain import Domain
from xenolith.hypervisor.domain_record.kinds import U64, Listing, Number, Record, RecordError
from xenolith.hypervisor.frames import ALLOCATED, INVALID_M2P_ENTRY, PINNED, TYPE_L4, TYPE_MASK, TYPE_SHIFT, VALIDATED
from xenolith.hypervisor.grants import status_frames
from xenolith.machine.memory import LOCAL_APIC_MFN, Frames

_U64 = np.uint64


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


def frame_types(domain: Domain, mfns: Frames) -> FrameTypes:
    """The frame table's entries for these frames of a domain's. The caller holds its lock."""
    frames = domain.frames
    types, counts = frames.type_infos.copy(), frames.count_infos.copy()
    for mfn, kind in domain.references():
        counts[mfn] -= _U64(1)
        if kind is not None:
            types[mfn] -= _U64(1)
    return FrameTypes(types[mfns], counts[mfns], dict(domain.linear))


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


def take_frames(domain: Domain, record: Record, frames: FrameRecord, types: FrameTypes | None) -> None:
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
        headers &= _U64(~(GTF_reading | GTF_writing) & MASK64)
    for mfn in domain.grants.status_frames:
        domain.memory.table(mfn)[:] = 0


def pin_tables(domain: Domain, frames: FrameRecord) -> None:
    """Pin every table that was pinned. One with read-only links to others of its level has to come after those."""
    waiting = list(zip(frames.pinned.tolist(), frames.levels.tolist(), strict=True))
    while waiting:
        refused = [each for each in waiting if paging.pin(domain, each[0], each[1] << TYPE_SHIFT)]
        if len(refused) == len(waiting):
            raise RecordError(f"frame {refused[0][0]:#x} cannot be the L{refused[0][1]} table that it is said to be")
        waiting = refused
