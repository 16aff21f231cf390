"""Direct paging with validation (paper 3.3.3; Xen: arch/x86/pv/mm.c and arch/x86/mm.c).

The guest's page tables are the ones the processor walks.  The guest may read them; every change goes
through Xen.  A frame becomes a page table of level n when it is pinned, linked from level n+1 or loaded as
base pointer: then every entry is checked and takes its references (`validate`).  From then on single entries
change through `modify_entry`.  When the last such use is gone all references are dropped (`undo`).

References an entry holds: an L1 entry one existence reference on the frame it maps, and one type reference
(writable) if it maps it writable; an L2..L4 entry one existence and one type reference on the table below.

Bounded work.  A guest chooses how many tables hang below one entry, so neither validating them nor dropping what they
hold is done at a stretch: each takes from `Domain.work_left`.  When that is used up, `validate` leaves each table on
its way as PARTIAL, with what its first entries hold, and -ERESTART is returned: the guest makes the hypercall again,
and validation goes on where it was (Xen: PGT_partial).  Tables that are to drop their references stand in `undo_list`
as UNDOING; `undo` takes them from the last entry to the first, so that both states are the same: entries below the
progress noted hold their references.  Ring 0 empties that list before it does anything else for the domain.

Functions here need the lock of the domain concerned.  They return 0 or a negative Xen errno.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from xenolith.abi.errno import EBUSY, EINVAL, EPERM, ERESTART
from xenolith.abi.hypercalls import DOMID_INVALID
from xenolith.abi.layout import XEN_FIRST_SLOT, XEN_LAST_SLOT
from xenolith.abi.x86 import (
    ENTRIES,
    MASK64,
    PTE_A,
    PTE_ADDRESS,
    PTE_AVAIL,
    PTE_AVAIL_HIGH,
    PTE_D,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
)
from xenolith.hypervisor import descriptors, tlb
from xenolith.hypervisor.domain import UNLIMITED_WORK
from xenolith.hypervisor.frames import (
    ALLOCATED,
    EXISTENCE_COUNT,
    FOREIGN,
    INVALID_M2P_ENTRY,
    MOST_REFERENCES,
    PARTIAL,
    PINNED,
    PROGRESS_MASK,
    PROGRESS_SHIFT,
    TYPE_COUNT,
    TYPE_L1,
    TYPE_L2,
    TYPE_L3,
    TYPE_L4,
    TYPE_MASK,
    TYPE_SEGDESC,
    TYPE_SHIFT,
    TYPE_WRITABLE,
    UNDOING,
    VALIDATED,
)

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

ADJUSTABLE: Final = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_AVAIL | PTE_AVAIL_HIGH | PTE_NX
# Bits a guest may not set in a present entry. Global is tolerated in L1 entries and has no effect.
DISALLOWED: Final = ~(ADJUSTABLE | PTE_ADDRESS) & MASK64
L1_DISALLOWED: Final = DISALLOWED & ~PTE_G
# Changes of these bits alone move no reference (Xen: FASTPATH_FLAG_WHITELIST).
UNCOUNTED: Final = PTE_NX | PTE_AVAIL_HIGH | PTE_AVAIL | PTE_G | PTE_D | PTE_A | PTE_US
COUNTED: Final = ~UNCOUNTED & MASK64
GUEST_KERNEL: Final = 1 << 52  # Xen's mark on an L1 entry that the guest gave without the user bit
# What of Domain.work_left things cost. An entry of an upper table, the cheapest, takes Python a microsecond or two.
L1_WORK: Final = 48
PAGE_WORK: Final = 128  # all descriptors of a page
FREE_WORK: Final = 16  # with a TLB flush
PHYSICAL_BITS: Final = 46  # width of a machine address

_U64 = np.uint64
_ADDRESS = _U64(PTE_ADDRESS)
_TYPE_COUNT = _U64(TYPE_COUNT)
_TYPE_MASK = _U64(TYPE_MASK)
_TYPE_WRITABLE = _U64(TYPE_WRITABLE)


def adjust_l1(entry: int) -> int:
    """An L1 entry as it is stored: guest-kernel pages too need the user bit, since the kernel runs at CPL 3."""
    if entry & GUEST_KERNEL:
        return entry | PTE_US
    return entry | PTE_US | PTE_G if entry & PTE_US else entry | PTE_US | GUEST_KERNEL


def absent_frame(mfn: int) -> int:
    """The errno for mapping an address without memory: device registers, of which a domain has none, or nonsense."""
    return -EPERM if mfn >> PHYSICAL_BITS - 12 == 0 else -EINVAL


# --- frame types -----------------------------------------------------------------------------------


def get_page_type(domain: Domain, mfn: int, wanted: int) -> int:
    """Take a type reference on a frame of this domain, of which the caller holds an existence reference.

    Changes the type, validating a page table or descriptor page, if nothing uses the frame otherwise.
    """
    frames = domain.frames
    info = frames.type_info[mfn]
    if not info & TYPE_COUNT:
        if info & TYPE_MASK != wanted:
            if frames.stamp[mfn] == domain.flush_epoch and (info & TYPE_MASK == TYPE_WRITABLE or domain.caches_tables):
                tlb.flush_domain(domain)
            info = wanted | (VALIDATED if wanted == TYPE_WRITABLE else 0)
        if info & VALIDATED:
            frames.type_info[mfn] = info + 1
            return 0
        return _validate_from(domain, mfn, wanted, 0)
    if info & TYPE_MASK != wanted:
        return -EINVAL
    if info & PARTIAL:
        frames.put_page(mfn)  # the caller has one, too
        return _validate_from(domain, mfn, wanted, (info & PROGRESS_MASK) >> PROGRESS_SHIFT)
    if not info & VALIDATED or info & TYPE_COUNT >= MOST_REFERENCES:  # being (de)validated, or used too often
        return -EINVAL
    frames.type_info[mfn] = info + 1
    return 0


def _validate_from(domain: Domain, mfn: int, wanted: int, progress: int) -> int:
    """Validate the rest of a frame for its first type reference."""
    frames = domain.frames
    frames.type_info[mfn] = wanted | 1
    result, progress = validate(domain, mfn, wanted, progress)
    if not result:
        frames.type_info[mfn] = wanted | VALIDATED | 1
    elif not progress:
        frames.type_info[mfn] = 0
    elif result == -ERESTART:
        frames.type_info[mfn] = wanted | PARTIAL | progress << PROGRESS_SHIFT | 1
        frames.count_info[mfn] += 1
    else:
        _begin_undo(domain, mfn, wanted, progress)
        undo(domain)
    return result


def put_page_type(domain: Domain, mfn: int) -> None:
    """Drop a type reference; the last one of a page table drops all that its entries hold, as far as work is left."""
    _put_type(domain, mfn)
    undo(domain)


def _put_type(domain: Domain, mfn: int) -> None:
    frames = domain.frames
    info = frames.type_info[mfn]
    assert info & TYPE_COUNT, frames.describe(mfn)
    info -= 1
    frames.type_info[mfn] = info
    if not info & TYPE_COUNT:
        frames.stamp[mfn] = domain.flush_epoch
        kind = info & TYPE_MASK
        if info & VALIDATED and TYPE_L1 <= kind <= TYPE_L4:
            if kind == TYPE_L1:
                _devalidate_l1(domain, mfn)
                frames.type_info[mfn] = kind
            else:
                _begin_undo(domain, mfn, kind, ENTRIES)


def get_page_and_type(domain: Domain, mfn: int, wanted: int) -> int:
    """Take an existence and a type reference on one of the domain's frames."""
    if not domain.frames.get_page(mfn, domain.domid):
        return -EINVAL
    result = get_page_type(domain, mfn, wanted)
    if result:
        put_page(domain, mfn)
    return result


