"""Loads of segment registers that an engine does not do by itself, carried out from the guest's own descriptors.

KVM's hardware descriptor table is the engine's and knows only two flat selectors, so a guest's load of any other
faults: MOV and POP to a segment register, LES, LDS, LFS, LGS, LSS, and every far transfer (IRET, far RET, JMP, CALL),
which loads CS.  Unicorn's far transfers are not the processor's (its IRET enters virtual-8086 mode, which there is not
in long mode), so they are undefined opcodes there (see unicorn/vex.py) and come here too.

All of it is CPL-3 code that stays at CPL 3: Intel SDM vol. 2, MOV, POP, LDS, IRET, RET, JMP, CALL; vol. 3, 5.5 and 5.8.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple, Protocol

from iced_x86 import Code, Instruction, MemorySizeExt, Mnemonic, OpKind, RegisterExt

from xenolith.abi.x86 import (
    CS,
    DR6_STEP,
    DS,
    EFLAGS_DEFINED,
    EFLAGS_IF,
    EFLAGS_IOPL,
    EFLAGS_NT,
    EFLAGS_TF,
    EFLAGS_VIF,
    EFLAGS_VIP,
    EFLAGS_VM,
    ES,
    FS,
    GS,
    MASK16,
    MASK32,
    MASK64,
    RIP,
    RSP,
    SEGMENT_BASE,
    SS,
    VECTOR_DB,
    VECTOR_GP,
    is_canonical,
)
from xenolith.machine.engines.protocol import ModeSwitchState
from xenolith.machine.engines.unicorn.layout import DESC_B, DESC_L
from xenolith.machine.operands import SEGMENTS, GuestFault, GuestView, decode, effective_address, of_stack

FAR_POINTER_LOADS: Final = {
    Mnemonic.LES: ES,
    Mnemonic.LDS: DS,
    Mnemonic.LSS: SS,
    Mnemonic.LFS: FS,
    Mnemonic.LGS: GS,
}
IRETS: Final = {Code.IRETW: 2, Code.IRETD: 4, Code.IRETQ: 8}
FAR_RETURNS: Final = {
    Code.RETFW: 2,
    Code.RETFD: 4,
    Code.RETFQ: 8,
    Code.RETFW_IMM16: 2,
    Code.RETFD_IMM16: 4,
    Code.RETFQ_IMM16: 8,
}
FAR_JUMPS: Final = {
    Code.JMP_M1616: 2,
    Code.JMP_M1632: 4,
    Code.JMP_M1664: 8,
    Code.JMP_PTR1616: 2,
    Code.JMP_PTR1632: 4,
}
FAR_CALLS: Final = {
    Code.CALL_M1616: 2,
    Code.CALL_M1632: 4,
    Code.CALL_M1664: 8,
    Code.CALL_PTR1616: 2,
    Code.CALL_PTR1632: 4,
}
_WORDS: Final = {2: Struct("<5H"), 4: Struct("<5I"), 8: Struct("<5Q")}
# What IRET and POPF leave alone at CPL 3.
KEPT_FLAGS: Final = EFLAGS_IF | EFLAGS_IOPL | EFLAGS_VM | EFLAGS_VIF | EFLAGS_VIP
STEPPED: Final = (VECTOR_DB, 0, DR6_STEP)  # the trap after it


class SegmentCpu(Protocol):
    """What the engines' Cpus offer for this."""

    regs: memoryview
    modes: ModeSwitchState | None
    kernels_far_transfers: int  # how many were carried out in guest-kernel mode
    get_rflags: Callable[[], int]
    set_rflags: Callable[[int], None]

    @property
    def runs_64_bit_code(self) -> bool: ...

    @property
    def view(self) -> GuestView:
        """Memory as the guest sees it now."""

    def load_selector(self, segment: int, selector: int) -> None:
        """ES, DS, FS or GS. Raises GuestFault, and leaves the register as it is."""

    def set_code_stack(self, cs: int, ss: int) -> None:
        """As protocol.Cpu has it. Raises GuestFault."""

    def code_segment(self, selector: int) -> int:
        """The second word of its descriptor. Raises GuestFault where a return to it at CPL 3 would fault."""


class Done(NamedTuple):
    """The instruction was carried out: RIP is where the guest goes on."""

    far: bool = False  # it has loaded CS
    steps: bool = False  # RFLAGS.TF was set: STEPPED follows


