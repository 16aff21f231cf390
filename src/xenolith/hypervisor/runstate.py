"""What a vCPU's time went into: running, runnable, blocked, offline (public/vcpu.h, VCPUOP_get_runstate_info).

A guest may register an area that always shows this, so that it can tell stolen time from its own.  With
the runstate_update_flag assist XEN_RUNSTATE_UPDATE is set in state_entry_time while the area is being written, for
readers on other vCPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi.hypercalls import XEN_RUNSTATE_UPDATE, RUNSTATE_running, VMASST_TYPE_runstate_update_flag
from xenolith.abi.layout import U64, VCPU_RUNSTATE_INFO
from xenolith.abi.x86 import PAGE_MASK, PAGE_SIZE
from xenolith.hypervisor.guest_memory import WRITE, copy_to_guest, translate

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

_ENTRY_TIME_OFFSET = 8
RUNSTATE_TIME: Final = XEN_RUNSTATE_UPDATE - 1


def set_runstate(vcpu: Vcpu, state: int, now: int) -> None:
    """Account the time since the last change, and change (Xen: vcpu_runstate_change)."""
    vcpu.runstate_times[vcpu.runstate] += now - vcpu.runstate_since
    vcpu.runstate = state
    vcpu.runstate_since = now


def running_time(vcpu: Vcpu, now: int) -> int:
    """ns for which the vCPU has run: its virtual time."""
    current = now - vcpu.runstate_since if vcpu.runstate == RUNSTATE_running else 0
    return vcpu.runstate_times[RUNSTATE_running] + current


def runstate_info(vcpu: Vcpu, now: int) -> bytes:
    """vcpu_runstate_info up to this moment."""
    return VCPU_RUNSTATE_INFO.pack(vcpu.runstate, 0, _entry_time(vcpu), *runstate_times(vcpu, now))


def runstate_times(vcpu: Vcpu, now: int) -> tuple[int, int, int, int]:
    """ns up to this moment that it was running, runnable, blocked and offline."""
    times = vcpu.runstate_times.copy()
    times[vcpu.runstate] += now - vcpu.runstate_since
    running, runnable, blocked, offline = times
    return running, runnable, blocked, offline


def _entry_time(vcpu: Vcpu) -> int:
    """When it came into its state, by the domain's own clock."""
    return vcpu.runstate_since + vcpu.domain.clock_ahead & RUNSTATE_TIME


def write_runstate_area(vcpu: Vcpu) -> None:
    """Refresh the registered area, through the vCPU's own guest-kernel page table."""
    va = vcpu.runstate_area_va
    since = _entry_time(vcpu)
    data = VCPU_RUNSTATE_INFO.pack(vcpu.runstate, 0, since, *vcpu.runstate_times)
    user, vcpu.kernel_mode = not vcpu.kernel_mode, True
    flagged = vcpu.domain.vm_assist >> VMASST_TYPE_runstate_update_flag & 1
    if not flagged and va & PAGE_MASK <= PAGE_SIZE - len(data):
        address = translate(vcpu, va, WRITE)
        if address >= 0:
            vcpu.domain.memory.b[address : address + len(data)] = data
    elif flagged and copy_to_guest(vcpu, va + _ENTRY_TIME_OFFSET, U64.pack(since | XEN_RUNSTATE_UPDATE)):
        copy_to_guest(vcpu, va, data[:_ENTRY_TIME_OFFSET])
        copy_to_guest(vcpu, va + _ENTRY_TIME_OFFSET + 8, data[_ENTRY_TIME_OFFSET + 8 :])
        copy_to_guest(vcpu, va + _ENTRY_TIME_OFFSET, U64.pack(since))
    elif not flagged:
        copy_to_guest(vcpu, va, data)
    vcpu.kernel_mode = not user
