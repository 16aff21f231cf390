"""grant_table_op: the grant-table hypercall of guests (public/grant_table.h).  See `grants` for the mechanism.

Every operation takes an array and gives each element a status of its own.  Elements that concern another domain need
its lock besides the caller's; where that is taken just now, the hypercall restarts at this element instead of
waiting, so that no two domains ever wait for each other.

A page-table entry made by map_grant_ref holds references on the frame of its own, like any other entry.  A guest that
removes it by other means than unmap_grant_ref keeps the pin until its end, as on Xen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from xenolith.abi import grant_table as abi
from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS, EOPNOTSUPP
from xenolith.abi.grant_table import (
    GNTCOPY_dest_gref,
    GNTCOPY_source_gref,
    GNTMAP_contains_pte,
    GNTMAP_device_map,
    GNTMAP_guest_avail_shift,
    GNTMAP_host_map,
    GNTMAP_readonly,
    GNTST_bad_copy_arg,
    GNTST_bad_dev_addr,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_bad_handle,
    GNTST_bad_page,
    GNTST_bad_virt_addr,
    GNTST_general_error,
    GNTST_no_device_space,
    GNTST_okay,
    GNTST_permission_denied,
)
from xenolith.abi.hypercalls import (
    DOMID_SELF,
    INT_MAX,
    GNTTABOP_cache_flush,
    GNTTABOP_copy,
    GNTTABOP_get_status_frames,
    GNTTABOP_get_version,
    GNTTABOP_map_grant_ref,
    GNTTABOP_query_size,
    GNTTABOP_set_version,
    GNTTABOP_setup_table,
    GNTTABOP_swap_grant_ref,
    GNTTABOP_transfer,
    GNTTABOP_unmap_and_replace,
    GNTTABOP_unmap_grant_ref,
    HYPERVISOR_grant_table_op,
)
from xenolith.abi.layout import HYPERVISOR_VIRT_END, U32, U64
from xenolith.abi.x86 import (
    LOWER_HALF_END,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_A,
    PTE_ADDRESS,
    PTE_AVAIL,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_RW,
    PTE_US,
)
from xenolith.hypervisor import paging, tlb
from xenolith.hypervisor.events import post_code_written
from xenolith.hypervisor.frames import FOREIGN, TYPE_COUNT, TYPE_L1, TYPE_MASK, TYPE_WRITABLE
from xenolith.hypervisor.grants import Mapping, Reach
from xenolith.hypervisor.guest_memory import copy_from_guest, copy_to_guest
from xenolith.hypervisor.hypercalls.event_channel_op import domain_by_any_id
from xenolith.hypervisor.hypercalls.mmu import l1_entry_index
from xenolith.machine.memory import OutOfMemory

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

OPERATION_BITS: Final = 12  # of the command; Xen keeps the state of its own continuations above
ELEMENT_WORK: Final = 8  # see paging
AVAIL_SHIFT: Final = 9  # of PTE_AVAIL


class _Busy(Exception):
    """Another domain's lock is taken just now."""


class _Locked:
    """Holds a domain's lock besides the caller's own, or raises _Busy."""

    def __init__(self, domain: Domain) -> None:
        self._lock = domain.lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise _Busy

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _status(value: int) -> bytes:
    return (value & 0xFFFF).to_bytes(2, "little")


# --- the caller's own table ------------------------------------------------------------------------


def _target(vcpu: Vcpu, domid: int) -> Domain | int:
    """Whose table is meant; only a privileged domain may name another's (Xen: XSM_TARGET)."""
    domain = domain_by_any_id(vcpu, domid)
    if domain is None:
        return GNTST_bad_domain
    if domain is not vcpu.domain and not vcpu.domain.privileged:
        return GNTST_permission_denied
    return domain


def _setup_table(vcpu: Vcpu, uop: int, count: int) -> int:
    if count != 1:
        return -EINVAL
    data = copy_from_guest(vcpu, uop, abi.SETUP_TABLE.size)
    if data is None:
        return -EFAULT
    domid, nr_frames, _, frame_list = abi.SETUP_TABLE.unpack(data)
    status = _fill_frame_list(vcpu, domid, nr_frames, frame_list)
    return 0 if copy_to_guest(vcpu, uop + abi.SETUP_TABLE_STATUS, _status(status)) else -EFAULT


