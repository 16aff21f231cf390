"""What the processor has and Unicorn has not: CPUID, and the instructions that a vCPU on Unicorn borrows.

CPUID is answered from the host.  XSAVE and its kin are carried out here or in C (extended.py), on an image of all the
components.  What else Unicorn takes for undefined is decoded here, for the adaptive engine to execute it on KVM.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, RegisterExt

from xenolith.abi.x86 import CS, MASK32, MASK64, PAGE_SHIFT, RAX, RBX, RCX, RDX, RIP, SEGMENT_BASE, XSAVE_HEADER
from xenolith.machine import native, page_walk
from xenolith.machine.engines.adaptive import extended
from xenolith.machine.engines.adaptive.extended import BOTH_HAVE
from xenolith.machine.engines.adaptive.extended_native import NativeExtended
from xenolith.machine.engines.kvm.engine import KvmEngine
from xenolith.machine.engines.protocol import CpuState
from xenolith.machine.engines.unicorn import features, layout
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.memory import MachineMemory
from xenolith.machine.operands import effective_address

DECODED: Final = 256  # instructions kept decoded
CPUID_ANSWERS: Final = 256  # kept; a static program asks for forty when it starts
_CR3: Final = layout.CR // 8 + 3
_IMPLICIT_MEMORY: Final = (OpKind.MEMORY_SEG_RDI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_ESRDI, OpKind.MEMORY_ESEDI)


def bits(*numbers: int) -> int:
    """The word that has these bits set."""
    return sum(1 << number for number in numbers)


class Borrowed:
    """Of one vCPU, while it is on Unicorn. `state.xsave` is the image of all components, `state.xcr0` says which."""

    def __init__(self, memory: MachineMemory, unicorn: UnicornCpu, kvm: KvmEngine, state: CpuState) -> None:
        self._memory, self._unicorn, self._kvm, self._state = memory, unicorn, kvm, state
        self._regs = unicorn.regs
        self._decoded: dict[tuple[int, int, bytes], Instruction] = {}
        self._cpuid_answers: dict[tuple[int, int], tuple[int, ...]] = {}  # by leaf and subleaf
        self.components = extended.components(kvm.xcr0_mask, kvm.host_cpuid)
        self._native: NativeExtended | None = None
        with suppress(native.Missing):
            self._native = NativeExtended(unicorn, memory, self.components)

    @property
    def has_more(self) -> bool:
        """Whether the processor has components that Unicorn has not."""
        return bool(self._kvm.xcr0_mask & ~BOTH_HAVE)

    def prepare(self, on_unicorn: bool) -> None:
        """Have native code execute XSAVE and its kin while the vCPU is on Unicorn."""
        if self._native is not None:
            if on_unicorn and self.has_more:
                self._native.use(self._state.xsave, self._state.xcr0)
            else:
                self._native.rest()

    # --- CPUID ----------------------------------------------------------------------------------------------

    def answer_cpuid(self) -> None:
        """CPUID executed on Unicorn: as on KVM, but for what had better not be used here."""
        regs = self._regs
        question = regs[RAX] & MASK32, regs[RCX] & MASK32
        answer = self._cpuid_answers.get(question)
        if answer is None:
            answer = self._cpuid_answer(*question)
            if len(self._cpuid_answers) < CPUID_ANSWERS:
                self._cpuid_answers[question] = answer
        regs[RAX], regs[RBX], regs[RCX], regs[RDX] = answer

    def _cpuid_answer(self, leaf: int, subleaf: int) -> tuple[int, ...]:
        answer = self._kvm.host_cpuid(leaf, subleaf) if leaf != 7 or not subleaf else (0, 0, 0, 0)
        return tuple(value & ~features.UNTOLD.get((leaf, register), 0) for register, value in enumerate(answer))

    # --- instructions ---------------------------------------------------------------------------------------

    def instruction(self) -> Instruction:
        """The instruction at RIP."""
        bits = 64 if self._regs[CS + 2] >> 32 & layout.DESC_L else 32
        place = bits, self._regs[RIP], self.code(15) or b""
        instruction = self._decoded.get(place)
        if instruction is None:
            if len(self._decoded) >= DECODED:
                self._decoded.clear()
            instruction = self._decoded[place] = Decoder(bits, place[2], ip=place[1]).decode()
        return instruction

    def code(self, size: int) -> bytes | None:
        regs = self._regs
        va = regs[RIP] + regs[CS + SEGMENT_BASE] & MASK64
        return page_walk.read(self._memory, regs[_CR3] >> PAGE_SHIFT, va, size)

    def frames_written(self, instruction: Instruction, l4_mfn: int, wide: bool) -> list[int]:
        """Frames with translated code that this one, which was just executed on KVM, may have written to.

        `l4_mfn` and `wide`: the page table, and whether 64-bit code, that it ran on.
        """
        kinds = [instruction.op_kind(operand) for operand in range(instruction.op_count)]
        if instruction.is_vsib or any(kind in _IMPLICIT_MEMORY for kind in kinds):
            return self._unicorn.frames_with_code()
        if OpKind.MEMORY not in kinds:
            return []
        start = effective_address(self._regs, instruction, wide)
        walk = page_walk.machine_address
        addresses = (walk(self._memory, l4_mfn, va & MASK64) for va in (start, start + 4095))
        return [address >> PAGE_SHIFT for address in addresses if address is not None]

    # --- extended state -------------------------------------------------------------------------------------

    def saved_or_restored(self, instruction: Instruction) -> bool:
        """Carry out an instruction of the XSAVE family, which Unicorn has not for all components, if it succeeds.

        Raises OperandFault where it would be a page fault: a signal's frame on a stack that a fork has shared.
        """
        regs, mnemonic = self._regs, instruction.mnemonic
        saves = mnemonic in extended.SAVES
        if not saves and mnemonic != Mnemonic.XRSTOR64:
            return False
        xcr0, requested = self._state.xcr0, regs[RDX] << 32 & MASK64 | regs[RAX] & MASK32
        # What an XRSTOR replaces as a whole need not be brought up to date before.
        image = self.image() if saves or requested & xcr0 & BOTH_HAVE != BOTH_HAVE else self._state.xsave
        va = effective_address(regs, instruction, wide=True)
        area = extended.Area(self._memory, regs[_CR3] >> PAGE_SHIFT, va)
        if saves:
            if not extended.save(mnemonic, image, xcr0, requested, self.components, area):
                return False
            for mfn in area.frames:
                self._unicorn.code_written(mfn)
        else:
            if not extended.restore(image, xcr0, requested, self.components, area):
                return False
            image[XSAVE_HEADER] |= BOTH_HAVE  # what is in its initial state has been written too
            self._unicorn.load_extended(image)
        regs[RIP] = instruction.next_ip
        return True

    def image(self) -> bytearray:
        """The extended state: the image of all, with what Unicorn has brought up to date."""
        return extended.bring_up_to_date(self._state.xsave, self._unicorn.store_extended)


def uses_extended_state(instruction: Instruction) -> bool:
    """Whether it is one that CR0.TS concerns."""
    registers = (instruction.op_register(operand) for operand in range(instruction.op_count))
    return instruction.is_save_restore_instruction or any(map(RegisterExt.is_vector_register, registers))
