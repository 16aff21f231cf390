"""Traps: what happens when guest code stops by itself (paper 3.2.2; Xen: arch/x86/pv/traps.c, entry.S).

`trap_handler` makes the function that the engine calls for every trap of one vCPU.  A system call in guest-kernel mode
is a hypercall; one in guest-user mode bounces to the kernel's system-call callback.  An exception is Xen's to
resolve (a privileged instruction, a write to a page table) or bounces to the guest's own handler.  After each
trap a pending, unmasked event bounces to the event callback.

A *bounce frame* on the guest-kernel stack holds, low to high: rcx, r11, [error code], rip, cs with the saved
upcall mask in its upper half, rflags, rsp, ss (public/arch-x86/xen-x86_64.h).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.errno import EFAULT, EINVAL, ENODEV, ENOSYS, EPERM
from xenolith.abi.hypercalls import (
    SEGBASE_FS,
    SEGBASE_GS_KERNEL,
    SEGBASE_GS_USER,
    SEGBASE_GS_USER_SEL,
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
    VGCF_in_syscall,
)
from xenolith.abi.x86 import (
    CS,
    EFLAGS_AC,
    EFLAGS_DEFINED,
    EFLAGS_DF,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_NT,
    EFLAGS_RESERVED_ONE,
    EFLAGS_RF,
    EFLAGS_TF,
    EFLAGS_VM,
    FS_BASE,
    GS,
    GS_BASE,
    PFEC_INSN,
    PFEC_PRESENT,
    PFEC_RESERVED,
    PFEC_USER,
    PFEC_WRITE,
    R8,
    R10,
    R11,
    RAX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    SS,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_NMI,
    VECTOR_NP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    VECTORS_WITH_ERROR_CODE,
    advanced,
    is_canonical,
)
from xenolith.hypervisor import descriptors, emulate, events, writable_pagetables
from xenolith.hypervisor.domain import COUNT_SYSCALL_BOUNCE
from xenolith.hypervisor.guest_memory import READ, WRITE, copy_from_guest, copy_to_guest, translate
from xenolith.hypervisor.sched.core import domain_crash
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_NOTHING, TRAP_SYSCALL, TRAP_SYSENTER, Cpu, TrapHandler

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu

GUEST_CS: Final = layout.FLAT_RING3_CS64
GUEST_SS: Final = layout.FLAT_RING3_SS64
MASK64: Final = (1 << 64) - 1
# RFLAGS at an entry of the guest kernel, by a system call, and after an iret: bits that are kept, bits that are set.
ENTRY_FLAGS: Final = ~(EFLAGS_AC | EFLAGS_VM | EFLAGS_RF | EFLAGS_NT | EFLAGS_TF | EFLAGS_IOPL) & MASK64
SYSCALL_FLAGS: Final = ENTRY_FLAGS & ~EFLAGS_DF
IRET_FLAGS: Final = EFLAGS_DEFINED & ~(EFLAGS_IOPL | EFLAGS_VM)
ALWAYS_SET: Final = EFLAGS_IF | EFLAGS_RESERVED_ONE
SAVED_FLAGS: Final = ~(EFLAGS_IF | EFLAGS_IOPL) & MASK64
_pack_frame = Struct("<7Q").pack_into
_pack_frame_with_error = Struct("<8Q").pack_into
_frame = Struct("<7Q").pack
_frame_with_error = Struct("<8Q").pack
_failsafe_frame = Struct("<11Q").pack
_unpack_iret = layout.IRET_FRAME.unpack_from

# Indices into Domain.trap_counts, as in domain.py.
COUNT_UPCALL: Final = 41
COUNT_PAGE_TABLE_WRITE: Final = 42
COUNT_PRIVILEGED: Final = 43

RDPMC: Final = b"\x0f\x33"
DR6_STATUS: Final = 0xE00F  # B0-B3, BD, BS, BT
DR6_ONES: Final = 0xFFFF0FF0  # always read as one


def trap_handler(vcpu: Vcpu, cpu: Cpu) -> TrapHandler:
    """The trap handler of this vCPU while it is loaded on this Cpu."""
    domain = vcpu.domain
    regs = cpu.regs
    lock = domain.lock.python if domain.contexts == 1 else domain.lock
    posted = domain.posted
    h = domain.memory.h
    b = domain.memory.b
    trap_counts = domain.trap_counts
    hypercall_counts = domain.hypercall_counts
    from xenolith.hypervisor.hypercalls.table import HYPERCALL_TABLE as table  # it imports this module

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        vcpu.in_guest = False
        with lock:
            if vector == TRAP_SYSCALL:
                if vcpu.kernel_mode:
                    number = regs[RAX]
                    if number < 64:
                        hypercall_counts[number] += 1
                        function, arguments = table[number]
                        vcpu.restarted = False
                        if arguments == 4:
                            result = function(vcpu, regs[RDI], regs[RSI], regs[RDX], regs[R10])
                        elif arguments == 2:
                            result = function(vcpu, regs[RDI], regs[RSI])
                        elif arguments == 0:
                            result = function(vcpu)
                        elif arguments == 3:
                            result = function(vcpu, regs[RDI], regs[RSI], regs[RDX])
                        elif arguments == 1:
                            result = function(vcpu, regs[RDI])
                        else:
                            result = function(vcpu, regs[RDI], regs[RSI], regs[RDX], regs[R10], regs[R8])
                        if not vcpu.restarted:
                            regs[RAX] = result & MASK64
                        if vcpu.begun:
                            vcpu.begun = vcpu.batch_begun = vcpu.call_begun = False
                            if not vcpu.restarted:
                                regs[RDI], regs[RSI] = vcpu.batch
                    else:
                        regs[RAX] = -ENOSYS & MASK64
                else:
                    trap_counts[COUNT_SYSCALL_BOUNCE] += 1
                    bounce_syscall(vcpu, cpu)
            elif vector == TRAP_CPUID:
                # Only registers may change: an engine that intercepts CPUID goes on behind it whatever RIP is.
                # An event that came meanwhile has kicked the vCPU, and is delivered when it next enters the guest.
                trap_counts[vector] += 1
                emulate.cpuid(vcpu, regs)
                vcpu.in_guest = vcpu.may_run
                return vcpu.may_run
            elif vector != TRAP_NOTHING:
                trap_counts[vector] += 1
                if vector == VECTOR_PF:
                    page_fault(vcpu, cpu, error_code, address)
                else:
                    exception(vcpu, cpu, vector, error_code, address)
            if posted:
                events.drain(domain)
            info = vcpu.info
            if h[info >> 1] & 0xFF and not b[info + 1]:
                upcall(vcpu, cpu)
            if vcpu.flush_requested:
                vcpu.flush_requested = False
                cpu.flush_tlb()
            vcpu.in_guest = vcpu.may_run
            return vcpu.may_run

    return on_trap


def prepare_entry(vcpu: Vcpu, cpu: Cpu) -> bool:
    """Make a loaded vCPU ready to execute guest code: events, NMI, TLB. False if it may not run after all.

    The caller holds the domain's lock, and clears `in_guest` when the engine returns.
    """
    deliver_events(vcpu, cpu)
    if vcpu.flush_requested:
        vcpu.flush_requested = False
        cpu.flush_tlb()
    vcpu.in_guest = vcpu.may_run
    return vcpu.may_run


def deliver_events(vcpu: Vcpu, cpu: Cpu) -> None:
    """Apply posted events, and bounce to the event callback if one is pending and unmasked."""
    if vcpu.domain.posted:
        events.drain(vcpu.domain)
    if vcpu.nmi_pending and not vcpu.nmi_masked:
        vcpu.nmi_pending = False
        if vcpu.trap_address[VECTOR_NMI]:  # or else it is lost
            vcpu.nmi_masked = True
            inject(vcpu, cpu, VECTOR_NMI, None)
    memory, info = vcpu.domain.memory.b, vcpu.info
    if memory[info] and not memory[info + 1]:
        upcall(vcpu, cpu)


def upcall(vcpu: Vcpu, cpu: Cpu) -> None:
    """Bounce to the event callback; further upcalls are masked until the guest unmasks them."""
    if not vcpu.event_callback:
        crash(vcpu, "an event is pending and no event callback is registered")
        return
    vcpu.domain.trap_counts[COUNT_UPCALL] += 1
    bounce(vcpu, cpu, vcpu.event_callback, None, True)


# --- bounce frames ---------------------------------------------------------------------------------


def enter_kernel_mode(vcpu: Vcpu, cpu: Cpu) -> None:
    """Guest-user to guest-kernel mode: page table, GS base (Xen: toggle_guest_mode)."""
    regs = cpu.regs
    vcpu.kernel_mode = True
    regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
    cpu.switch_mode(vcpu.kernel_l4, False)


def enter_user_mode(vcpu: Vcpu, cpu: Cpu) -> None:
    """Guest-kernel to guest-user mode. The vCPU has a user page table."""
    regs = cpu.regs
    vcpu.kernel_mode = False
    regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
    cpu.switch_mode(vcpu.user_l4, True)


def bounce(vcpu: Vcpu, cpu: Cpu, handler: int, error_code: int | None, mask_events: bool) -> None:
    """Build a bounce frame on the guest-kernel stack and go on at `handler` (Xen: create_bounce_frame)."""
    regs = cpu.regs
    memory = vcpu.domain.memory.b
    info = vcpu.info
    rflags = cpu.get_rflags()
    upcall_mask = memory[info + 1]
    saved_rflags = rflags & SAVED_FLAGS | (0 if upcall_mask else EFLAGS_IF)
    rsp = regs[RSP]
    if vcpu.kernel_mode:
        stack = rsp & ~15
        selector = regs[CS] & 0xFFFC
    else:
        stack = vcpu.kernel_sp & ~15
        selector = regs[CS] & 0xFFFF
        enter_kernel_mode(vcpu, cpu)
    selector |= upcall_mask << 32
    if error_code is None:
        size = 56
        frame = _frame(regs[RCX], regs[R11], regs[RIP], selector, saved_rflags, rsp, regs[SS] & 0xFFFF)
    else:
        size = 64
        frame = _frame_with_error(
            regs[RCX], regs[R11], error_code, regs[RIP], selector, saved_rflags, rsp, regs[SS] & 0xFFFF
        )
    stack -= size
    _finish_bounce(vcpu, cpu, handler, stack, frame, rflags, mask_events)


def bounce_failsafe(vcpu: Vcpu, cpu: Cpu, selectors: tuple[int, int, int, int]) -> None:
    """A vCPU is put on a Cpu with a data segment that cannot be loaded: tell its failsafe callback.

    `selectors` are DS, ES, FS and GS as they should be.
    """
    if not vcpu.failsafe_callback:
        crash(vcpu, "a data segment could not be loaded and no failsafe callback is registered")
        return
    regs = cpu.regs
    upcall_mask = vcpu.domain.memory.b[vcpu.info + 1]
    rflags, rsp, selector = cpu.get_rflags(), regs[RSP], regs[CS] & 0xFFFF
    if vcpu.kernel_mode:
        stack = rsp & ~15
        selector &= 0xFFFC
    else:
        stack = vcpu.kernel_sp & ~15
        enter_kernel_mode(vcpu, cpu)
    saved_rflags = rflags & SAVED_FLAGS | (0 if upcall_mask else EFLAGS_IF)
    frame = _failsafe_frame(
        regs[RCX], regs[R11], *selectors, regs[RIP], selector | upcall_mask << 32, saved_rflags, rsp, regs[SS] & 0xFFFF
    )
    _finish_bounce(vcpu, cpu, vcpu.failsafe_callback, stack - 88, frame, rflags, vcpu.failsafe_masks_events)


def _finish_bounce(
    vcpu: Vcpu, cpu: Cpu, handler: int, stack: int, frame: bytes, rflags: int, mask_events: bool
) -> None:
    regs = cpu.regs
    stack &= MASK64
    if stack & 0xFFF <= 0xFA0 and (address := translate(vcpu, stack, WRITE)) >= 0:
        vcpu.domain.memory.b[address : address + len(frame)] = frame
    elif not copy_to_guest(vcpu, stack, frame):
        crash(vcpu, f"fault while building a bounce frame at stack {stack:#x} for handler {handler:#x}")
        return
    if vcpu.compatibility:
        leave_compatibility_mode(vcpu, cpu)
    regs[CS] = GUEST_CS
    regs[SS] = GUEST_SS
    regs[RSP] = stack
    regs[RIP] = handler
    cpu.set_rflags(rflags & ENTRY_FLAGS | ALWAYS_SET)
    if mask_events:
        vcpu.domain.memory.b[vcpu.info + 1] = 1


def bounce_syscall(vcpu: Vcpu, cpu: Cpu) -> None:
    """A system call from guest-user mode (Xen: lstar_enter). RIP is after the instruction."""
    regs = cpu.regs
    compatibility = vcpu.compatibility
    handler = vcpu.syscall32_callback if compatibility else vcpu.syscall_callback
    if not handler:
        regs[RIP] = advanced(regs[RIP], -2)
        inject(vcpu, cpu, VECTOR_UD, None)
        return
    rflags = cpu.get_rflags()
    info = vcpu.info
    memory = vcpu.domain.memory.b
    upcall_mask = memory[info + 1]
    rip, rsp = regs[RIP], regs[RSP]
    regs[RCX] = rip
    regs[R11] = rflags
    vcpu.kernel_mode = True
    regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
    cpu.switch_mode(vcpu.kernel_l4, False)
    stack = advanced(vcpu.kernel_sp & ~15, -56)
    saved = rflags & SAVED_FLAGS | (0 if upcall_mask else EFLAGS_IF)
    if stack & 0xFFF <= 0xFC8 and (address := translate(vcpu, stack, WRITE)) >= 0:
        _pack_frame(memory, address, rip, rflags, rip, GUEST_CS | upcall_mask << 32, saved, rsp, GUEST_SS)
    else:
        frame = _frame(rip, rflags, rip, GUEST_CS | upcall_mask << 32, saved, rsp, GUEST_SS)
        if not copy_to_guest(vcpu, stack, frame):
            crash(vcpu, f"fault while building a system-call frame at stack {stack:#x}")
            return
    if compatibility:
        leave_compatibility_mode(vcpu, cpu)
    regs[CS] = GUEST_CS
    regs[SS] = GUEST_SS
    regs[RSP] = stack
    regs[RIP] = handler
    cpu.set_rflags(rflags & SYSCALL_FLAGS | ALWAYS_SET)
    if vcpu.syscall32_masks_events if compatibility else vcpu.syscall_masks_events:
        memory[info + 1] = 1


def leave_compatibility_mode(vcpu: Vcpu, cpu: Cpu) -> None:
    """Back to Xen's own 64-bit flat selectors, before guest-kernel code runs."""
    cpu.set_code_stack(GUEST_CS, GUEST_SS)
    vcpu.compatibility = False


