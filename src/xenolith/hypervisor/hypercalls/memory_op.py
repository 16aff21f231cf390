"""memory_op: a domain's reservation of frames (public/memory.h; Xen: common/memory.c).

The number of extents done is the result of the extent operations, also when a later one fails; the guest goes on
from there.  The command carries the extent to start with in its upper bits.  Between two extents, or two exchanges, a
hypercall that has used up its trap's work is restarted.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

import numpy as np

from xenolith.abi import layout
from xenolith.abi.errno import EACCES, EFAULT, EINVAL, ENOBUFS, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, ESRCH
from xenolith.abi.hypercalls import (
    DOMID_SELF,
    HYPERVISOR_memory_op,
    XENMEM_add_to_physmap,
    XENMEM_current_reservation,
    XENMEM_decrease_reservation,
    XENMEM_exchange,
    XENMEM_get_vnumainfo,
    XENMEM_increase_reservation,
    XENMEM_machine_memory_map,
    XENMEM_machphys_mapping,
    XENMEM_machphys_mfn_list,
    XENMEM_maximum_gpfn,
    XENMEM_maximum_ram_page,
    XENMEM_maximum_reservation,
    XENMEM_memory_map,
    XENMEM_populate_physmap,
    XENMEM_set_memory_map,
)
from xenolith.hypervisor import paging
from xenolith.hypervisor.frames import ALLOCATED, INVALID_M2P_ENTRY, PINNED, TYPE_COUNT
from xenolith.hypervisor.guest_memory import copy_from_guest, copy_to_guest
from xenolith.hypervisor.view import M2P_ALIAS_VA
from xenolith.machine.memory import OutOfMemory

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

OPERATION_MASK: Final = 63
EXTENT_SHIFT: Final = 6
MAX_ORDER: Final = 9  # of an extent that an unprivileged domain may ask for
EXTENT_WORK: Final = 8  # see paging; a frame is 1
MACHPHYS_MAPPING: Final = Struct("<QQQ")  # v_start, v_end, max_mfn
MFN_LIST: Final = Struct("<IIQI4x")  # max_extents, pad, extent_start, nr_extents
MEMORY_MAP: Final = Struct("<I4xQ")  # nr_entries, buffer
E820_ENTRY: Final = Struct("<QQI")
EXCHANGE: Final = Struct("<QQIIH6xQQIIH6xQ")


def do_memory_op(vcpu: Vcpu, command: int, argument: int) -> int:
    """Increase, decrease, populate or exchange frames, and questions about them."""
    start = command >> EXTENT_SHIFT
    operation = command & OPERATION_MASK
    if operation in (XENMEM_increase_reservation, XENMEM_decrease_reservation, XENMEM_populate_physmap):
        return _extents(vcpu, operation, start, argument)
    if start and operation != XENMEM_exchange:
        return -EINVAL if operation in _SIMPLE else -ENOSYS
    function = _SIMPLE.get(operation)
    return -ENOSYS if function is None else function(vcpu, argument)


# --- extents ---------------------------------------------------------------------------------------


def _extents(vcpu: Vcpu, operation: int, start: int, argument: int) -> int:
    """populate_physmap, increase_reservation and decrease_reservation."""
    data = copy_from_guest(vcpu, argument, layout.MEMORY_RESERVATION.size)
    if data is None:
        return start
    fields: tuple[int, ...] = layout.MEMORY_RESERVATION.unpack(data)
    extents_va, count, order, _, domid = fields[:5]
    domain = vcpu.domain
    if count >> 32 - EXTENT_SHIFT or start >= count or domid not in (DOMID_SELF, domain.domid):
        return start
    if order > MAX_ORDER:
        return start
    if not extents_va and operation != XENMEM_increase_reservation:
        return start
    for handled in range(start, count):
        if domain.work_left <= 0 and handled > start:
            return vcpu.restart_hypercall(HYPERVISOR_memory_op, operation | handled << EXTENT_SHIFT, argument)
        domain.work_left -= EXTENT_WORK + (1 << order)
        if not _EXTENT[operation](vcpu, extents_va + 8 * handled if extents_va else 0, order):
            return handled
    return count


def _populate(vcpu: Vcpu, extent_va: int, order: int) -> bool:
    """One extent of new frames at the pfn that the guest names; the first MFN replaces it."""
    domain = vcpu.domain
    data = copy_from_guest(vcpu, extent_va, 8)
    if data is None:
        return False
    pfn = layout.U64.unpack(data)[0]
    first = allocate_extent(domain, order)
    if first is None:
        return False
    _set_pfns(domain, first, pfn, order)
    return copy_to_guest(vcpu, extent_va, layout.U64.pack(first))


def _increase(vcpu: Vcpu, extent_va: int, order: int) -> bool:
    """One extent of new frames that have no pfn yet."""
    first = allocate_extent(vcpu.domain, order)
    if first is None:
        return False
    return not extent_va or copy_to_guest(vcpu, extent_va, layout.U64.pack(first))


def _decrease(vcpu: Vcpu, extent_va: int, order: int) -> bool:
    """Give one extent back."""
    data = copy_from_guest(vcpu, extent_va, 8)
    if data is None:
        return False
    first = layout.U64.unpack(data)[0]
    return remove_pages(vcpu.domain, first, 1 << order)


_EXTENT: Final = {
    XENMEM_populate_physmap: _populate,
    XENMEM_increase_reservation: _increase,
    XENMEM_decrease_reservation: _decrease,
}


def allocate_extent(domain: Domain, order: int) -> int | None:
    """2**order new frames for the domain, within its limit; the first MFN."""
    count = 1 << order
    if domain.total_pages + count > domain.max_pages or domain.dying:
        return None
    try:
        first = domain.memory.allocate_extent(order)
    except OutOfMemory:
        return None
    domain.frames.assign(np.arange(first, first + count, dtype=np.uint64), domain.domid)
    domain.view.m2p_words[first : first + count] = np.uint64(INVALID_M2P_ENTRY)
    domain.total_pages += count
    return first


def _set_pfns(domain: Domain, first: int, pfn: int, order: int) -> None:
    """The frames from `first` on are the guest's pages from `pfn` on; what a guest names may wrap."""
    m2p = domain.view.m2p_words
    m2p[first : first + (1 << order)] = np.arange(1 << order, dtype=np.uint64) + np.uint64(pfn)


