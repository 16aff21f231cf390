"""vcpu_op: bringing vCPUs up and down, their timers, and the areas they share with Xen (public/vcpu.h)."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi import layout, vcpu_context
from xenolith.abi.errno import EEXIST, EFAULT, EINVAL, ENOENT, ENOSYS, ENXIO, ERESTART
from xenolith.abi.extensions import (
    VCPUOP_XENOLITH_get_virtual_time,
    VCPUOP_XENOLITH_set_virtual_timer,
    VCPUOP_XENOLITH_stop_virtual_timer,
)
from xenolith.abi.hypercalls import (
    HYPERVISOR_vcpu_op,
    RUNSTATE_offline,
    SHUTDOWN_poweroff,
    VCPUOP_down,
    VCPUOP_get_physid,
    VCPUOP_get_runstate_info,
    VCPUOP_initialise,
    VCPUOP_is_up,
    VCPUOP_register_runstate_memory_area,
    VCPUOP_register_vcpu_info,
    VCPUOP_register_vcpu_time_memory_area,
    VCPUOP_send_nmi,
    VCPUOP_set_periodic_timer,
    VCPUOP_set_singleshot_timer,
    VCPUOP_stop_periodic_timer,
    VCPUOP_stop_singleshot_timer,
    VCPUOP_up,
    VMASST_TYPE_architectural_iopl,
)
from xenolith.abi.layout import U64, VCPU_INFO_SIZE
from xenolith.abi.vcpu_context import VcpuContext
from xenolith.abi.x86 import (
    CS,
    DS,
    EFLAGS_DEFINED,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_RESERVED_ONE,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    LOWER_HALF_END,
    MASK64,
    PAGE_SIZE,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS,
    RIP,
    RSI,
    RSP,
    SS,
    is_canonical,
)
from xenolith.hypervisor import descriptors, paging
from xenolith.hypervisor.frames import TYPE_WRITABLE
from xenolith.hypervisor.guest_memory import READ, address_ok, copy_from_guest, copy_to_guest, translate
from xenolith.hypervisor.runstate import runstate_info, set_runstate, write_runstate_area
from xenolith.hypervisor.shutdown import domain_shutdown
from xenolith.hypervisor.time import MILLISECOND, update_time

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

LONGEST_PERIOD: Final = (1 << 62) - 1  # ns (Xen: STIME_DELTA_MAX)
MOST_LDT_ENTRIES: Final = 8192
_SINGLESHOT = Struct("<QII")  # timeout_abs_ns, flags, pad
_REGISTER_VCPU_INFO = Struct("<QII")  # mfn, offset, rsvd
_ALL_WORDS = U64.pack(MASK64)

# Each takes the calling vCPU, the vCPU it is about, and the argument.
Operation = Callable[["Vcpu", "Vcpu", int], int]


# --- up and down -----------------------------------------------------------------------------------


def _initialise(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(caller, arg, vcpu_context.SIZE)
    if data is None:
        return -EFAULT
    if vcpu.initialised:
        return -EEXIST
    result = set_context(vcpu, vcpu_context.parse(data))
    if result == -ERESTART:
        return caller.restart_hypercall(HYPERVISOR_vcpu_op, VCPUOP_initialise, vcpu.vcpu_id, arg)
    return result


def set_context(vcpu: Vcpu, context: VcpuContext) -> int:
    """Give a vCPU that has never run its start-up state (Xen: arch_set_info_guest)."""
    result = _check_context(context)
    if result:
        return result
    pages = (context.gdt_entries + 511) // 512
    result = descriptors.set_gdt_frames(vcpu, list(context.gdt_frames[:pages]), context.gdt_entries)
    if result:
        return result
    result = _load_base_pointers(vcpu, context.ctrlreg[3] >> 12, context.ctrlreg[1] >> 12)
    if result:
        descriptors.destroy_gdt(vcpu)
        return result
    _load_registers(vcpu, context)
    _load_traps(vcpu, context)
    vcpu.ldt_va, vcpu.ldt_entries = context.ldt_base, context.ldt_entries
    if context.flags & vcpu_context.VGCF_I387_VALID:
        vcpu.state.xsave[:512] = context.fpu
        vcpu.state.xsave[512] = 3  # XSTATE_BV: x87 and SSE
    if vcpu.vcpu_id == 0:
        vcpu.domain.vm_assist = context.vm_assist
        for each in vcpu.domain.vcpus:
            each.architectural_iopl = bool(context.vm_assist >> VMASST_TYPE_architectural_iopl & 1)
    vcpu.initialised = True
    if context.flags & vcpu_context.VGCF_online:
        vcpu.online = True
        vcpu.domain.hypervisor.scheduler.wake(vcpu)
    return 0


def _check_context(context: VcpuContext) -> int:
    addresses = [
        context.regs.rip,
        context.regs.rsp,
        context.kernel_sp,
        context.event_callback,
        context.failsafe_callback,
        context.syscall_callback,
        context.fs_base,
        context.gs_base_kernel,
        context.gs_base_user,
        *(address for *_, address in context.traps),
    ]
    if context.ldt_entries:
        addresses.append(context.ldt_base)
    if not all(map(is_canonical, addresses)):
        return -EINVAL
    if context.ldt_entries and (context.ldt_base & PAGE_SIZE - 1 or context.ldt_entries > MOST_LDT_ENTRIES):
        return -EINVAL
    if context.gdt_entries > layout.FIRST_RESERVED_GDT_ENTRY:
        return -EINVAL
    return 0


def _load_base_pointers(vcpu: Vcpu, kernel_mfn: int, user_mfn: int) -> int:
    result = paging.get_bases(vcpu.domain, kernel_mfn, user_mfn)
    if not result:
        paging.set_bases(vcpu, kernel_mfn, user_mfn)
    return -ERESTART if result == -ERESTART else -EINVAL if result else 0


def _load_registers(vcpu: Vcpu, context: VcpuContext) -> None:
    given, regs = context.regs, vcpu.state.regs
    for index, value in (
        (RAX, given.rax),
        (RBX, given.rbx),
        (RCX, given.rcx),
        (RDX, given.rdx),
        (RSI, given.rsi),
        (RDI, given.rdi),
        (RBP, given.rbp),
        (RSP, given.rsp),
        (R8, given.r8),
        (R9, given.r9),
        (R10, given.r10),
        (R11, given.r11),
        (R12, given.r12),
        (R13, given.r13),
        (R14, given.r14),
        (R15, given.r15),
        (RIP, given.rip),
        (RFLAGS, given.rflags & EFLAGS_DEFINED & ~EFLAGS_IOPL | EFLAGS_IF | EFLAGS_RESERVED_ONE),
        (ES, given.es),
        (DS, given.ds),
        (FS, given.fs),
        (GS, given.gs),
        (FS_BASE, context.fs_base),
    ):
        regs[index] = value
    vcpu.iopl = given.rflags >> 12 & 3  # which is virtual
    # The selectors of guest-kernel mode are shown with RPL 0; it runs, like everything, with RPL 3.
    regs[CS] = given.cs | 3
    regs[SS] = given.ss | 3 if given.ss else 0
    if not _flat(regs[CS], regs[SS]):
        regs[CS], regs[SS] = layout.FLAT_RING3_CS64, layout.FLAT_RING3_SS64
    vcpu.add_flat_pair(layout.FLAT_RING3_CS64, layout.FLAT_RING3_SS64)
    vcpu.kernel_mode = bool(context.flags & vcpu_context.VGCF_in_kernel) or not vcpu.user_l4
    kernel_gs, user_gs = context.gs_base_kernel, context.gs_base_user
    regs[GS_BASE], vcpu.other_gs_base = (kernel_gs, user_gs) if vcpu.kernel_mode else (user_gs, kernel_gs)
    vcpu.state.user = not vcpu.kernel_mode
    vcpu.state.l4_mfn = vcpu.kernel_l4 if vcpu.kernel_mode else vcpu.user_l4
    vcpu.kernel_ss, vcpu.kernel_sp = context.kernel_ss & 0xFFFF, context.kernel_sp


def _flat(cs: int, ss: int) -> bool:
    """Whether these are Xen's own 64-bit selectors, which need no descriptor of the guest's."""
    return cs == layout.FLAT_RING3_CS64 and ss in (0, layout.FLAT_RING3_SS64)


def _load_traps(vcpu: Vcpu, context: VcpuContext) -> None:
    # An array in order of vectors, as Xen takes it: the vector number inside an entry does not count.
    for vector, (_, flags, selector, _, address) in enumerate(context.traps):
        vcpu.trap_flags[vector] = flags
        vcpu.trap_selector[vector] = selector | 3
        vcpu.trap_address[vector] = address
    vcpu.event_callback = context.event_callback
    vcpu.failsafe_callback = context.failsafe_callback
    vcpu.syscall_callback = context.syscall_callback
    vcpu.failsafe_masks_events = bool(context.flags & vcpu_context.VGCF_failsafe_disables_events)
    vcpu.syscall_masks_events = bool(context.flags & vcpu_context.VGCF_syscall_disables_events)
    for number in (0, 1, 2, 3):
        if context.debugreg[number] < LOWER_HALF_END:
            vcpu.debug[number] = vcpu.state.debug[number] = context.debugreg[number]


def _up(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    if not vcpu.initialised:
        return -EINVAL
    if not vcpu.online:
        vcpu.online = True
        vcpu.domain.hypervisor.scheduler.wake(vcpu)
    return 0


def _down(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    domain = vcpu.domain
    if not any(other.online for other in domain.vcpus if other is not vcpu):
        domain_shutdown(domain, SHUTDOWN_poweroff)
        return 0
    if vcpu.online:
        vcpu.online = False
        vcpu.may_run = False
        domain.hypervisor.scheduler.kick(vcpu)
        if vcpu.context is None or vcpu.context.running is not vcpu:
            set_runstate(vcpu, RUNSTATE_offline, domain.hypervisor.clock.now())
    return 0


def _is_up(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    return int(vcpu.online)


def _send_nmi(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    if arg:
        return -EINVAL
    send_nmi(vcpu)
    if vcpu is caller:
        vcpu.may_run = False  # it is delivered on the way into the guest, so it has to leave and come back
    return 0


def send_nmi(vcpu: Vcpu) -> None:
    """Make an NMI pending. The caller holds the domain's lock."""
    if vcpu.nmi_pending:
        return
    vcpu.nmi_pending = True
    scheduler = vcpu.domain.hypervisor.scheduler
    if vcpu.blocked:
        scheduler.unblock(vcpu)
    else:
        scheduler.kick(vcpu)


