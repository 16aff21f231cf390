"""Grant tables: how a domain lets another reach some of its frames (paper 3.4; public/grant_table.h, version 1)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS
from xenolith.abi.hypercalls import (
    GNTTABOP_get_version,
    GNTTABOP_query_size,
    GNTTABOP_setup_table,
)
from xenolith.abi.layout import U64
from xenolith.hypervisor.events import domain_by_any_id
from xenolith.hypervisor.guest_memory import copy_from_guest, copy_to_guest
from xenolith.machine.memory import OutOfMemory

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

DEFAULT_MAX_FRAMES: Final = 64
GNTST_okay: Final = 0
GNTST_general_error: Final = -1
GNTST_bad_domain: Final = -2
GNTST_bad_virt_addr: Final = -5
GNTST_permission_denied: Final = -8

_SETUP_TABLE = Struct("<HHIh6xQ")  # dom, pad, nr_frames, status, frame_list (a pointer)
_QUERY_SIZE = Struct("<HHIIh2x")  # dom, pad, nr_frames, max_nr_frames, status


class GrantTable:
    """A domain's grant table and what it has mapped of others'."""

    def __init__(self, domain: Domain, max_frames: int = DEFAULT_MAX_FRAMES) -> None:
        self.domain = domain
        self.max_frames = max_frames
        self.frames: list[int] = []  # MFNs

    def grow(self, frames: int) -> bool:
        """Make the table at least this many frames long; False where that cannot be."""
        table = self.domain.frames
        try:
            new = table.allocate_xen(max(frames - len(self.frames), 0))
        except OutOfMemory:
            return False
        for mfn in new:
            table.share_with_guest(mfn, self.domain.domid)
        self.domain.xen_frames += new
        self.frames += new
        return True

    def release_all(self) -> None:
        """The domain is dying: give up everything it has mapped."""


def _target(vcpu: Vcpu, domid: int) -> Domain | int:
    domain = domain_by_any_id(vcpu, domid)
    if domain is None:
        return GNTST_bad_domain
    return domain if domain is vcpu.domain else GNTST_permission_denied


def _setup_table(vcpu: Vcpu, uop: int, count: int) -> int:
    if count != 1:
        return -EINVAL
    data = copy_from_guest(vcpu, uop, _SETUP_TABLE.size)
    if data is None:
        return -EFAULT
    domid, _, nr_frames, _, frame_list = _SETUP_TABLE.unpack(data)
    status = _fill_frame_list(vcpu, domid, nr_frames, frame_list)
    if status == -EINVAL << 16:
        return -EINVAL
    return 0 if copy_to_guest(vcpu, uop + 8, (status & 0xFFFF).to_bytes(2, "little")) else -EFAULT


def _fill_frame_list(vcpu: Vcpu, domid: int, nr_frames: int, frame_list: int) -> int:
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        return domain
    table = domain.grants
    if nr_frames > table.max_frames:
        return -EINVAL << 16
    if not table.grow(nr_frames):
        return GNTST_general_error
    mfns = b"".join(map(U64.pack, table.frames[:nr_frames]))
    return GNTST_okay if copy_to_guest(vcpu, frame_list, mfns) else GNTST_bad_virt_addr


def _query_size(vcpu: Vcpu, uop: int, count: int) -> int:
    if count != 1:
        return -EINVAL
    data = copy_from_guest(vcpu, uop, _QUERY_SIZE.size)
    if data is None:
        return -EFAULT
    domid = _QUERY_SIZE.unpack(data)[0]
    domain = _target(vcpu, domid)
    if isinstance(domain, int):
        answer = _QUERY_SIZE.pack(domid, 0, 0, 0, domain)
    else:
        answer = _QUERY_SIZE.pack(domid, 0, len(domain.grants.frames), domain.grants.max_frames, GNTST_okay)
    return 0 if copy_to_guest(vcpu, uop, answer) else -EFAULT


def _get_version(vcpu: Vcpu, uop: int, count: int) -> int:
    return 0 if copy_to_guest(vcpu, uop + 4, (1).to_bytes(4, "little")) else -EFAULT


_OPERATIONS: Final = {
    GNTTABOP_setup_table: _setup_table,
    GNTTABOP_query_size: _query_size,
    GNTTABOP_get_version: _get_version,
}


def do_grant_table_op(vcpu: Vcpu, cmd: int, uop: int, count: int) -> int:
    """grant_table_op."""
    operation = _OPERATIONS.get(cmd & 0xFFFFFFFF)
    return -ENOSYS if operation is None else operation(vcpu, uop, count & 0xFFFFFFFF)
