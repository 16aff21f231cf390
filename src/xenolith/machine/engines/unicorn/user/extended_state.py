"""XSAVE components on Unicorn, which has two of them: an image of all, and XSAVE and its kin carried out on it."""

from __future__ import annotations

from contextlib import suppress
from ctypes import addressof
from typing import Final

from iced_x86 import Instruction, Mnemonic

from xenolith.abi.x86 import (
    CR4_OSXSAVE,
    MASK32,
    MASK64,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PFEC_PRESENT,
    PFEC_USER,
    PFEC_WRITE,
    PTE_A,
    PTE_D,
    PTE_P,
    PTE_RW,
    PTE_US,
    RAX,
    RCX,
    RDX,
    RIP,
    VECTOR_GP,
    VECTOR_PF,
    XSAVE_HEADER,
    advanced,
    is_canonical,
)
from xenolith.machine import native, page_walk
from xenolith.machine.engines.adaptive import extended
from xenolith.machine.engines.adaptive.extended import BOTH_HAVE
from xenolith.machine.engines.adaptive.extended_native import NativeExtended
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.memory import MachineMemory
from xenolith.machine.operands import GuestFault, effective_address

_CR3, _CR4 = layout.CR // 8 + 3, layout.CR // 8 + 4
_WIDE: Final = {  # with 64-bit pointers, which makes no difference to what Unicorn keeps of them
    Mnemonic.XSAVE: Mnemonic.XSAVE64,
    Mnemonic.XSAVEOPT: Mnemonic.XSAVEOPT64,
    Mnemonic.XSAVEC: Mnemonic.XSAVEC64,
    Mnemonic.XRSTOR: Mnemonic.XRSTOR64,
}
_HEADER: Final = slice(XSAVE_HEADER, XSAVE_HEADER + 8)


class _Operand(extended.Area):
    """The memory operand, read and written as the processor does: with accessed and dirty bits, or a fault."""

    def read(self, size: int, writable: bool = False) -> bytearray:
        """Its first bytes. Raises GuestFault."""
        if self._va % extended.ALIGNMENT:
            raise GuestFault(VECTOR_GP, 0)
        rights = PTE_P | PTE_US | (PTE_RW if writable else 0)
        bits = PTE_A | PTE_D if writable else PTE_A
        self._pieces = []
        va = self._va
        while size:
            length = min(size, PAGE_SIZE - (va & PAGE_MASK))
            if not is_canonical(va):
                raise GuestFault(VECTOR_GP, 0)
            address = page_walk.accessed(self._memory, self._l4_mfn, va, rights, bits)
            if address is None:
                present = page_walk.machine_address(self._memory, self._l4_mfn, va) is not None
                kind = (PFEC_WRITE if writable else 0) | (PFEC_PRESENT if present else 0)
                raise GuestFault(VECTOR_PF, PFEC_USER | kind, va)
            self._pieces.append(slice(address, address + length))
            va, size = advanced(va, length), size - length
        return bytearray(b"".join(self._memory.b[piece] for piece in self._pieces))


class ExtendedState:
    """Of the vCPU on this Cpu. `image` is in the standard format; its x87 and SSE parts are as `current` left them."""

    def __init__(self, cpu: UnicornCpu, memory: MachineMemory, components: list[extended.Component], size: int) -> None:
        self._cpu = cpu
        self._memory = memory
        self._components = components
        self.image = bytearray(size)
        self.xcr0 = 1
        self._native: NativeExtended | None = None
        with suppress(native.Missing):
            self._native = NativeExtended(cpu, memory, components, wide=True)

    def load(self, image: bytes | bytearray, xcr0: int) -> None:
        """Another vCPU's state; Unicorn has been given its own part."""
        self.image[:] = image[: len(self.image)].ljust(len(self.image), b"\0")
        self.set_xcr0(xcr0)

    def set_xcr0(self, value: int) -> None:
        """What the guest may use. XSAVE and its kin are undefined on Unicorn, and carried out on all components."""
        self.xcr0 = value
        self._cpu.words[_CR4] &= ~CR4_OSXSAVE
        if self._native is not None:
            self._native.use(self.image, value)

    @property
    def native_fields(self) -> int | None:
        """Address of the Extended that native code works on, if there is such."""
        return None if self._native is None else addressof(self._native.fields)

    @property
    def handled(self) -> int:
        """How many instructions native code has carried out."""
        return 0 if self._native is None else self._native.fields.handled

    def rest(self) -> None:
        """Unicorn executes them by itself."""
        self._cpu.words[_CR4] |= CR4_OSXSAVE
        if self._native is not None:
            self._native.rest()

    def current(self) -> bytearray:
        """The image, with what Unicorn has of it brought up to date."""
        return extended.bring_up_to_date(self.image, self._cpu.store_extended)

    def carry_out(self, instruction: Instruction) -> bool:
        """Carry out XGETBV or an instruction of the XSAVE family at RIP, if it is one and succeeds.

        Raises GuestFault where the processor would fault.
        """
        regs, mnemonic = self._cpu.regs, _WIDE.get(instruction.mnemonic, instruction.mnemonic)
        if mnemonic == Mnemonic.XGETBV and regs[RCX] & MASK32 <= 1:
            value = self.xcr0
            if regs[RCX] & MASK32:
                value &= int.from_bytes(self.image[_HEADER], "little") | BOTH_HAVE
            regs[RAX], regs[RDX], regs[RIP] = value & MASK32, value >> 32, instruction.next_ip
            return True
        saves = mnemonic in extended.SAVES
        if not saves and mnemonic != Mnemonic.XRSTOR64:
            return False
        requested = regs[RDX] << 32 & MASK64 | regs[RAX] & MASK32
        va = effective_address(regs, instruction, wide=self._cpu.runs_64_bit_code)
        area = _Operand(self._memory, self._cpu.words[_CR3] >> PAGE_SHIFT, va)
        image = self.current()
        if saves:
            extended.save(mnemonic, image, self.xcr0, requested, self._components, area)
            for mfn in area.frames:
                self._cpu.code_written(mfn)
        else:
            if not extended.restore(image, self.xcr0, requested, self._components, area, wide=True):
                raise GuestFault(VECTOR_GP, 0)  # of what stands there
            image[XSAVE_HEADER] |= BOTH_HAVE
            self._cpu.load_extended(image)
        regs[RIP] = instruction.next_ip
        return True