def inject(vcpu: Vcpu, cpu: Cpu, vector: int, error_code: int | None) -> None:
    """Raise an exception in the guest through its trap table (Xen: pv_inject_event)."""
    handler = vcpu.trap_address[vector]
    if not handler:
        crash(vcpu, f"exception {vector} (error code {error_code}) and no handler for it")
        return
    bounce(vcpu, cpu, handler, error_code, vcpu.trap_flags[vector] & layout.TRAP_INFO_MASK_EVENTS != 0)


def inject_page_fault(vcpu: Vcpu, cpu: Cpu, error_code: int, address: int) -> None:
    """A page fault is the guest's: it finds the address in vcpu_info."""
    error_code = error_code & ~PFEC_USER if vcpu.kernel_mode else error_code | PFEC_USER
    vcpu.domain.memory.b[vcpu.info + layout.VCPU_INFO_ARCH_CR2 : vcpu.info + layout.VCPU_INFO_ARCH_CR2 + 8] = (
        layout.U64.pack(address)
    )
    handler = vcpu.trap_address[VECTOR_PF]
    if not handler:
        crash(vcpu, f"page fault at {address:#x} (error code {error_code:#x}) and no handler for it")
        return
    bounce(vcpu, cpu, handler, error_code, vcpu.trap_flags[VECTOR_PF] & layout.TRAP_INFO_MASK_EVENTS != 0)