def put_page(domain: Domain, mfn: int) -> None:
    """Drop an existence reference; with the last one the frame is freed."""
    if domain.frames.put_page(mfn):
        free_frames(domain, [mfn])


def put_page_and_type(domain: Domain, mfn: int) -> None:
    put_page_type(domain, mfn)
    put_page(domain, mfn)


def free_frames(domain: Domain, mfns: list[int]) -> None:
    """Frames without references left return to the machine; no TLB may know them any more."""
    tlb.flush_domain(domain)
    domain.work_left -= FREE_WORK + len(mfns)
    freed = np.array(mfns, dtype=np.uint64)
    assert (domain.frames.owners[freed] == domain.domid).all(), f"{domain!r} frees {mfns[:8]}"
    domain.view.m2p_words[freed] = _U64(INVALID_M2P_ENTRY)
    domain.frames.release(freed)
    domain.total_pages -= len(mfns)


def validate(domain: Domain, mfn: int, kind: int, first: int = 0) -> tuple[int, int]:
    """Check every entry of a frame that is to become a page table or descriptor page, and take its references.

    Begins with entry `first`.  Gives a result, and below which entry references are held.
    """
    if kind == TYPE_L1:
        domain.work_left -= L1_WORK
        return _validate_l1(domain, mfn), 0
    if kind == TYPE_SEGDESC:
        domain.work_left -= PAGE_WORK
        return descriptors.validate_descriptor_page(domain, mfn), 0
    return _validate_upper(domain, mfn, kind, first)


