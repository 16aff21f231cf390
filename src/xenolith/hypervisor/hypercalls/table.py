"""The hypercall table: number -> (function, how many arguments it takes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi import hypercalls as abi
from xenolith.abi.errno import ENOSYS, EPERM
from xenolith.hypervisor.domain import Hypercall
from xenolith.hypervisor.hypercalls import (
    callbacks,
    console_io,
    event_channel_op,
    grant_table_op,
    iret,
    memory_op,
    misc,
    mmu,
    multicall,
    physdev,
    sched_op,
    vcpu_op,
    version,
    vm_assist,
)

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu


def do_not_implemented(vcpu: Vcpu) -> int:
    """No such hypercall."""
    return -ENOSYS


def do_privileged(vcpu: Vcpu) -> int:
    """For a privileged domain only (domctl, sysctl, platform_op)."""
    return -EPERM


_FUNCTIONS: Final[dict[int, Hypercall]] = {
    abi.HYPERVISOR_set_trap_table: (callbacks.do_set_trap_table, 1),
    abi.HYPERVISOR_mmu_update: (mmu.do_mmu_update, 4),
    abi.HYPERVISOR_set_gdt: (misc.do_set_gdt, 2),
    abi.HYPERVISOR_stack_switch: (misc.do_stack_switch, 2),
    abi.HYPERVISOR_set_callbacks: (callbacks.do_set_callbacks, 3),
    abi.HYPERVISOR_fpu_taskswitch: (misc.do_fpu_taskswitch, 1),
    abi.HYPERVISOR_sched_op_compat: (sched_op.do_sched_op_compat, 2),
    abi.HYPERVISOR_platform_op: (do_privileged, 0),
    abi.HYPERVISOR_set_debugreg: (misc.do_set_debugreg, 2),
    abi.HYPERVISOR_get_debugreg: (misc.do_get_debugreg, 1),
    abi.HYPERVISOR_update_descriptor: (misc.do_update_descriptor, 2),
    abi.HYPERVISOR_memory_op: (memory_op.do_memory_op, 2),
    abi.HYPERVISOR_multicall: (multicall.do_multicall, 2),
    abi.HYPERVISOR_update_va_mapping: (mmu.do_update_va_mapping, 3),
    abi.HYPERVISOR_set_timer_op: (vcpu_op.do_set_timer_op, 1),
    abi.HYPERVISOR_event_channel_op_compat: (event_channel_op.do_event_channel_op_compat, 1),
    abi.HYPERVISOR_xen_version: (version.do_xen_version, 2),
    abi.HYPERVISOR_console_io: (console_io.do_console_io, 3),
    abi.HYPERVISOR_physdev_op_compat: (physdev.do_physdev_op_compat, 1),
    abi.HYPERVISOR_grant_table_op: (grant_table_op.do_grant_table_op, 3),
    abi.HYPERVISOR_vm_assist: (vm_assist.do_vm_assist, 2),
    abi.HYPERVISOR_update_va_mapping_otherdomain: (mmu.do_update_va_mapping_otherdomain, 4),
    abi.HYPERVISOR_iret: (iret.do_iret, 0),
    abi.HYPERVISOR_vcpu_op: (vcpu_op.do_vcpu_op, 3),
    abi.HYPERVISOR_set_segment_base: (misc.do_set_segment_base, 2),
    abi.HYPERVISOR_mmuext_op: (mmu.do_mmuext_op, 4),
    abi.HYPERVISOR_sched_op: (sched_op.do_sched_op, 2),
    abi.HYPERVISOR_callback_op: (callbacks.do_callback_op, 2),
    abi.HYPERVISOR_event_channel_op: (event_channel_op.do_event_channel_op, 2),
    abi.HYPERVISOR_physdev_op: (physdev.do_physdev_op, 2),
    abi.HYPERVISOR_sysctl: (do_privileged, 0),
    abi.HYPERVISOR_domctl: (do_privileged, 0),
}
HYPERCALL_TABLE: Final = [_FUNCTIONS.get(number, (do_not_implemented, 0)) for number in range(abi.HYPERCALLS)]