def crash(vcpu: Vcpu, why: str) -> None:
    """The guest has brought itself into a state that nothing can continue from."""
    regs = vcpu.regs
    mode = "kernel" if vcpu.kernel_mode else "user"
    registers = " ".join(
        f"{name} {regs[index]:016x}"
        for index, name in enumerate(
            ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
        )
    )
    domain_crash(vcpu, f"{vcpu!r} crashed in guest-{mode} mode at rip {regs[RIP]:#x}: {why}\n{registers}")


# --- exceptions ------------------------------------------------------------------------------------


def page_fault(vcpu: Vcpu, cpu: Cpu, error_code: int, address: int) -> None:
    """#PF: a write to a page table that Xen may do for the guest, or the guest's own fault."""
    if (
        vcpu.kernel_mode
        and error_code & (PFEC_WRITE | PFEC_PRESENT | PFEC_RESERVED | PFEC_INSN) == PFEC_WRITE | PFEC_PRESENT
        and writable_pagetables.emulate_write(vcpu, cpu, address)
    ):
        vcpu.domain.trap_counts[COUNT_PAGE_TABLE_WRITE] += 1
        return
    if address >= layout.HYPERVISOR_VIRT_START and address < layout.HYPERVISOR_VIRT_END:
        window = address - descriptors.ldt_va(vcpu.vcpu_id)
        if 0 <= window < vcpu.ldt_entries * 8 and window >> 12 not in vcpu.ldt_frames:
            descriptors.load_ldt(vcpu)
            if window >> 12 in vcpu.ldt_frames:
                return
            address = vcpu.ldt_va + window  # the guest's own view of its LDT
    inject_page_fault(vcpu, cpu, error_code & ~PFEC_RESERVED, address)