# --- undoing tables --------------------------------------------------------------------------------


def _begin_undo(domain: Domain, mfn: int, kind: int, progress: int, others: int = 0) -> None:
    """Have an L2..L4 table drop what its entries below `progress` hold. It has `others` type references."""
    frames = domain.frames
    frames.type_info[mfn] = kind | UNDOING | progress << PROGRESS_SHIFT | others + 1
    frames.count_info[mfn] += 1  # MOST_REFERENCES leaves room for it
    domain.undo_list[domain.undo_count] = mfn  # never more than roots of one operation, and a table or two a level
    domain.undo_count += 1


def undo(domain: Domain) -> bool:
    """Let the tables in `undo_list` drop what their entries hold. False: some is left, as no work was.

    The entries themselves stay.
    """
    frames = domain.frames
    while domain.undo_count:
        depth = domain.undo_count
        mfn = domain.undo_list[depth - 1]
        info = frames.type_info[mfn]
        kind = info & TYPE_MASK
        table = domain.memory.table(mfn)
        for slot in np.flatnonzero(table[: (info & PROGRESS_MASK) >> PROGRESS_SHIFT] & _U64(PTE_P))[::-1].tolist():
            if kind == TYPE_L4 and XEN_FIRST_SLOT <= slot <= XEN_LAST_SLOT:
                continue
            if domain.work_left <= 0:
                frames.type_info[mfn] = info & ~PROGRESS_MASK | slot + 1 << PROGRESS_SHIFT
                return False
            domain.work_left -= 1
            _put_table(domain, int(table[slot]), mfn, kind - (1 << TYPE_SHIFT))
            if domain.undo_count > depth:  # that was its last use: first the table below
                info = frames.type_info[mfn]
                frames.type_info[mfn] = info & ~PROGRESS_MASK | slot << PROGRESS_SHIFT
                break
        else:
            domain.undo_count = depth - 1
            frames.type_info[mfn] = kind | (frames.type_info[mfn] & TYPE_COUNT) - 1
            frames.stamp[mfn] = domain.flush_epoch
            if domain.entry_changed is not None:
                domain.entry_changed(mfn << 9, PTE_P, 0)
            put_page(domain, mfn)
    return True


# --- whole tables ----------------------------------------------------------------------------------


