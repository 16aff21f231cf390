"""physdev_op: hardware access, of which a domU has almost none (public/physdev.h)."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSPC, ENOSYS, EPERM, ESRCH
from xenolith.abi.layout import U32
from xenolith.hypervisor.guest_memory import address_ok, copy_from_guest, copy_to_guest
from xenolith.hypervisor.hypercalls.event_channel_op import NR_PIRQS, domain_by_any_id

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

PHYSDEVOP_irq_unmask_notify: Final = 4
PHYSDEVOP_irq_status_query: Final = 5
PHYSDEVOP_set_iopl: Final = 6
PHYSDEVOP_set_iobitmap: Final = 7
PHYSDEVOP_apic_read: Final = 8
PHYSDEVOP_apic_write: Final = 9
PHYSDEVOP_alloc_irq_vector: Final = 10
PHYSDEVOP_eoi: Final = 12
PHYSDEVOP_map_pirq: Final = 13
PHYSDEVOP_unmap_pirq: Final = 14
PHYSDEVOP_manage_pci_add: Final = 15
PHYSDEVOP_manage_pci_remove: Final = 16
PHYSDEVOP_restore_msi: Final = 19
PHYSDEVOP_manage_pci_add_ext: Final = 20
PHYSDEVOP_setup_gsi: Final = 21
PHYSDEVOP_get_free_pirq: Final = 23
PHYSDEVOP_pci_mmcfg_reserved: Final = 24
PHYSDEVOP_pci_device_add: Final = 25
PHYSDEVOP_pci_device_remove: Final = 26
PHYSDEVOP_restore_msi_ext: Final = 27
PHYSDEVOP_dbgp_op: Final = 29
PHYSDEVOP_prepare_msix: Final = 30
PHYSDEVOP_release_msix: Final = 31

XENIRQSTAT_needs_eoi: Final = 1
IO_PORTS: Final = 65536
_SET_IOBITMAP = Struct("<QII")  # bitmap (a pointer), nr_ports, pad


def _irq_unmask_notify(vcpu: Vcpu, arg: int) -> int:
    return 0


def _irq_status_query(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 8)
    if data is None:
        return -EFAULT
    if U32.unpack_from(data)[0] >= NR_PIRQS:
        return -EINVAL
    return 0 if copy_to_guest(vcpu, arg + 4, U32.pack(XENIRQSTAT_needs_eoi)) else -EFAULT


def _eoi(vcpu: Vcpu, arg: int) -> int:
    return -EFAULT if copy_from_guest(vcpu, arg, 4) is None else -EINVAL  # none is bound


def _map_pirq(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 4)
    if data is None:
        return -EFAULT
    return -ESRCH if domain_by_any_id(vcpu, U32.unpack(data)[0] & 0xFFFF) is None else -EPERM


def _get_free_pirq(vcpu: Vcpu, arg: int) -> int:
    return -EFAULT if copy_from_guest(vcpu, arg, 8) is None else -ENOSPC


def _set_iopl(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 4)
    if data is None:
        return -EFAULT
    iopl = U32.unpack(data)[0]
    if iopl > 3:
        return -EINVAL
    vcpu.iopl = iopl
    return 0


def _set_iobitmap(vcpu: Vcpu, arg: int) -> int:
    """Which I/O ports guest-user code may use: none of a domU's ports leads anywhere, so it is only checked."""
    data = copy_from_guest(vcpu, arg, _SET_IOBITMAP.size)
    if data is None:
        return -EFAULT
    bitmap, nr_ports, _ = _SET_IOBITMAP.unpack(data)
    return 0 if nr_ports <= IO_PORTS and address_ok(bitmap) else -EINVAL


def _denied(vcpu: Vcpu, arg: int) -> int:
    return -EFAULT if copy_from_guest(vcpu, arg, 4) is None else -EPERM


def _denied_unseen(vcpu: Vcpu, arg: int) -> int:
    return -EPERM


Operation = Callable[["Vcpu", int], int]

_PRIVILEGED: Final[dict[int, Operation]] = dict.fromkeys(
    (
        PHYSDEVOP_apic_read,
        PHYSDEVOP_apic_write,
        PHYSDEVOP_alloc_irq_vector,
        PHYSDEVOP_manage_pci_add,
        PHYSDEVOP_manage_pci_remove,
        PHYSDEVOP_restore_msi,
        PHYSDEVOP_manage_pci_add_ext,
        PHYSDEVOP_setup_gsi,
        PHYSDEVOP_pci_device_add,
        PHYSDEVOP_pci_device_remove,
        PHYSDEVOP_restore_msi_ext,
        PHYSDEVOP_prepare_msix,
        PHYSDEVOP_release_msix,
    ),
    _denied,
)
_OPERATIONS: Final[dict[int, Operation]] = _PRIVILEGED | {
    PHYSDEVOP_irq_unmask_notify: _irq_unmask_notify,
    PHYSDEVOP_irq_status_query: _irq_status_query,
    PHYSDEVOP_set_iopl: _set_iopl,
    PHYSDEVOP_set_iobitmap: _set_iobitmap,
    PHYSDEVOP_eoi: _eoi,
    PHYSDEVOP_map_pirq: _map_pirq,
    PHYSDEVOP_unmap_pirq: _map_pirq,
    PHYSDEVOP_get_free_pirq: _get_free_pirq,
    PHYSDEVOP_pci_mmcfg_reserved: _denied_unseen,
    PHYSDEVOP_dbgp_op: _denied_unseen,
    # pirq_eoi_gmfn, with which a domain with physical interrupts saves calls, is not offered
}


def do_physdev_op(vcpu: Vcpu, cmd: int, arg: int) -> int:
    """physdev_op."""
    operation = _OPERATIONS.get(cmd & 0xFFFFFFFF)
    return -ENOSYS if operation is None else operation(vcpu, arg)


def do_physdev_op_compat(vcpu: Vcpu, arg: int) -> int:
    """The first form of physdev_op: command and argument in one structure."""
    data = copy_from_guest(vcpu, arg, 24)
    if data is None:
        return -EFAULT
    return do_physdev_op(vcpu, U32.unpack_from(data)[0], arg + 8)