def exception(vcpu: Vcpu, cpu: Cpu, vector: int, error_code: int, address: int) -> None:
    """Every trap but page faults and 64-bit system calls. For #DB `address` is DR6."""
    if vector == VECTOR_GP:
        if error_code & 2:  # `int n`: error code is n << 3 | 2
            software_interrupt(vcpu, cpu, error_code >> 3 & 0xFF, error_code)
            return
        if error_code == 0 and emulate.privileged_instruction(vcpu, cpu):
            vcpu.domain.trap_counts[COUNT_PRIVILEGED] += 1
            return
    elif vector == VECTOR_UD:
        if emulate.forced_invalid_opcode(vcpu, cpu):
            return
        if emulate.fetch(vcpu, cpu.regs[RIP], 2) == RDPMC:
            vector, error_code = VECTOR_GP, 0  # an engine that lacks the instruction: what a guest gets on any other
    elif vector == VECTOR_NM:
        if not vcpu.task_switched:
            cpu.set_task_switched(False)
            return
        vcpu.task_switched = False
        cpu.set_task_switched(False)
    elif vector == VECTOR_DB:
        vcpu.debug[6] |= address & DR6_STATUS
    elif vector == TRAP_SYSENTER:
        handler = vcpu.sysenter_callback
        if handler:
            bounce(vcpu, cpu, handler, None, vcpu.sysenter_masks_events)
        else:
            inject(vcpu, cpu, VECTOR_GP, 0)
        return
    inject(vcpu, cpu, vector, error_code if vector in VECTORS_WITH_ERROR_CODE else None)