def _validate_l1(domain: Domain, mfn: int) -> int:
    frames = domain.frames
    table = domain.memory.table(mfn)
    slots = np.flatnonzero(table & _U64(PTE_P))
    if not len(slots):
        return 0
    entries = table[slots]
    if (entries & _U64(L1_DISALLOWED)).any():
        return -EINVAL
    targets = (entries & _ADDRESS) >> _U64(12)
    if int(targets.max()) >= frames.frames:
        return absent_frame(int(targets.max()))
    if (frames.owners[targets] != domain.domid).any():
        return -EBUSY
    writable = targets[(entries & _U64(PTE_RW)) != 0]
    if ((frames.count_infos[targets] & _U64(EXISTENCE_COUNT)) >= _U64(MOST_REFERENCES)).any():
        return -EBUSY
    if len(writable):
        infos = frames.type_infos[writable]
        if ((infos & _TYPE_COUNT) >= _U64(MOST_REFERENCES)).any():
            return -EBUSY
        changes = (infos & _TYPE_MASK) != _TYPE_WRITABLE
        if changes.any():
            if (infos[changes] & _TYPE_COUNT).any():
                return -EBUSY
            fresh = writable[changes]
            if domain.caches_tables and (frames.stamps[fresh] == domain.flush_epoch).any():
                tlb.flush_domain(domain)
            frames.type_infos[fresh] = _U64(TYPE_WRITABLE | VALIDATED)
        np.add.at(frames.type_infos, writable, _U64(1))
    np.add.at(frames.count_infos, targets, _U64(1))
    kernel = (entries & _U64(PTE_US)) == 0
    marked = (entries & _U64(GUEST_KERNEL)) != 0
    adjusted = entries | _U64(PTE_US)
    adjusted[kernel] |= _U64(GUEST_KERNEL)
    adjusted[~kernel & ~marked] |= _U64(PTE_G)
    table[slots] = adjusted
    if domain.executable_mapped is not None:
        executable = targets[(entries & _U64(PTE_NX)) == 0].tolist()
        domain.work_left -= len(executable) // 2
        for target in executable:
            domain.executable_mapped(target)
    return 0


def _devalidate_l1(domain: Domain, mfn: int) -> None:
    domain.work_left -= L1_WORK
    frames = domain.frames
    table = domain.memory.table(mfn)
    entries = table[np.flatnonzero(table & _U64(PTE_P))]
    if not len(entries):
        return
    targets = (entries & _ADDRESS) >> _U64(12)
    writable = targets[(entries & _U64(PTE_RW)) != 0]
    np.subtract.at(frames.type_infos, writable, _U64(1))
    frames.stamps[writable] = domain.flush_epoch
    np.subtract.at(frames.count_infos, targets, _U64(1))
    # What went below zero has borrowed from the flags.
    assert not ((frames.type_infos[writable] & _TYPE_COUNT) > _U64(MOST_REFERENCES)).any(), f"table {mfn:#x}"
    assert not ((frames.count_infos[targets] & _U64(EXISTENCE_COUNT)) > _U64(MOST_REFERENCES)).any(), f"table {mfn:#x}"
    unused = targets[(frames.count_infos[targets] & _U64(EXISTENCE_COUNT)) == 0]
    if len(unused):
        free_frames(domain, np.unique(unused).tolist())
    if domain.entry_changed is not None:
        domain.entry_changed(mfn << 9, PTE_P, 0)


def choose_view(domain: Domain, l4_mfn: int, kernel_mode: bool) -> None:
    """Map the engine's part of an L4 table as it wants it where the table serves this mode. The caller flushes."""
    q = domain.memory.q
    for slot, entry in domain.engine_views[kernel_mode].items():
        index = l4_mfn << 9 | slot
        old = q[index]
        if (old ^ entry) & ~(PTE_A | PTE_D):
            q[index] = entry
            if domain.entry_changed is not None:
                domain.entry_changed(index, old, entry)


