"""set_trap_table, set_callbacks, callback_op: where a guest kernel is entered (public/xen.h, public/callback.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenolith.abi import layout
from xenolith.abi.errno import EFAULT, EINVAL, ENOSYS
from xenolith.abi.hypercalls import (
    CALLBACKF_mask_events,
    CALLBACKOP_register,
    CALLBACKOP_unregister,
    CALLBACKTYPE_event,
    CALLBACKTYPE_failsafe,
    CALLBACKTYPE_nmi,
    CALLBACKTYPE_syscall,
    CALLBACKTYPE_syscall32,
    CALLBACKTYPE_sysenter,
    CALLBACKTYPE_sysenter_deprecated,
)
from xenolith.abi.x86 import VECTOR_NMI, is_canonical
from xenolith.hypervisor.bounce import GUEST_CS
from xenolith.hypervisor.guest_memory import copy_from_guest

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu


def do_set_trap_table(vcpu: Vcpu, table: int) -> int:
    """Set handlers from an array of trap_info that ends with a null address; a null pointer clears all."""
    if not table:
        vcpu.trap_address[:] = [0] * 256
        vcpu.trap_flags[:] = bytes(256)
        return 0
    for position in range(257):
        data = copy_from_guest(vcpu, table + layout.TRAP_INFO.size * position, layout.TRAP_INFO.size)
        if data is None:
            return -EFAULT
        vector, flags, selector, _, address = layout.TRAP_INFO.unpack(data)
        if not address:
            return 0
        if not is_canonical(address):
            return -EINVAL
        vcpu.trap_flags[vector] = flags
        vcpu.trap_selector[vector] = selector | 3
        vcpu.trap_address[vector] = address
    return 0


def do_set_callbacks(vcpu: Vcpu, event: int, failsafe: int, syscall: int) -> int:
    """The old form of callback_op, still used by small kernels."""
    for kind, address in (
        (CALLBACKTYPE_event, event),
        (CALLBACKTYPE_failsafe, failsafe),
        (CALLBACKTYPE_syscall, syscall),
    ):
        _register_callback(vcpu, kind, 0, address)
    return 0


def do_callback_op(vcpu: Vcpu, command: int, argument: int) -> int:
    """Register or unregister an entry point (public/callback.h)."""
    command &= 0xFFFFFFFF
    if command == CALLBACKOP_register:
        data = copy_from_guest(vcpu, argument, layout.CALLBACK_REGISTER.size)
        if data is None:
            return -EFAULT
        kind, flags, _, address = layout.CALLBACK_REGISTER.unpack(data)
        return _register_callback(vcpu, kind, flags, address)
    if command == CALLBACKOP_unregister:
        data = copy_from_guest(vcpu, argument, 4)
        if data is None:
            return -EFAULT
        kind = layout.U16.unpack_from(data)[0]
        if kind in (CALLBACKTYPE_event, CALLBACKTYPE_failsafe, CALLBACKTYPE_syscall, CALLBACKTYPE_syscall32):
            return -EINVAL
        if kind in (CALLBACKTYPE_sysenter, CALLBACKTYPE_sysenter_deprecated):
            return -EINVAL
        if kind == CALLBACKTYPE_nmi:
            vcpu.trap_address[VECTOR_NMI] = vcpu.trap_flags[VECTOR_NMI] = 0
            return 0
        return -ENOSYS
    return -ENOSYS


def _register_callback(vcpu: Vcpu, kind: int, flags: int, address: int) -> int:
    if not is_canonical(address):
        return -EINVAL
    masks = flags & CALLBACKF_mask_events != 0
    if kind == CALLBACKTYPE_event:
        vcpu.event_callback = address
    elif kind == CALLBACKTYPE_failsafe:
        vcpu.failsafe_callback, vcpu.failsafe_masks_events = address, masks
    elif kind == CALLBACKTYPE_syscall:
        vcpu.syscall_callback, vcpu.syscall_masks_events = address, masks
    elif kind == CALLBACKTYPE_syscall32:
        vcpu.syscall32_callback, vcpu.syscall32_masks_events = address, masks
    elif kind == CALLBACKTYPE_sysenter:
        vcpu.sysenter_callback, vcpu.sysenter_masks_events = address, masks
    elif kind == CALLBACKTYPE_nmi:
        vcpu.trap_address[VECTOR_NMI], vcpu.trap_flags[VECTOR_NMI] = address, layout.TRAP_INFO_MASK_EVENTS
        vcpu.trap_selector[VECTOR_NMI] = GUEST_CS
    elif kind == CALLBACKTYPE_sysenter_deprecated:
        return -EINVAL
    else:
        return -ENOSYS
    return 0