def software_interrupt(vcpu: Vcpu, cpu: Cpu, number: int, error_code: int) -> None:
    """`int n`: delivered if the guest's entry allows this mode, otherwise #GP. RIP is at the instruction."""
    dpl = vcpu.trap_flags[number] & layout.TRAP_INFO_DPL
    if vcpu.trap_address[number] and dpl >= (1 if vcpu.kernel_mode else 3):
        cpu.regs[RIP] = advanced(cpu.regs[RIP], 2)
        inject(vcpu, cpu, number, None)
    else:
        inject(vcpu, cpu, VECTOR_GP, error_code)


# --- hypercalls about traps and modes ----------------------------------------------------------------


def do_iret(vcpu: Vcpu) -> int:
    """Go on from an iret frame on the guest-kernel stack, in either mode (Xen: do_iret)."""
    cpu = vcpu.cpu
    assert cpu is not None
    regs = vcpu.regs
    rsp = regs[RSP]
    memory = vcpu.domain.memory.b
    if rsp & 0xFFF <= 0xFB8:
        address = translate(vcpu, rsp, READ)
        frame = _unpack_iret(memory, address) if address >= 0 else None
    else:
        data = copy_from_guest(vcpu, rsp, layout.IRET_FRAME.size)
        frame = layout.IRET_FRAME.unpack(data) if data is not None else None
    if frame is None:
        crash(vcpu, f"the iret frame at {rsp:#x} cannot be read")
        return 0
    rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = frame
    cs &= 0xFFFF
    ss &= 0xFFFF
    if cs & 3 == 3:
        if not vcpu.user_l4:
            crash(vcpu, "iret to guest-user mode without a user page table")
            return 0
        vcpu.kernel_mode = False
        regs[GS_BASE], vcpu.other_gs_base = vcpu.other_gs_base, regs[GS_BASE]
        cpu.switch_mode(vcpu.user_l4, True)
    # As SYSRET or IRET would leave the upcall mask: IF stands for "not masked".
    memory[vcpu.info + 1] = 0 if rflags & EFLAGS_IF else 1
    if vcpu.nmi_masked:
        vcpu.nmi_masked = False
        vcpu.may_run = vcpu.may_run and not vcpu.nmi_pending  # the next one is delivered on the way into the guest
    if flags & VGCF_in_syscall:
        regs[RCX] = rip
        regs[R11] = rflags
    else:
        regs[RCX] = rcx
        regs[R11] = r11
    cs |= 3
    ss |= 3
    regs[RSP] = rsp
    regs[RIP] = rip
    cpu.set_rflags(rflags & IRET_FLAGS | ALWAYS_SET)
    if (cs, ss) in vcpu.flat_selectors and not vcpu.compatibility:
        regs[CS] = cs
        regs[SS] = ss
        if rip < 0x0000_8000_0000_0000 or rip >= 0xFFFF_8000_0000_0000:
            return rax  # type: ignore[no-any-return]
        fault: tuple[int, int] | None = (VECTOR_GP, 0)
    else:
        fault = return_fault(vcpu, cs, ss) or load_code_stack(vcpu, cpu, cs, ss)
        if not fault and not is_canonical(rip):
            fault = VECTOR_GP, 0
    if fault:
        # The processor faults on Xen's own IRET; the guest sees the fault where it wanted to go.
        regs[RAX] = rax
        regs[CS], regs[SS] = cs, ss
        inject(vcpu, cpu, *fault)
        return regs[RAX]
    return rax  # type: ignore[no-any-return]