def _validate_upper(domain: Domain, mfn: int, kind: int, first: int) -> tuple[int, int]:
    """L2, L3 and L4 tables: take the tables below, and Xen's slots into an L4."""
    below = kind - (1 << TYPE_SHIFT)
    table = domain.memory.table(mfn)
    if kind == TYPE_L4 and not first:
        table[XEN_FIRST_SLOT : XEN_LAST_SLOT + 1] = domain.xen_l4_entries
    for slot in (np.flatnonzero(table[first:] & _U64(PTE_P)) + first).tolist():
        if kind == TYPE_L4 and XEN_FIRST_SLOT <= slot <= XEN_LAST_SLOT:
            continue
        if domain.work_left <= 0:
            return -ERESTART, slot
        domain.work_left -= 1
        entry = int(table[slot])
        result = _get_table(domain, entry, mfn, below)
        if result:
            return result, slot
        table[slot] = entry | PTE_US
    return 0, ENTRIES


def _get_table(domain: Domain, entry: int, holder: int, below: int) -> int:
    """Take the references of a present L2..L4 entry in table `holder`."""
    if entry & DISALLOWED:
        return -EINVAL
    mfn = (entry & PTE_ADDRESS) >> 12
    result = get_page_and_type(domain, mfn, below)
    if result == -EINVAL and domain.frames.valid(mfn):
        return _get_linear(domain, entry, holder, below + (1 << TYPE_SHIFT))
    return result


def _put_table(domain: Domain, entry: int, holder: int, below: int) -> None:
    """Drop them; what a table below then has to drop is left to `undo`."""
    mfn = (entry & PTE_ADDRESS) >> 12
    if mfn == holder:
        return  # a linear map of the table itself holds nothing
    if domain.frames.type_info[mfn] & TYPE_MASK == below + (1 << TYPE_SHIFT):
        _put_linear(domain, mfn, holder)
    else:
        _put_type(domain, mfn)
        put_page(domain, mfn)


# --- linear page tables ----------------------------------------------------------------------------
# An entry may point read-only to a table of its own level: itself, or another one already validated.  A table
# may not both contain such entries to others and be the target of one, or chains and loops would keep
# references alive for ever (XSA-240).  `domain.linear` counts entries (positive) or uses (negative) per table.


def _get_linear(domain: Domain, entry: int, holder: int, level: int) -> int:
    mfn = (entry & PTE_ADDRESS) >> 12
    if entry & PTE_RW:
        return -EINVAL
    if mfn == holder:
        return 0
    frames, linear = domain.frames, domain.linear
    info = frames.type_info[mfn]
    if info & TYPE_MASK != level or not info & VALIDATED or not 0 < info & TYPE_COUNT < MOST_REFERENCES:
        return -EINVAL
    if linear.get(holder, 0) < 0 or linear.get(mfn, 0) > 0 or not frames.get_page(mfn, domain.domid):
        return -EINVAL
    domain.python_references = True
    linear[holder] = linear.get(holder, 0) + 1
    linear[mfn] = linear.get(mfn, 0) - 1
    frames.type_info[mfn] = info + 1
    return 0


def _put_linear(domain: Domain, mfn: int, holder: int) -> None:
    linear = domain.linear
    linear[holder] -= 1
    linear[mfn] += 1
    for table in (holder, mfn):
        if not linear[table]:
            del linear[table]
    _put_type(domain, mfn)
    put_page(domain, mfn)


# --- single entries --------------------------------------------------------------------------------


def modify_l1(domain: Domain, index: int, new: int, owner: int | None = None) -> int:
    """Change an entry of a validated L1 table. `index` counts 64-bit words of machine memory.

    The entry may map frames of `owner`: the domain itself, or FOREIGN for the grant operation that has made an alias.
    """
    frames, q = domain.frames, domain.memory.q
    old = q[index]
    if new & PTE_P:
        if new & L1_DISALLOWED:
            return -EINVAL
        new = adjust_l1(new)
        target = (new & PTE_ADDRESS) >> 12
        if owner == FOREIGN:
            domain.python_references = True
        if old & PTE_P and not (old ^ new) & COUNTED:
            q[index] = new
            if domain.entry_changed is not None:
                domain.entry_changed(index, old, new)
            if (old ^ new) & PTE_NX and not new & PTE_NX and domain.executable_mapped is not None:
                domain.executable_mapped(target)
            return 0
        if target >= frames.frames:
            return absent_frame(target)
        if not frames.get_page(target, domain.domid if owner is None else owner):
            return -EBUSY
        if new & PTE_RW and get_page_type(domain, target, TYPE_WRITABLE):
            put_page(domain, target)
            return -EBUSY
        q[index] = new
        if not new & PTE_NX and domain.executable_mapped is not None:
            domain.executable_mapped(target)
    else:
        q[index] = new
    if old & PTE_P:
        if domain.entry_changed is not None:
            domain.entry_changed(index, old, new)
        put_l1_target(domain, old)
    return 0


