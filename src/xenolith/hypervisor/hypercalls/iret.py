"""iret: a guest kernel goes on where a frame on its stack says, in either mode (Xen: do_iret; SDM vol. 2, IRET)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.hypercalls import VGCF_in_syscall
from xenolith.abi.x86 import (
    CS,
    EFLAGS_DEFINED,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_VM,
    GS_BASE,
    LOWER_HALF_END,
    R11,
    RAX,
    RCX,
    RIP,
    RSP,
    SS,
    UPPER_HALF,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_SS,
    is_canonical,
)
from xenolith.hypervisor import descriptors
from xenolith.hypervisor.bounce import crash, inject
from xenolith.hypervisor.guest_memory import READ, copy_from_guest, translate
from xenolith.machine.engines.protocol import ALWAYS_SET

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Vcpu
    from xenolith.machine.engines.protocol import Cpu

IRET_FLAGS: Final = EFLAGS_DEFINED & ~(EFLAGS_IOPL | EFLAGS_VM)
LONG_MODE_CODE: Final = 1 << 53  # L: 64-bit code
_unpack_iret = layout.IRET_FRAME.unpack_from


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
    if vcpu.architectural_iopl:
        vcpu.iopl = rflags >> 12 & 3
    cpu.set_rflags(rflags & IRET_FLAGS | ALWAYS_SET)
    if (cs, ss) in vcpu.flat_selectors and not vcpu.compatibility:
        regs[CS] = cs
        regs[SS] = ss
        if rip < LOWER_HALF_END or rip >= UPPER_HALF:
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


def load_code_stack(vcpu: Vcpu, cpu: Cpu, cs: int, ss: int) -> tuple[int, int] | None:
    """Load CS and SS by their descriptors; the (vector, error code) if the engine cannot."""
    try:
        cpu.set_code_stack(cs, ss)
    except ValueError:
        return VECTOR_GP, cs & 0xFFFC
    flat = bool(descriptors.lookup(vcpu, cs) & LONG_MODE_CODE)
    vcpu.compatibility = not flat
    if flat:
        vcpu.add_flat_pair(cs, ss)
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