LONG_MODE_CODE: Final = 1 << 53  # L: 64-bit code


def load_code_stack(vcpu: Vcpu, cpu: Cpu, cs: int, ss: int) -> tuple[int, int] | None:
    """Load CS and SS by their descriptors; the (vector, error code) if the engine cannot."""
    try:
        cpu.set_code_stack(cs, ss)
    except ValueError:
        return VECTOR_GP, cs & 0xFFFC
    flat = bool(descriptors.lookup(vcpu, cs) & LONG_MODE_CODE)
    vcpu.compatibility = not flat
    if flat:
        vcpu.know_flat(cs, ss)
    return None


def return_fault(vcpu: Vcpu, cs: int, ss: int) -> tuple[int, int] | None:
    """The (vector, error code) that IRET to these selectors at CPL 3 raises, None if it succeeds (SDM vol. 2, IRET)."""
    if not cs & 0xFFFC:
        return VECTOR_GP, 0
    descriptor = descriptors.lookup(vcpu, cs)
    kind = descriptor >> 40 & 0x1F  # S and type
    privilege = descriptor >> 45 & 3
    if kind & 0x18 != 0x18 or (privilege != 3 and not kind & 4):
        return VECTOR_GP, cs & 0xFFFC
    if not descriptor & descriptors.SEGMENT_P:
        return VECTOR_NP, cs & 0xFFFC
    if not ss & 0xFFFC:
        return VECTOR_GP, 0
    descriptor = descriptors.lookup(vcpu, ss)
    if descriptor >> 40 & 0x1A != 0x12 or descriptor >> 45 & 3 != 3:
        return VECTOR_GP, ss & 0xFFFC
    if not descriptor & descriptors.SEGMENT_P:
        return VECTOR_SS, ss & 0xFFFC
    return None


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


def do_stack_switch(vcpu: Vcpu, ss: int, sp: int) -> int:
    """The guest-kernel stack for the next entry from guest-user mode."""
    vcpu.kernel_ss = ss & 0xFFFF
    vcpu.kernel_sp = sp
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
        if not value < 0x0000_8000_0000_0000 and not layout.HYPERVISOR_VIRT_END <= value <= MASK64:
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

