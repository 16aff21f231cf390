"""vm_assist: optional behaviours that a domain switches on or off for itself (public/xen.h, VMASST_*)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi.errno import EINVAL, ENOSYS
from xenolith.abi.hypercalls import (
    VMASST_CMD_disable,
    VMASST_CMD_enable,
    VMASST_TYPE_4gb_segments,
    VMASST_TYPE_4gb_segments_notify,
    VMASST_TYPE_architectural_iopl,
    VMASST_TYPE_m2p_strict,
    VMASST_TYPE_pae_extended_cr3,
    VMASST_TYPE_runstate_update_flag,
    VMASST_TYPE_writable_pagetables,
)

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

# Those about 32-bit kernels are accepted and without effect, as on Xen.
VALID: Final = frozenset(
    (
        VMASST_TYPE_4gb_segments,
        VMASST_TYPE_4gb_segments_notify,
        VMASST_TYPE_writable_pagetables,
        VMASST_TYPE_pae_extended_cr3,
        VMASST_TYPE_architectural_iopl,
        VMASST_TYPE_runstate_update_flag,
        VMASST_TYPE_m2p_strict,
    )
)


def do_vm_assist(vcpu: Vcpu, cmd: int, kind: int) -> int:
    """vm_assist."""
    cmd, kind = cmd & 0xFFFFFFFF, kind & 0xFFFFFFFF
    if kind not in VALID:
        return -EINVAL
    if cmd == VMASST_CMD_enable:
        vcpu.domain.vm_assist |= 1 << kind
    elif cmd == VMASST_CMD_disable:
        vcpu.domain.vm_assist &= ~(1 << kind)
    else:
        return -ENOSYS
    for each in vcpu.domain.vcpus:
        each.architectural_iopl = bool(vcpu.domain.vm_assist >> VMASST_TYPE_architectural_iopl & 1)
    return 0
