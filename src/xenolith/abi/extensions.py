"""What Xenolith offers to guests beyond Xen's interface: the virtual-time alarm of the Xen paper (3.3.2).

Today's Xen has dropped it.  The numbers lie where Xen will not grow: guests that do not know them never meet
them, and on Xen they answer -ENOSYS.  All are operations of vcpu_op on the calling vCPU itself.
"""

from typing import Final

VCPUOP_XENOLITH_get_virtual_time: Final = 0x584E0000
"""Argument: u64, written: the vCPU's virtual time in ns, which advances only while it runs."""

VCPUOP_XENOLITH_set_virtual_timer: Final = 0x584E0001
"""Argument: u64, the virtual time in ns at which to raise the alarm; at once if it has passed."""

VCPUOP_XENOLITH_stop_virtual_timer: Final = 0x584E0002
"""No argument."""

VIRQ_XENOLITH_VIRTUAL_TIMER: Final = 23
"""The alarm: VIRQ_ARCH_7, which x86 Xen does not use. Per vCPU."""