def remove_pages(domain: Domain, first: int, count: int = 1) -> bool:
    """Drop the allocation's references; frames are freed that nothing else holds (Xen: guest_remove_page).

    Stops where a frame is not the domain's: False.  A second time, while something still holds it, nothing happens.
    """
    frames = domain.frames
    unused = []
    for mfn in range(first, first + count):
        if not frames.get_page(mfn, domain.domid):
            break
        frames.drop_allocation(mfn)
        if frames.put_page(mfn):
            unused.append(mfn)
        else:
            domain.python_references = True
    else:
        mfn = first + count
    if unused:
        paging.free_frames(domain, unused)
    return mfn == first + count


# --- questions -------------------------------------------------------------------------------------


def _domain_argument(vcpu: Vcpu, argument: int) -> Domain | int:
    data = copy_from_guest(vcpu, argument, 2)
    if data is None:
        return -EFAULT
    domid = layout.U16.unpack(data)[0]
    if domid in (DOMID_SELF, vcpu.domain.domid):
        return vcpu.domain
    return -EPERM if vcpu.domain.hypervisor.domain(domid) else -ESRCH


def _current_reservation(vcpu: Vcpu, argument: int) -> int:
    domain = _domain_argument(vcpu, argument)
    return domain if isinstance(domain, int) else domain.total_pages


def _maximum_reservation(vcpu: Vcpu, argument: int) -> int:
    domain = _domain_argument(vcpu, argument)
    return domain if isinstance(domain, int) else domain.max_pages