def put_l1_target(domain: Domain, old: int) -> None:
    """Drop what a present L1 entry held."""
    frames = domain.frames
    target = (old & PTE_ADDRESS) >> 12
    if old & PTE_RW:
        _put_type(domain, target)
    elif frames.type_info[target] & TYPE_MASK == TYPE_SEGDESC and domain.ldt_in_use:
        descriptors.drop_ldt(domain)
    put_page(domain, target)


def modify_upper(domain: Domain, index: int, new: int, kind: int) -> int:
    """Change an entry of a validated L2..L4 table (`kind`). `index` counts 64-bit words of machine memory."""
    holder = index >> 9
    if kind == TYPE_L4 and XEN_FIRST_SLOT <= index & 511 <= XEN_LAST_SLOT:
        return -EINVAL
    q = domain.memory.q
    old = q[index]
    below = kind - (1 << TYPE_SHIFT)
    if new & PTE_P:
        if new & DISALLOWED:
            return -EINVAL
        if old & PTE_P and not (old ^ new) & COUNTED:
            q[index] = new | PTE_US
            if domain.entry_changed is not None:
                domain.entry_changed(index, old, new)
            return 0
        result = _get_table(domain, new, holder, below)
        if result:
            return result
        new |= PTE_US
    q[index] = new
    if old & PTE_P:
        if domain.entry_changed is not None:
            domain.entry_changed(index, old, new)
        _put_table(domain, old, holder, below)
        undo(domain)
    return 0


def modify_entry(domain: Domain, address: int, new: int, preserve_ad: bool) -> int:
    """Write a word at a machine address of the domain's, as a page-table entry if the frame is a page table.

    `address` is 8-byte aligned, the frame is referenced by the caller.  A frame that is no page table is written
    as plain memory if it may be writable (Xen: do_mmu_update).
    """
    index = address >> 3
    mfn = address >> 12
    info = domain.frames.type_info[mfn]
    kind = info & TYPE_MASK
    if TYPE_L1 <= kind <= TYPE_L4 and info & TYPE_COUNT and info & VALIDATED:
        if preserve_ad:
            new |= domain.memory.q[index] & (PTE_A | PTE_D)
        if kind == TYPE_L1:
            return modify_l1(domain, index, new)
        return modify_upper(domain, index, new, kind)
    result = get_page_type(domain, mfn, TYPE_WRITABLE)
    if result:
        return result
    domain.memory.q[index] = new
    put_page_type(domain, mfn)
    if domain.executable_mapped is not None:
        domain.executable_mapped(mfn)
    return 0


# --- pins and base pointers ------------------------------------------------------------------------


def pin(domain: Domain, mfn: int, kind: int) -> int:
    """Make a frame a page table of level `kind` and keep it one (MMUEXT_PIN_Ln_TABLE)."""
    result = get_page_and_type(domain, mfn, kind)
    if result:
        return result
    type_info = domain.frames.type_info
    if type_info[mfn] & PINNED:
        put_page_and_type(domain, mfn)
        return -EINVAL
    type_info[mfn] |= PINNED
    return 0


def unpin(domain: Domain, mfn: int) -> int:
    """Drop the references of a pin (MMUEXT_UNPIN_TABLE)."""
    frames = domain.frames
    if not frames.get_page(mfn, domain.domid):
        return -EINVAL
    pinned = frames.type_info[mfn] & PINNED
    if pinned:
        frames.type_info[mfn] &= ~PINNED
        put_page_and_type(domain, mfn)
    put_page(domain, mfn)
    return 0 if pinned else -EINVAL


