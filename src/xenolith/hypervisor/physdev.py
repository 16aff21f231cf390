"""physdev_op: hardware access, of which a domU has almost none (public/physdev.h)."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS, EPERM
from xenolith.abi.layout import U32
from xenolith.hypervisor.events import NR_PIRQS
from xenolith.hypervisor.guest_memory import copy_from_guest, copy_to_guest

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

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
PHYSDEVOP_setup_gsi: Final = 21
PHYSDEVOP_pci_device_add: Final = 25

IO_PORTS: Final = 65536
_SET_IOBITMAP = Struct("<QII")  # bitmap (a pointer), nr_ports, pad


def _irq_status_query(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 8)
    if data is None:
        return -EFAULT
    if U32.unpack_from(data)[0] >= NR_PIRQS:
        return -EINVAL
    return 0 if copy_to_guest(vcpu, arg + 4, U32.pack(0)) else -EFAULT


def _eoi(vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(vcpu, arg, 4)
    if data is None:
        return -EFAULT
    return -EINVAL if U32.unpack(data)[0] >= NR_PIRQS else 0


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
    return -EINVAL if _SET_IOBITMAP.unpack(data)[1] > IO_PORTS else 0


def _denied(vcpu: Vcpu, arg: int) -> int:
    return -EFAULT if copy_from_guest(vcpu, arg, 4) is None else -EPERM


_OPERATIONS: Final[dict[int, Callable[[Vcpu, int], int]]] = {
    PHYSDEVOP_irq_status_query: _irq_status_query,
    PHYSDEVOP_set_iopl: _set_iopl,
    PHYSDEVOP_set_iobitmap: _set_iobitmap,
    PHYSDEVOP_apic_read: _denied,
    PHYSDEVOP_apic_write: _denied,
    PHYSDEVOP_alloc_irq_vector: _denied,
    PHYSDEVOP_eoi: _eoi,
    PHYSDEVOP_map_pirq: _denied,
    PHYSDEVOP_unmap_pirq: _denied,
    PHYSDEVOP_manage_pci_add: _denied,
    PHYSDEVOP_manage_pci_remove: _denied,
    PHYSDEVOP_setup_gsi: _denied,
    PHYSDEVOP_pci_device_add: _denied,
}
_COMPAT: Final = frozenset(range(PHYSDEVOP_irq_status_query, PHYSDEVOP_alloc_irq_vector + 1))


def do_physdev_op(vcpu: Vcpu, cmd: int, arg: int) -> int:
    """physdev_op."""
    operation = _OPERATIONS.get(cmd & 0xFFFFFFFF)
    return -ENOSYS if operation is None else operation(vcpu, arg)


def do_physdev_op_compat(vcpu: Vcpu, arg: int) -> int:
    """The first form of physdev_op: command and argument in one structure."""
    data = copy_from_guest(vcpu, arg, 24)
    if data is None:
        return -EFAULT
    cmd = U32.unpack_from(data)[0]
    return do_physdev_op(vcpu, cmd, arg + 8) if cmd in _COMPAT else -ENOSYS