def _maximum_gpfn(vcpu: Vcpu, argument: int) -> int:
    domain = _domain_argument(vcpu, argument)
    if isinstance(domain, int):
        return domain
    max_pfn: int = layout.U64.unpack_from(domain.memory.b, domain.shared_info + layout.SHARED_MAX_PFN)[0]
    return max(0, max_pfn - 1 & 0x7FFF_FFFF_FFFF_FFFF) if max_pfn else -1


def _maximum_ram_page(vcpu: Vcpu, _: int) -> int:
    return vcpu.domain.memory.frames


def _machphys_mapping(vcpu: Vcpu, argument: int) -> int:
    view = vcpu.domain.view
    reply = MACHPHYS_MAPPING.pack(M2P_ALIAS_VA, M2P_ALIAS_VA + view.m2p_bytes, view.memory.frames - 1)
    return 0 if copy_to_guest(vcpu, argument, reply) else -EFAULT


def _machphys_mfn_list(vcpu: Vcpu, argument: int) -> int:
    data = copy_from_guest(vcpu, argument, MFN_LIST.size)
    if data is None:
        return -EFAULT
    wanted, _, list_va, _ = MFN_LIST.unpack(data)
    extents = vcpu.domain.view.m2p_extents[:wanted]
    for position, mfn in enumerate(extents):
        if not copy_to_guest(vcpu, list_va + 8 * position, layout.U64.pack(mfn)):
            return -EFAULT
    return 0 if copy_to_guest(vcpu, argument, MFN_LIST.pack(wanted, 0, list_va, len(extents))) else -EFAULT


def _memory_map(vcpu: Vcpu, argument: int) -> int:
    entries = vcpu.domain.memory_map
    if not entries:
        return -ENOSYS  # the domain has no map of its own: all its memory from 0 on
    data = copy_from_guest(vcpu, argument, MEMORY_MAP.size)
    if data is None:
        return -EFAULT
    room, buffer_va = MEMORY_MAP.unpack(data)
    if room < len(entries):
        return -ENOBUFS if copy_to_guest(vcpu, argument, layout.U32.pack(len(entries))) else -EFAULT
    packed = b"".join(E820_ENTRY.pack(*entry) for entry in entries)
    if not copy_to_guest(vcpu, buffer_va, packed):
        return -EFAULT
    return 0 if copy_to_guest(vcpu, argument, layout.U32.pack(len(entries))) else -EFAULT


def _add_to_physmap(vcpu: Vcpu, argument: int) -> int:
    """For domains whose physical addresses are translated, which a PV guest's are not."""
    data = copy_from_guest(vcpu, argument, layout.ADD_TO_PHYSMAP_SIZE)
    if data is None:
        return -EFAULT
    domid = layout.U16.unpack_from(data)[0]
    if domid in (DOMID_SELF, vcpu.domain.domid):
        return -EACCES
    return -EPERM if vcpu.domain.hypervisor.domain(domid) else -ESRCH


def _privileged(vcpu: Vcpu, _: int) -> int:
    return -EPERM


def _no_vnuma(vcpu: Vcpu, _: int) -> int:
    return -EOPNOTSUPP


# --- exchange --------------------------------------------------------------------------------------