def _fill_frame_list(vcpu: Vcpu, domid: int, nr_frames: int, frame_list: int) -> int:
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        return domain
    table = domain.grants
    if nr_frames > table.max_frames or not table.grow(nr_frames):
        return GNTST_general_error
    mfns = b"".join(map(U64.pack, table.frames[:nr_frames]))
    return GNTST_okay if not mfns or copy_to_guest(vcpu, frame_list, mfns) else GNTST_bad_virt_addr


def _query_size(vcpu: Vcpu, uop: int, count: int) -> int:
    if count != 1:
        return -EINVAL
    data = copy_from_guest(vcpu, uop, abi.QUERY_SIZE.size)
    if data is None:
        return -EFAULT
    domid, *_ = abi.QUERY_SIZE.unpack(data)
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        answer = abi.QUERY_SIZE.pack(domid, 0, 0, domain)
    else:
        answer = abi.QUERY_SIZE.pack(domid, len(domain.grants.frames), domain.grants.max_frames, GNTST_okay)
    return 0 if copy_to_guest(vcpu, uop, answer) else -EFAULT


def _set_version(vcpu: Vcpu, uop: int, count: int) -> int:
    data = copy_from_guest(vcpu, uop, U32.size)
    if data is None:
        return -EFAULT
    table = vcpu.domain.grants
    status = table.set_version(U32.unpack(data)[0])
    if status == -EINVAL:
        return status
    answered = copy_to_guest(vcpu, uop, U32.pack(table.version))
    return status if answered else -EFAULT


def _get_version(vcpu: Vcpu, uop: int, count: int) -> int:
    data = copy_from_guest(vcpu, uop, abi.GET_VERSION.size)
    if data is None:
        return -EFAULT
    domid, _ = abi.GET_VERSION.unpack(data)
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        return -EINVAL
    return 0 if copy_to_guest(vcpu, uop, abi.GET_VERSION.pack(domid, domain.grants.version)) else -EFAULT


def _get_status_frames(vcpu: Vcpu, uop: int, count: int) -> int:
    if count != 1:
        return -EINVAL
    data = copy_from_guest(vcpu, uop, abi.GET_STATUS_FRAMES.size)
    if data is None:
        return -EFAULT
    nr_frames, domid, _, frame_list = abi.GET_STATUS_FRAMES.unpack(data)
    status = _list_status_frames(vcpu, domid, nr_frames, frame_list)
    return 0 if copy_to_guest(vcpu, uop + abi.GET_STATUS_FRAMES_STATUS, _status(status)) else -EFAULT


def _list_status_frames(vcpu: Vcpu, domid: int, nr_frames: int, frame_list: int) -> int:
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        return domain
    frames = domain.grants.status_frames[:nr_frames]
    if nr_frames > len(frames):
        return GNTST_general_error
    mfns = b"".join(map(U64.pack, frames))
    return GNTST_okay if not mfns or copy_to_guest(vcpu, frame_list, mfns) else GNTST_bad_virt_addr


def _cache_flush(vcpu: Vcpu, uop: int, count: int) -> int:
    """Nothing needs flushing on x86, where devices see the caches; Xen refuses it there too."""
    for index in range(count):
        data = copy_from_guest(vcpu, uop + index * abi.CACHE_FLUSH.size, abi.CACHE_FLUSH.size)
        if data is None:
            return -EFAULT
        _, offset, length, operation = abi.CACHE_FLUSH.unpack(data)
        if offset + length > PAGE_SIZE:
            return -EINVAL
        if length and operation:
            return -EOPNOTSUPP
        vcpu.domain.work_left -= ELEMENT_WORK
        if vcpu.kicked or not vcpu.may_run or vcpu.domain.work_left <= 0:
            done = index + 1
            return vcpu.restart_hypercall(
                HYPERVISOR_grant_table_op, GNTTABOP_cache_flush, uop + done * abi.CACHE_FLUSH.size, count - done
            )
    return 0


# --- elements of the batched operations -------------------------------------------------------------
# Each takes the vCPU and the element's bytes, and gives what to write back, with the offset where.

Answer = tuple[int, bytes]


def _map(vcpu: Vcpu, data: bytes) -> Answer:
    host_addr, flags, ref, domid, *_ = abi.MAP_GRANT_REF.unpack(data)
    status, handle, address = _map_grant(vcpu, host_addr, flags, ref, domid)
    return abi.MAP_GRANT_REF_STATUS, abi.MAP_GRANT_REF_ANSWER.pack(status, handle, address)