def _get_physid(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    return -EINVAL  # for a vCPU that is pinned to its pCPU for good


# --- areas shared with Xen ---------------------------------------------------------------------------


def _get_runstate_info(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    info = runstate_info(vcpu, vcpu.domain.hypervisor.clock.now())
    return 0 if copy_to_guest(caller, arg, info) else -EFAULT


def _area_address(caller: Vcpu, arg: int) -> int | None:
    """The address that a guest wants an area at; None if it cannot be the guest's."""
    data = copy_from_guest(caller, arg, 8)
    if data is None:
        return None
    (va,) = U64.unpack(data)
    return va if address_ok(va) else None


def _register_runstate_area(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    va = _area_address(caller, arg)
    if va is None:
        return -EFAULT
    vcpu.runstate_area_va = va
    if vcpu is caller:
        write_runstate_area(vcpu)
    else:
        copy_to_guest(caller, va, runstate_info(vcpu, vcpu.domain.hypervisor.clock.now()))
    return 0


def _register_time_area(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    va = _area_address(caller, arg)
    if va is None:
        return -EFAULT
    vcpu.time_area_va = va
    if vcpu is caller:
        update_time(vcpu)
    else:
        vcpu.time_outdated = True
        vcpu.domain.hypervisor.scheduler.kick(vcpu)
    return 0


def _register_vcpu_info(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    """Move vcpu_info to a frame of the guest's choice, for good (Xen: map_vcpu_info)."""
    data = copy_from_guest(caller, arg, _REGISTER_VCPU_INFO.size)
    if data is None:
        return -EFAULT
    mfn, offset, _ = _REGISTER_VCPU_INFO.unpack(data)
    domain = vcpu.domain
    if offset > PAGE_SIZE - VCPU_INFO_SIZE or offset & 7:
        return -ENXIO
    if vcpu.info_mfn:
        return -EINVAL
    if vcpu is not caller and vcpu.online:
        return -EINVAL
    if paging.get_page_and_type(domain, mfn, TYPE_WRITABLE):
        return -EINVAL
    memory = domain.memory.b
    address = mfn * PAGE_SIZE + offset
    memory[address : address + VCPU_INFO_SIZE] = memory[vcpu.info : vcpu.info + VCPU_INFO_SIZE]
    vcpu.info, vcpu.info_mfn = address, mfn
    # An event may have been marked in the old place just now: let the guest look at everything once.
    memory[address] = 1
    memory[address + layout.VCPU_INFO_PENDING_SEL : address + layout.VCPU_INFO_PENDING_SEL + 8] = _ALL_WORDS
    return 0


# --- timers ------------------------------------------------------------------------------------------


def _set_singleshot_timer(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    """A time that has passed raises the event at once, with VCPU_SSHOTTMR_future too (observed on Xen 4.17)."""
    if vcpu is not caller:
        return -EINVAL
    if arg & 0xFFF <= PAGE_SIZE - _SINGLESHOT.size and not arg & 7:
        address = translate(vcpu, arg, READ)
        if address < 0:
            return -EFAULT
        timeout = vcpu.domain.memory.q[address >> 3]
    else:
        data = copy_from_guest(vcpu, arg, _SINGLESHOT.size)
        if data is None:
            return -EFAULT
        timeout = _SINGLESHOT.unpack(data)[0]
    vcpu.timers.set_singleshot(timeout)
    return 0


def _stop_singleshot_timer(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    if vcpu is not caller:
        return -EINVAL
    vcpu.domain.hypervisor.timers.cancel(vcpu.timers.singleshot)
    return 0


def _set_periodic_timer(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    data = copy_from_guest(caller, arg, 8)
    if data is None:
        return -EFAULT
    (period,) = U64.unpack(data)
    if not MILLISECOND <= period <= LONGEST_PERIOD:
        return -EINVAL
    vcpu.timers.set_period(period)
    return 0


def _stop_periodic_timer(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    vcpu.timers.set_period(0)
    return 0


def _get_virtual_time(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    return 0 if copy_to_guest(caller, arg, U64.pack(vcpu.timers.virtual_time())) else -EFAULT


def _set_virtual_timer(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    if vcpu is not caller:
        return -EINVAL
    data = copy_from_guest(vcpu, arg, 8)
    if data is None:
        return -EFAULT
    vcpu.timers.set_virtual(max(U64.unpack(data)[0], 1))
    return 0


def _stop_virtual_timer(caller: Vcpu, vcpu: Vcpu, arg: int) -> int:
    if vcpu is not caller:
        return -EINVAL
    vcpu.timers.set_virtual(0)
    return 0


_OPERATIONS: Final[dict[int, Operation]] = {
    VCPUOP_initialise: _initialise,
    VCPUOP_up: _up,
    VCPUOP_down: _down,
    VCPUOP_is_up: _is_up,
    VCPUOP_get_runstate_info: _get_runstate_info,
    VCPUOP_register_runstate_memory_area: _register_runstate_area,
    VCPUOP_set_periodic_timer: _set_periodic_timer,
    VCPUOP_stop_periodic_timer: _stop_periodic_timer,
    VCPUOP_set_singleshot_timer: _set_singleshot_timer,
    VCPUOP_stop_singleshot_timer: _stop_singleshot_timer,
    VCPUOP_register_vcpu_info: _register_vcpu_info,
    VCPUOP_send_nmi: _send_nmi,
    VCPUOP_get_physid: _get_physid,
    VCPUOP_register_vcpu_time_memory_area: _register_time_area,
    VCPUOP_XENOLITH_get_virtual_time: _get_virtual_time,
    VCPUOP_XENOLITH_set_virtual_timer: _set_virtual_timer,
    VCPUOP_XENOLITH_stop_virtual_timer: _stop_virtual_timer,
}


def do_vcpu_op(vcpu: Vcpu, cmd: int, vcpu_id: int, arg: int) -> int:
    """vcpu_op on one of the domain's own vCPUs."""
    vcpus = vcpu.domain.vcpus
    vcpu_id &= 0xFFFFFFFF
    if vcpu_id >= len(vcpus):
        return -ENOENT
    operation = _OPERATIONS.get(cmd & 0xFFFFFFFF)
    return -ENOSYS if operation is None else operation(vcpu, vcpus[vcpu_id], arg)


def do_set_timer_op(vcpu: Vcpu, timeout: int) -> int:
    """Set (0: stop) the singleshot timer to a system time in ns.

    Times before boot, or 2**50 ns (13 days) or more ahead, mean a guest that cannot count: it gets 100 ms, as from Xen.
    """
    hypervisor = vcpu.domain.hypervisor
    timer = vcpu.timers.singleshot
    if not timeout:
        hypervisor.timers.cancel(timer)
        return 0
    now = vcpu.domain.clock.now()
    if timeout >= 1 << 63 or timeout - now >= 1 << 50:
        timeout = now + 100 * MILLISECOND
    vcpu.timers.arm(timer, timeout)
    return 0