def carry_out(cpu: SegmentCpu, faulted_on: int | None = None) -> Done | None:
    """If the instruction at RIP loads a segment register: do it.

    `faulted_on`: the selector, without its RPL, that the processor has refused.  An instruction that loads another is
    not the one that faulted, and is left to the processor again.  None: it is no such instruction.  Raises GuestFault
    where it faults, with nothing changed.
    """
    regs, wide = cpu.regs, cpu.runs_64_bit_code
    rip = regs[RIP]
    code = cpu.view.fetch(rip if wide else rip + regs[CS + SEGMENT_BASE] & MASK32)
    instruction = decode(code, rip, wide)
    action = _action(instruction)
    if action is None:
        return None
    flags = cpu.get_rflags()
    load = _Load(cpu, instruction, wide, faulted_on)
    try:
        action(load)
    except _AnotherInstructionError:
        return Done()
    return Done(load.far, bool(flags & EFLAGS_TF))


def note_far_transfer(cpu: SegmentCpu) -> None:
    """The guest has loaded CS by itself: the hypervisor is to know what kind of code it runs now."""
    if cpu.modes is None:
        return
    cpu.modes.compatibility = not cpu.runs_64_bit_code
    cpu.kernels_far_transfers += cpu.modes.kernel_mode


class _AnotherInstructionError(Exception):
    """It is not the one that faulted."""


def _action(instruction: Instruction) -> Callable[[_Load], None] | None:
    mnemonic, code = instruction.mnemonic, instruction.code
    if mnemonic == Mnemonic.MOV and instruction.op0_register in SEGMENTS:
        return _move
    if mnemonic == Mnemonic.POP and instruction.op0_register in SEGMENTS:
        return _pop
    if mnemonic in FAR_POINTER_LOADS:
        return _load_far_pointer
    if code in IRETS:
        return _iret
    if code in FAR_RETURNS:
        return _far_return
    if code in FAR_JUMPS or code in FAR_CALLS:
        return _far_jump
    return None


class _Load:
    """One such instruction, being carried out."""

    def __init__(self, cpu: SegmentCpu, instruction: Instruction, wide: bool, faulted_on: int | None) -> None:
        self.cpu = cpu
        self.regs = cpu.regs
        self.instruction = instruction
        self.wide = wide
        self.far = False
        self._faulted_on = faulted_on

    def operand(self, size: int) -> bytes:
        """The memory operand."""
        va = effective_address(self.regs, self.instruction, self.wide)
        return self.cpu.view.load(va, size, of_stack=of_stack(self.instruction))

    def expect(self, *selectors: int) -> None:
        """Check that one of these is the selector that the processor has refused."""
        if self._faulted_on is not None and all(selector & ~3 != self._faulted_on for selector in selectors):
            raise _AnotherInstructionError

    def data(self, segment: int, selector: int) -> None:
        """Load a data segment register, or SS."""
        self.expect(selector)
        if segment == SS:
            self.cpu.set_code_stack(self.regs[CS] & MASK16, selector)
        else:
            self.cpu.load_selector(segment, selector)

    # The stack: what moves is SP, ESP or RSP, by the size of the stack segment.

    @property
    def _stack_mask(self) -> int:
        if self.wide:
            return MASK64
        return MASK32 if self.regs[SS + 2] >> 32 & DESC_B else MASK16

    def _stack_va(self, offset: int) -> int:
        at = self.regs[RSP] + offset & self._stack_mask
        return at if self.wide else at + self.regs[SS + SEGMENT_BASE] & MASK32

    def stack(self, words: int, size: int) -> tuple[int, ...]:
        """The topmost words of this size on the stack, which stays as it is."""
        data = self.cpu.view.load(self._stack_va(0), words * size, of_stack=True)
        return _WORDS[size].unpack(data.ljust(5 * size, b"\0"))[:words]

    def push(self, words: tuple[int, ...], size: int) -> None:
        data = b"".join((word & (1 << 8 * size) - 1).to_bytes(size, "little") for word in reversed(words))
        self.cpu.view.store(self._stack_va(-len(data)), data, of_stack=True)
        self.move_stack(-len(data))

    def move_stack(self, by: int) -> None:
        mask = self._stack_mask
        kept = self.regs[RSP] & ~mask if mask == MASK16 else 0
        self.regs[RSP] = kept | self.regs[RSP] + by & mask

    # Going on

    def next(self) -> None:
        """At the instruction behind."""
        self.regs[RIP] = self.instruction.next_ip & (MASK64 if self.wide else MASK32)

    def check_target(self, cs: int, rip: int) -> None:
        """Whether code can go on there. Raises GuestFault."""
        flags = self.cpu.code_segment(cs)
        if not (is_canonical(rip) if flags & DESC_L else rip <= MASK32):
            raise GuestFault(VECTOR_GP, 0)

    def go(self, cs: int, rip: int, ss: int | None = None) -> None:
        """Load CS, RIP and, if given, SS. Raises GuestFault."""
        self.check_target(cs, rip)
        self.cpu.set_code_stack(cs, self.regs[SS] & MASK16 if ss is None else ss)
        self.regs[RIP] = rip
        self.far = True