def _map_grant(vcpu: Vcpu, host_addr: int, flags: int, ref: int, domid: int) -> tuple[int, int, int]:
    """Status, handle and machine address."""
    if not flags & (GNTMAP_device_map | GNTMAP_host_map):
        return GNTST_bad_gntref, 0, 0
    granter = vcpu.domain.hypervisor.domain(domid)
    if granter is None or granter.dying:
        return GNTST_bad_domain, 0, 0
    domain = vcpu.domain
    writable = not flags & GNTMAP_readonly
    with _Locked(granter):
        mfn = granter.grants.pin(ref, domain.domid, writable)
        if mfn < 0:
            return mfn, 0, 0
        try:
            alias = domain.frames.map_foreign(granter.memory, mfn, writable)
        except OutOfMemory:
            granter.grants.unpin(ref, writable)
            return GNTST_no_device_space, 0, 0
        status, index = _install(vcpu, host_addr, flags, alias) if flags & GNTMAP_host_map else (GNTST_okay, 0)
        handle = status
        if not status:
            device = bool(flags & GNTMAP_device_map)
            handle = domain.grants.add_mapping(Mapping(granter, ref, mfn, writable, index, alias, device))
            if handle < 0 and index:
                paging.modify_l1(domain, index, 0)
                tlb.flush_domain(domain)
        if handle < 0:
            domain.frames.unmap_foreign(alias)
            granter.grants.unpin(ref, writable)
            return handle, 0, 0
        if index and device:
            granter.grants.pin(ref, domain.domid, writable)  # once more: each is given up by itself
    return GNTST_okay, handle, alias << PAGE_SHIFT


def _install(vcpu: Vcpu, host_addr: int, flags: int, alias: int) -> tuple[int, int]:
    """Make the page-table entry; status and its index."""
    domain = vcpu.domain
    index = _entry_index(vcpu, host_addr, flags)
    if index < 0:
        return GNTST_general_error, 0
    avail = (flags >> GNTMAP_guest_avail_shift << AVAIL_SHIFT) & PTE_AVAIL
    entry = alias << PAGE_SHIFT | PTE_P | PTE_US | PTE_A | PTE_D | PTE_NX | avail
    if not flags & GNTMAP_readonly:
        entry |= PTE_RW
    before = domain.memory.q[index]
    if paging.modify_l1(domain, index, entry, FOREIGN):
        return GNTST_general_error, 0
    if before & PTE_P:
        tlb.flush_domain(domain)
    return GNTST_okay, index


def _entry_index(vcpu: Vcpu, host_addr: int, flags: int) -> int:
    """Where an entry is to be: given by its own machine address, or by the linear address it maps. -1: nowhere."""
    if not flags & GNTMAP_contains_pte:
        return l1_entry_index(vcpu, host_addr)
    frames = vcpu.domain.frames
    mfn = host_addr >> PAGE_SHIFT
    if host_addr & 7 or not frames.valid(mfn) or frames.owner[mfn] != vcpu.domain.domid:
        return -1
    info = frames.type_info[mfn]
    return host_addr >> 3 if info & TYPE_MASK == TYPE_L1 and info & TYPE_COUNT else -1


def _unmap(vcpu: Vcpu, data: bytes) -> Answer:
    host_addr, bus_addr, handle, _ = abi.UNMAP_GRANT_REF.unpack(data)
    return abi.UNMAP_GRANT_REF_STATUS, _status(_unmap_grant(vcpu, host_addr, bus_addr, handle, 0))


def _unmap_and_replace(vcpu: Vcpu, data: bytes) -> Answer:
    host_addr, new_addr, handle, _ = abi.UNMAP_AND_REPLACE.unpack(data)
    return abi.UNMAP_GRANT_REF_STATUS, _status(_unmap_grant(vcpu, host_addr, 0, handle, new_addr))


