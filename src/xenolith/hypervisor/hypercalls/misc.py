"""Hypercalls about the registers of a vCPU's processor that a guest kernel cannot load by itself.

The kernel stack, segment bases, CR0.TS, debug registers, and the descriptors of the GDT and LDT (Xen: arch/x86/pv/
misc-hypercalls.c, descriptor-tables.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.errno import EFAULT, EINVAL, ENODEV, EPERM
from xenolith.abi.hypercalls import SEGBASE_FS, SEGBASE_GS_KERNEL, SEGBASE_GS_USER, SEGBASE_GS_USER_SEL
from xenolith.abi.x86 import DR6_ONES, FS_BASE, GS, GS_BASE, LOWER_HALF_END, MASK64, is_canonical
from xenolith.hypervisor import paging
from xenolith.hypervisor.descriptors import checked, set_gdt_frames
from xenolith.hypervisor.frames import TYPE_COUNT, TYPE_MASK, TYPE_SEGDESC, TYPE_WRITABLE
from xenolith.hypervisor.guest_memory import copy_from_guest

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

DR6_STATUS: Final = 0xE00F  # B0-B3, BD, BS, BT


def do_stack_switch(vcpu: Vcpu, ss: int, sp: int) -> int:
    """The guest-kernel stack for the next entry from guest-user mode."""
    vcpu.kernel_ss = ss & 0xFFFF
    vcpu.kernel_sp = sp
    return 0


def do_set_segment_base(vcpu: Vcpu, which: int, base: int) -> int:
    """FS base, either GS base, or the user GS selector (public/arch-x86/xen-x86_64.h)."""
    which &= 0xFFFFFFFF
    if which == SEGBASE_FS:
        if not is_canonical(base):
            return -EINVAL
        vcpu.regs[FS_BASE] = base
    elif which == SEGBASE_GS_USER:
        if not is_canonical(base):
            return -EINVAL
        if vcpu.kernel_mode:
            vcpu.other_gs_base = base
        else:
            vcpu.regs[GS_BASE] = base
    elif which == SEGBASE_GS_KERNEL:
        if not is_canonical(base):
            return -EINVAL
        if vcpu.kernel_mode:
            vcpu.regs[GS_BASE] = base
        else:
            vcpu.other_gs_base = base
    elif which == SEGBASE_GS_USER_SEL:
        return _load_user_gs(vcpu, base & 0xFFFF)
    else:
        return -EINVAL
    return 0


def _load_user_gs(vcpu: Vcpu, selector: int) -> int:
    """Load the GS selector of guest-user mode: its base becomes that of the descriptor."""
    cpu = vcpu.cpu
    if cpu is None:
        return -EINVAL
    regs = vcpu.regs
    kernel_base = regs[GS_BASE]
    try:
        cpu.set_segment(GS, selector)
    except ValueError:
        cpu.set_segment(GS, 0)
    vcpu.other_gs_base, regs[GS_BASE] = regs[GS_BASE], kernel_base
    return 0


def do_fpu_taskswitch(vcpu: Vcpu, on: int) -> int:
    """CR0.TS for the guest: the next FPU instruction raises #NM."""
    vcpu.task_switched = on != 0
    if vcpu.cpu is not None:
        vcpu.cpu.set_task_switched(vcpu.task_switched)
    return 0


def do_set_debugreg(vcpu: Vcpu, number: int, value: int) -> int:
    """Write a debug register, with what could hurt Xen masked or refused (Xen: set_debugreg)."""
    number &= 0xFFFFFFFF
    if number < 4:
        if not value < LOWER_HALF_END and not layout.HYPERVISOR_VIRT_END <= value <= MASK64:
            return -EPERM
    elif number in (4, 6):
        number = 6
        value &= DR6_STATUS
    elif number in (5, 7):
        number = 7
        value = value & ~0xD800 & 0xFFFFFFFF | 0x400
        if value & (1 << 13):
            return -EPERM
        if value & 0xFF:
            for register in range(4):
                if value >> (16 + 4 * register) & 3 == 2 and value >> 2 * register & 3:
                    return -EPERM  # I/O breakpoints
    else:
        return -ENODEV
    vcpu.debug[number] = value
    if vcpu.cpu is not None:
        vcpu.cpu.set_debug(number, value)
    return 0


def do_get_debugreg(vcpu: Vcpu, number: int) -> int:
    """Read a debug register."""
    number &= 0xFFFFFFFF
    if number < 4:
        return vcpu.debug[number]
    if number in (4, 6):
        return vcpu.debug[6] | DR6_ONES
    if number in (5, 7):
        return vcpu.debug[7] or 0x400
    return -ENODEV


def do_set_gdt(vcpu: Vcpu, frame_list: int, entries: int) -> int:
    """Take the GDT from a list of frames (each u64), `entries` descriptors long."""
    entries &= 0xFFFFFFFF
    pages = (entries + 511) // 512
    if entries > layout.FIRST_RESERVED_GDT_ENTRY:
        return -EINVAL
    data = copy_from_guest(vcpu, frame_list, pages * 8) if pages else b""
    if data is None:
        return -EFAULT
    return set_gdt_frames(vcpu, [layout.U64.unpack_from(data, 8 * page)[0] for page in range(pages)], entries)


def do_update_descriptor(vcpu: Vcpu, address: int, descriptor: int) -> int:
    """Write one descriptor at a machine address."""
    domain = vcpu.domain
    allowed = checked(descriptor)
    mfn = address >> 12
    if address & 7 or allowed is None or not domain.frames.get_page(mfn, domain.domid):
        return -EINVAL
    info = domain.frames.type_info[mfn]
    in_use = info & TYPE_MASK == TYPE_SEGDESC and info & TYPE_COUNT
    result = paging.get_page_type(domain, mfn, TYPE_SEGDESC if in_use else TYPE_WRITABLE)
    if not result:
        domain.memory.q[address >> 3] = allowed
        paging.put_page_type(domain, mfn)
        for each in domain.vcpus:
            each.forget_flat_pairs()
    paging.put_page(domain, mfn)
    return -EINVAL if result else 0