def _move(load: _Load) -> None:
    instruction = load.instruction
    if instruction.op1_kind == OpKind.REGISTER:
        selector = load.regs[RegisterExt.number(instruction.op1_register)] & MASK16
    else:
        selector = int.from_bytes(load.operand(2), "little")
    load.data(SEGMENTS[instruction.op0_register], selector)
    load.next()


def _pop(load: _Load) -> None:
    (selector,) = load.stack(1, 2)
    load.data(SEGMENTS[load.instruction.op0_register], selector)
    load.move_stack(load.instruction.stack_pointer_increment)
    load.next()


def _load_far_pointer(load: _Load) -> None:
    instruction = load.instruction
    size = MemorySizeExt.size(instruction.memory_size) - 2
    data = load.operand(size + 2)
    load.data(FAR_POINTER_LOADS[instruction.mnemonic], int.from_bytes(data[size:], "little"))
    register, value = RegisterExt.number(instruction.op0_register), int.from_bytes(data[:size], "little")
    load.regs[register] = value if size > 2 else load.regs[register] & ~MASK16 & MASK64 | value
    load.next()


def _iret(load: _Load) -> None:
    size = IRETS[load.instruction.code]
    flags = load.cpu.get_rflags()
    if flags & EFLAGS_NT:
        raise GuestFault(VECTOR_GP, 0)
    rip, cs, new_flags, *outer = load.stack(5 if load.wide else 3, size)
    cs &= MASK16
    ss = outer[1] & MASK16 if outer else None
    load.expect(cs, *(() if ss is None else (ss,)))
    load.go(cs, rip, ss)
    if outer:  # only 64-bit code pops these for a return to the same CPL
        load.regs[RSP] = outer[0]
    else:
        load.move_stack(3 * size)
    kept = KEPT_FLAGS | (~MASK16 if size == 2 else 0)
    load.cpu.set_rflags(flags & kept | new_flags & EFLAGS_DEFINED & ~kept)


def _far_return(load: _Load) -> None:
    instruction = load.instruction
    size = FAR_RETURNS[instruction.code]
    rip, cs = load.stack(2, size)
    load.expect(cs & MASK16)
    released = instruction.immediate(0) if instruction.op_count else 0
    before = load.regs[RSP]
    load.move_stack(2 * size + released)
    after = load.regs[RSP]
    load.regs[RSP] = before
    load.go(cs & MASK16, rip)
    load.regs[RSP] = after


def _far_jump(load: _Load) -> None:
    instruction = load.instruction
    code = instruction.code
    size = FAR_JUMPS.get(code) or FAR_CALLS[code]
    if instruction.op0_kind == OpKind.MEMORY:
        data = load.operand(size + 2)
        rip, cs = int.from_bytes(data[:size], "little"), int.from_bytes(data[size:], "little")
    else:
        rip = instruction.far_branch16 if size == 2 else instruction.far_branch32
        cs = instruction.far_branch_selector
    load.expect(cs)
    cs |= 3 if cs & ~3 else 0  # a jump takes the RPL from CPL, whatever the selector asks for
    if code in FAR_CALLS:
        load.check_target(cs, rip)
        back = instruction.next_ip & (MASK64 if load.wide else MASK32)
        load.push((load.regs[CS] & MASK16, back), size)
    load.go(cs, rip)