def _unmap_grant(vcpu: Vcpu, host_addr: int, bus_addr: int, handle: int, new_addr: int) -> int:
    """Take away what is named: the entry (by `new_addr`: for that linear address's mapping), the device's mapping."""
    domain = vcpu.domain
    mapping = domain.grants.mapping(handle)
    if mapping is None:
        return GNTST_bad_handle
    with _Locked(mapping.granter):
        pins = mapping.pins
        if bus_addr and mapping.device and bus_addr != mapping.alias << PAGE_SHIFT:
            return GNTST_bad_dev_addr
        if host_addr and mapping.l1_index:
            status = _remove_entry(vcpu, mapping, host_addr, new_addr)
            if status:
                return status
            mapping.l1_index = 0
        if bus_addr:
            mapping.device = False
        if not mapping.pins:
            domain.grants.forget_mapping(handle)
            domain.frames.unmap_foreign(mapping.alias)
        for _ in range(pins - mapping.pins):
            mapping.granter.grants.unpin(mapping.ref, mapping.writable)
    return GNTST_okay


def _remove_entry(vcpu: Vcpu, mapping: Mapping, host_addr: int, new_addr: int) -> int:
    domain = vcpu.domain
    q = domain.memory.q
    index = mapping.l1_index
    if index not in (l1_entry_index(vcpu, host_addr), host_addr >> 3):
        return GNTST_general_error
    mfn = index >> PAGE_SHIFT - 3
    info = domain.frames.type_info[mfn]
    if domain.frames.owner[mfn] != domain.domid or info & TYPE_MASK != TYPE_L1 or not info & TYPE_COUNT:
        return GNTST_general_error  # the page table that held it is gone
    if not q[index] & PTE_P or (q[index] & PTE_ADDRESS) >> PAGE_SHIFT != mapping.alias:
        return GNTST_general_error
    if not new_addr:
        paging.modify_l1(domain, index, 0)
    else:
        other = l1_entry_index(vcpu, new_addr)
        if other < 0 or other == index or paging.modify_l1(domain, index, q[other]):
            return GNTST_general_error
        paging.modify_l1(domain, other, 0)
    tlb.flush_domain(domain)
    return GNTST_okay


def _transfer(vcpu: Vcpu, data: bytes) -> Answer:
    """Giving frames away for good is not offered."""
    mfn, *_ = abi.TRANSFER.unpack(data)
    frames = vcpu.domain.frames
    own = frames.valid(mfn) and frames.owner[mfn] == vcpu.domain.domid
    return abi.TRANSFER_STATUS, _status(GNTST_general_error if own else GNTST_bad_page)


def _swap(vcpu: Vcpu, data: bytes) -> Answer:
    """Exchange two unused entries of the caller's table."""
    first, second, _ = abi.SWAP_GRANT_REF.unpack(data)
    return abi.SWAP_GRANT_REF_STATUS, _status(vcpu.domain.grants.swap(first, second))


def _copy(vcpu: Vcpu, data: bytes) -> Answer:
    source, source_domid, source_offset, dest, dest_domid, dest_offset, size, flags, _ = abi.COPY.unpack(data)
    if source_offset + size > PAGE_SIZE or dest_offset + size > PAGE_SIZE:
        return abi.COPY_STATUS, _status(GNTST_bad_copy_arg)
    status = _copy_between(
        vcpu,
        _Side(vcpu, source, source_domid, bool(flags & GNTCOPY_source_gref), False),
        _Side(vcpu, dest, dest_domid, bool(flags & GNTCOPY_dest_gref), True),
        source_offset,
        dest_offset,
        size,
    )
    return abi.COPY_STATUS, _status(status)


class _Side:
    """One end of a copy: a grant of some domain's, or a frame of the caller's own."""

    def __init__(self, vcpu: Vcpu, value: int, domid: int, by_grant: bool, writable: bool) -> None:
        self._grantee = vcpu.domain.domid
        self._by_grant = by_grant
        self._value = value & 0xFFFFFFFF if by_grant else value
        self._writable = writable
        self.owner = domain_by_any_id(vcpu, domid)
        self.denied = not by_grant and domid != DOMID_SELF and self.owner is not vcpu.domain

    def take(self, locks: ExitStack) -> Reach | int:
        """Pin the grant and the frame: what may be touched, or a GNTST_*. The owner's lock is held.

        That of the domain whose frame it is, if another, is in `locks` then.
        """
        if self.denied:
            return GNTST_permission_denied
        if self.owner is None or self.owner.dying:
            return GNTST_bad_domain
        if self._by_grant:
            return self.owner.grants.acquire(
                self._value, self._grantee, self._writable, lambda other: locks.enter_context(_Locked(other))
            )
        mfn = self._value
        if not self.owner.frames.get_page(mfn, self.owner.domid):
            return GNTST_bad_page
        if self._writable and paging.get_page_type(self.owner, mfn, TYPE_WRITABLE):
            paging.put_page(self.owner, mfn)
            return GNTST_general_error
        return Reach(self.owner, mfn, 0, PAGE_SIZE)

    def drop(self, reach: Reach) -> None:
        assert self.owner is not None
        if self._by_grant:
            self.owner.grants.unpin(self._value, self._writable)
        elif self._writable:
            paging.put_page_and_type(self.owner, reach.mfn)
        else:
            paging.put_page(self.owner, reach.mfn)


