"""xen_version: who we are and what we can do (public/version.h, public/features.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS, EPERM
from xenolith.abi.hypercalls import (
    XENFEAT_dom0,
    XENFEAT_gnttab_map_avail_bits,
    XENFEAT_mmu_pt_update_preserve_ad,
    XENFEAT_pae_pgdir_above_4gb,
    XENVER_build_id,
    XENVER_capabilities,
    XENVER_changeset,
    XENVER_commandline,
    XENVER_compile_info,
    XENVER_extraversion,
    XENVER_get_features,
    XENVER_guest_handle,
    XENVER_pagesize,
    XENVER_platform_parameters,
    XENVER_version,
)
from xenolith.abi.layout import HYPERVISOR_VIRT_START, U32, U64
from xenolith.abi.x86 import PAGE_SIZE
from xenolith.hypervisor.guest_memory import copy_from_guest, copy_to_guest

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

MAJOR: Final = 4
MINOR: Final = 17
EXTRAVERSION: Final = b".0-xenolith"  # 16 bytes with the terminating null
CAPABILITIES: Final = b"xen-3.0-x86_64 "
DENIED: Final = b"<denied>"  # what Xen tells an unprivileged domain about its build
FEATURES: Final = (
    1 << XENFEAT_pae_pgdir_above_4gb | 1 << XENFEAT_mmu_pt_update_preserve_ad | 1 << XENFEAT_gnttab_map_avail_bits
)
_COMPILE_INFO_FIELDS: Final = (64, 16, 32, 32)  # compiler, by, domain, date


def _answer(vcpu: Vcpu, arg: int, data: bytes, size: int = 0) -> int:
    return 0 if copy_to_guest(vcpu, arg, data.ljust(size, b"\0")) else -EFAULT


def _version(vcpu: Vcpu, arg: int) -> int:
    return MAJOR << 16 | MINOR


def _extraversion(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, EXTRAVERSION, 16)


def _compile_info(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, b"".join(DENIED.ljust(size, b"\0") for size in _COMPILE_INFO_FIELDS))


def _capabilities(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, CAPABILITIES, 1024)


def _changeset(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, b"", 64)


def _commandline(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, DENIED, 1024)


def _platform_parameters(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, U64.pack(HYPERVISOR_VIRT_START))


def _get_features(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 8)
    if data is None:
        return -EFAULT
    if U32.unpack_from(data)[0]:
        return -EINVAL
    return _answer(vcpu, arg + 4, U32.pack(FEATURES | vcpu.domain.privileged << XENFEAT_dom0))


def _pagesize(vcpu: Vcpu, arg: int) -> int:
    return -EINVAL if arg else PAGE_SIZE


def _guest_handle(vcpu: Vcpu, arg: int) -> int:
    return _answer(vcpu, arg, vcpu.domain.uuid)


def _build_id(vcpu: Vcpu, arg: int) -> int:
    return -EPERM


_OPERATIONS: Final[dict[int, Callable[[Vcpu, int], int]]] = {
    XENVER_version: _version,
    XENVER_extraversion: _extraversion,
    XENVER_compile_info: _compile_info,
    XENVER_capabilities: _capabilities,
    XENVER_changeset: _changeset,
    XENVER_platform_parameters: _platform_parameters,
    XENVER_get_features: _get_features,
    XENVER_pagesize: _pagesize,
    XENVER_guest_handle: _guest_handle,
    XENVER_commandline: _commandline,
    XENVER_build_id: _build_id,
}


def do_xen_version(vcpu: Vcpu, cmd: int, arg: int) -> int:
    """xen_version."""
    operation = _OPERATIONS.get(cmd & 0xFFFFFFFF)
    return -ENOSYS if operation is None else operation(vcpu, arg)