def get_bases(domain: Domain, kernel_l4: int, user_l4: int) -> int:
    """Take the references of a vCPU's base pointers (user_l4 0: none), of both or of neither."""
    result = get_page_and_type(domain, kernel_l4, TYPE_L4)
    if result or not user_l4:
        return result
    result = get_page_and_type(domain, user_l4, TYPE_L4)
    if result == -ERESTART and domain.frames.type_info[kernel_l4] & (TYPE_COUNT | PINNED) == 1:
        domain.frames.type_info[kernel_l4] = TYPE_L4 | PARTIAL | ENTRIES << PROGRESS_SHIFT | 1  # not to be done again
    elif result:
        put_page_and_type(domain, kernel_l4)
    return result


def set_bases(vcpu: Vcpu, kernel_l4: int, user_l4: int) -> None:
    """Make these, of which the references are held, the tables of a vCPU that has none (0: no user table)."""
    choose_view(vcpu.domain, kernel_l4, True)
    if user_l4:
        choose_view(vcpu.domain, user_l4, False)
    vcpu.kernel_l4, vcpu.user_l4 = kernel_l4, user_l4


def drop_base(domain: Domain, old: int) -> None:
    """Drop the references of a former base pointer (0: none)."""
    if old:
        put_page_and_type(domain, old)


def relinquish(domain: Domain) -> None:
    """Give back everything a dead domain holds in page tables and frames (Xen: domain_relinquish_resources).

    No vCPU of it may run any more.  Frames that others still map stay until they are unmapped.
    """
    frames = domain.frames
    domain.work_left = UNLIMITED_WORK
    undo(domain)
    typed = np.flatnonzero((frames.type_infos != 0) & (frames.owners == domain.domid))
    for mfn in typed[(frames.type_infos[typed] & _U64(PARTIAL)) != 0].tolist():
        info = frames.type_info[mfn]
        frames.put_page(mfn)
        _begin_undo(domain, mfn, info & TYPE_MASK, (info & PROGRESS_MASK) >> PROGRESS_SHIFT)
        undo(domain)
    for vcpu in domain.vcpus:
        drop_base(domain, vcpu.kernel_l4)
        drop_base(domain, vcpu.user_l4)
        vcpu.kernel_l4 = vcpu.user_l4 = 0
    for mfn in typed[(frames.type_infos[typed] & _U64(PINNED)) != 0].tolist():
        unpin(domain, mfn)
    # Read-only linear maps and rings of tables can keep each other alive: break them level by level.
    for kind in (TYPE_L4, TYPE_L3, TYPE_L2, TYPE_L1):
        for mfn in typed[(frames.type_infos[typed] & _TYPE_MASK) == _U64(kind)].tolist():
            info = frames.type_info[mfn]
            if not info & TYPE_COUNT or not info & VALIDATED:
                continue
            if kind == TYPE_L1:
                frames.type_info[mfn] = info & ~VALIDATED
                _devalidate_l1(domain, mfn)
            else:
                _begin_undo(domain, mfn, kind, ENTRIES, info & TYPE_COUNT)
                undo(domain)
    # What nothing holds but its allocation is free at once; the rest loses that and stays as long as it is held.
    owned = frames.owners == domain.domid
    held = np.flatnonzero(owned & (frames.count_infos != _U64(ALLOCATED | 1)))
    owned[held] = False
    frames.owners[owned] = DOMID_INVALID
    frames.count_infos[owned] = 0
    for mfn in held.tolist():
        if frames.count_info[mfn] & ALLOCATED:
            frames.count_info[mfn] -= ALLOCATED + 1
    domain.total_pages = len(held)


__all__ = ["TYPE_L1", "TYPE_L2", "TYPE_L3", "TYPE_L4"]  # for those who name levels by way of this module