def _copy_between(vcpu: Vcpu, source: _Side, dest: _Side, source_offset: int, dest_offset: int, size: int) -> int:
    if source.owner is None or dest.owner is None:
        return GNTST_bad_domain
    with _Locked(source.owner), _Locked(dest.owner), ExitStack() as locks:
        taken = source.take(locks)
        if isinstance(taken, int):
            return taken
        locks.callback(source.drop, taken)
        given = dest.take(locks)
        if isinstance(given, int):
            return given
        locks.callback(dest.drop, given)
        if not (taken.start <= source_offset <= taken.end - size and given.start <= dest_offset <= given.end - size):
            return GNTST_general_error
        to, start = given.domain.memory.b, given.mfn * PAGE_SIZE + dest_offset
        source_start = taken.mfn * PAGE_SIZE + source_offset
        to[start : start + size] = taken.domain.memory.b[source_start : source_start + size]
        if given.domain is not vcpu.domain:
            post_code_written(given.domain, given.mfn)
        elif given.domain.executable_mapped is not None:
            given.domain.executable_mapped(given.mfn)
    return GNTST_okay


# --- the hypercall ---------------------------------------------------------------------------------

_WHOLE: Final[dict[int, Callable[[Vcpu, int, int], int]]] = {
    GNTTABOP_setup_table: _setup_table,
    GNTTABOP_query_size: _query_size,
    GNTTABOP_set_version: _set_version,
    GNTTABOP_get_version: _get_version,
    GNTTABOP_get_status_frames: _get_status_frames,
    GNTTABOP_cache_flush: _cache_flush,
}
_BATCHED: Final[dict[int, tuple[int, Callable[[Vcpu, bytes], Answer]]]] = {
    GNTTABOP_map_grant_ref: (abi.MAP_GRANT_REF.size, _map),
    GNTTABOP_unmap_grant_ref: (abi.UNMAP_GRANT_REF.size, _unmap),
    GNTTABOP_unmap_and_replace: (abi.UNMAP_AND_REPLACE.size, _unmap_and_replace),
    GNTTABOP_transfer: (abi.TRANSFER.size, _transfer),
    GNTTABOP_copy: (abi.COPY.size, _copy),
    GNTTABOP_swap_grant_ref: (abi.SWAP_GRANT_REF.size, _swap),
}


def do_grant_table_op(vcpu: Vcpu, cmd: int, uop: int, count: int) -> int:
    """grant_table_op."""
    cmd, count = cmd & 0xFFFFFFFF, count & 0xFFFFFFFF
    if count > INT_MAX or cmd >> OPERATION_BITS:
        return -EINVAL
    whole = _WHOLE.get(cmd)
    if whole is not None:
        return whole(vcpu, uop, count)
    batched = _BATCHED.get(cmd)
    if batched is None:
        return -ENOSYS
    size, function = batched
    if uop + size * count > 1 << 64 or LOWER_HALF_END <= uop < HYPERVISOR_VIRT_END:
        return -EFAULT
    for index in range(count):
        va = uop + size * index
        if index and (vcpu.kicked or not vcpu.may_run or vcpu.domain.work_left <= 0):
            return vcpu.restart_hypercall(HYPERVISOR_grant_table_op, cmd, va, count - index)
        vcpu.domain.work_left -= ELEMENT_WORK
        data = copy_from_guest(vcpu, va, size)
        if data is None:
            return -EFAULT
        try:
            offset, answer = function(vcpu, data)
        except _Busy:
            return vcpu.restart_hypercall(HYPERVISOR_grant_table_op, cmd, va, count - index)
        if not copy_to_guest(vcpu, va + offset, answer):
            return -EFAULT
    return 0