def _exchange(vcpu: Vcpu, argument: int) -> int:
    """Trade frames for others of the same total size, contiguous ones for single ones or back."""
    data = copy_from_guest(vcpu, argument, EXCHANGE.size)
    if data is None:
        return -EFAULT
    (in_va, in_count, in_order, _, in_domid, out_va, out_count, out_order, flags, out_domid, exchanged) = (
        EXCHANGE.unpack(data)
    )
    domain = vcpu.domain
    if exchanged > in_count or in_count >> 32 or out_count >> 32 or max(in_order, out_order) > 18:
        return -EINVAL
    if in_count << in_order != out_count << out_order or in_domid != out_domid:
        return -EINVAL
    if max(in_order, out_order) > MAX_ORDER:
        return -EPERM
    if in_domid not in (DOMID_SELF, domain.domid):
        return -EPERM if domain.hypervisor.domain(in_domid) else -ESRCH
    address_bits = flags & 0xFF
    limit = 1 << address_bits - 12 if address_bits >= 12 else None
    in_step = 1 << max(0, out_order - in_order)  # input extents in one exchange
    out_step = 1 << max(0, in_order - out_order)
    if exchanged % in_step:
        return -EINVAL
    done = exchanged
    result = 0
    while done < in_count and not result:
        if domain.work_left <= 0 and done > exchanged:
            return vcpu.restart_hypercall(HYPERVISOR_memory_op, XENMEM_exchange, argument)
        domain.work_left -= EXTENT_WORK * (in_step + out_step) + (in_step << in_order)
        result = _exchange_chunk(
            vcpu,
            [in_va + 8 * (done + number) for number in range(in_step)],
            in_order,
            [out_va + 8 * (done // in_step * out_step + number) for number in range(out_step)],
            out_order,
            limit,
        )
        if not result:
            done += in_step
            if not copy_to_guest(vcpu, argument + EXCHANGE.size - 8, layout.U64.pack(done)):
                return -EFAULT
    return result


def _exchange_chunk(
    vcpu: Vcpu, in_vas: list[int], in_order: int, out_vas: list[int], out_order: int, limit: int | None
) -> int:
    """Exchange the extents listed at these addresses: all of them or none."""
    domain = vcpu.domain
    frames = domain.frames
    old: list[int] = []
    for va in in_vas:
        data = copy_from_guest(vcpu, va, 8)
        if data is None:
            return -EFAULT
        first = layout.U64.unpack(data)[0]
        old.extend(range(first, first + (1 << in_order)))
    pfns: list[int] = []
    for va in out_vas:
        data = copy_from_guest(vcpu, va, 8)
        if data is None or not copy_to_guest(vcpu, va, data):
            return -EFAULT
        pfns.append(layout.U64.unpack(data)[0])
    if len(set(old)) != len(old) or not all(_stealable(domain, mfn) for mfn in old):
        return -EINVAL
    new: list[int] = []
    try:
        for _ in out_vas:
            new.append(domain.memory.allocate_extent(out_order, limit))
    except OutOfMemory:
        for first in new:
            domain.memory.free(first, 1 << out_order)
        return -ENOMEM
    for mfn in old:
        last = frames.drop_allocation(mfn)
        assert last, frames.describe(mfn)
    paging.free_frames(domain, old)
    for first, pfn, va in zip(new, pfns, out_vas, strict=True):
        frames.assign(np.arange(first, first + (1 << out_order), dtype=np.uint64), domain.domid)
        domain.total_pages += 1 << out_order
        _set_pfns(domain, first, pfn, out_order)
        copy_to_guest(vcpu, va, layout.U64.pack(first))
    return 0


def _stealable(domain: Domain, mfn: int) -> bool:
    """Whether nothing but its allocation holds a frame (Xen: steal_page)."""
    frames = domain.frames
    return (
        frames.valid(mfn)
        and frames.owner[mfn] == domain.domid
        and frames.count_info[mfn] == ALLOCATED | 1
        and not frames.type_info[mfn] & (TYPE_COUNT | PINNED)
    )


_SIMPLE: Final = {
    XENMEM_current_reservation: _current_reservation,
    XENMEM_maximum_reservation: _maximum_reservation,
    XENMEM_maximum_gpfn: _maximum_gpfn,
    XENMEM_maximum_ram_page: _maximum_ram_page,
    XENMEM_machphys_mapping: _machphys_mapping,
    XENMEM_machphys_mfn_list: _machphys_mfn_list,
    XENMEM_memory_map: _memory_map,
    XENMEM_machine_memory_map: _privileged,
    XENMEM_set_memory_map: _privileged,
    XENMEM_get_vnumainfo: _no_vnuma,
    XENMEM_exchange: _exchange,
    XENMEM_add_to_physmap: _add_to_physmap,
}
