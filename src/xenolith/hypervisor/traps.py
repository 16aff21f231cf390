"""Traps: what happens when guest code stops by itself (paper 3.2.2; Xen: arch/x86/pv/traps.c, entry.S).

`trap_handler` makes the function that the engine calls for every trap of one vCPU.  A system call in guest-kernel mode
is a hypercall; one in guest-user mode bounces to the kernel's system-call callback.  An exception is Xen's to
resolve (a privileged instruction, a write to a page table) or bounces to the guest's own handler.  After each
trap a pending, unmasked event bounces to the event callback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenolith.abi import layout
from xenolith.abi.errno import ENOSYS
from xenolith.abi.x86 import (
    CS,
    DR6_STEP,
    EFLAGS_TF,
    MASK64,
    OPCODE_RDPMC,
    PFEC_INSN,
    PFEC_PRESENT,
    PFEC_RESERVED,
    PFEC_WRITE,
    R8,
    R10,
    RAX,
    RDI,
    RDX,
    RIP,
    RSI,
    SS,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_NMI,
    VECTOR_PF,
    VECTOR_UD,
    VECTORS_WITH_ERROR_CODE,
    advanced,
)
from xenolith.hypervisor import descriptors, emulate, events, m2p_loads, paging, writable_pagetables
from xenolith.hypervisor.bounce import (
    GUEST_CS,
    GUEST_SS,
    bounce,
    bounce_syscall,
    crash,
    inject,
    inject_page_fault,
    leave_compatibility_mode,
)
from xenolith.hypervisor.domain import COUNT_PAGE_TABLE_WRITE, COUNT_PRIVILEGED, COUNT_SYSCALL_BOUNCE, COUNT_UPCALL
from xenolith.hypervisor.hypercalls.misc import DR6_STATUS
from xenolith.machine.engines.protocol import TRAP_CPUID, TRAP_NOTHING, TRAP_SYSCALL, TRAP_SYSENTER, Cpu, TrapHandler

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu


def trap_handler(vcpu: Vcpu, cpu: Cpu) -> TrapHandler:
    """The trap handler of this vCPU while it is loaded on this Cpu."""
    domain = vcpu.domain
    regs = cpu.regs
    lock = domain.lock
    posted = domain.posted
    h = domain.memory.h
    b = domain.memory.b
    trap_counts = domain.trap_counts
    hypercall_counts = domain.hypercall_counts
    table = domain.hypercalls

    def on_trap(vector: int, error_code: int, address: int) -> bool:
        vcpu.in_guest = False
        if domain.lock_wanted:
            domain.lock.give_way()
        with lock:
            if vector == TRAP_SYSCALL:
                if vcpu.kernel_mode:
                    if vcpu.compatibility:
                        leave_compatibility_mode(vcpu, cpu)
                    regs[CS], regs[SS] = GUEST_CS, GUEST_SS  # which SYSCALL loads
                    number = regs[RAX]
                    domain.work_left = domain.work_limit
                    if domain.undo_count and not vcpu.begun and not paging.undo(domain):
                        regs[RIP] = advanced(regs[RIP], -2)  # the guest makes the hypercall again
                    elif number < 64:
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
            elif domain.reference_lost:
                raise AssertionError(f"{domain!r}: native code was to drop a reference that nothing holds")
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
        steps = cpu.get_rflags() & EFLAGS_TF
        if m2p_loads.is_in_table(address) and m2p_loads.carry_out(vcpu, cpu):
            if steps:
                exception(vcpu, cpu, VECTOR_DB, 0, DR6_STEP)
            return
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
        if emulate.fetch(vcpu, cpu.regs[RIP], 2) == OPCODE_RDPMC:
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
