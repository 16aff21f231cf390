"""XSAVE and its kin in C do exactly what they do in Python, on random states and areas."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iced_x86 import Mnemonic

from xenolith.abi.x86 import PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US, RAX, RCX, RDI, RDX, RIP, XSAVE_HEADER
from xenolith.machine import native
from xenolith.machine.engines.adaptive import extended
from xenolith.machine.engines.adaptive.extended_native import NativeExtended
from xenolith.machine.engines.unicorn.engine import UnicornEngine
from xenolith.machine.memory import MachineMemory

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native code here: {native.missing()}")

CODE, AREA = 0x40_0000, 0x40_1000
PAGES = 4
WHOLE = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D
COMPONENTS = [
    extended.Component(2, 576, 256, False),
    extended.Component(5, 1088, 64, False),
    extended.Component(6, 1152, 512, True),
    extended.Component(7, 1664, 1024, True),
    extended.Component(9, 2688, 8, False),
]
XCR0 = 0b10_1110_0111
SIZE = 2696
INSTRUCTIONS = {  # with RDI as base, plain and with a displacement
    Mnemonic.XSAVE64: ("48 0f ae 27", "48 0f ae 67 40"),
    Mnemonic.XSAVEOPT64: ("48 0f ae 37", "48 0f ae b7 40 00 00 00"),
    Mnemonic.XSAVEC64: ("48 0f c7 27", "48 0f c7 67 40"),
    Mnemonic.XRSTOR64: ("48 0f ae 2f", "48 0f ae 6f 40"),
}


class Subject:
    """A vCPU on Unicorn with code and an area, and the image of the components that Unicorn has not."""

    def __init__(self, natively: bool) -> None:
        self.memory = MachineMemory(64)
        self.engine = UnicornEngine(self.memory)
        self.cpu = self.engine.cpu(0)
        frames = [int(mfn) for mfn in self.memory.allocate(4 + PAGES)]
        self.l4, l3, l2, self.l1, *self.pages = frames
        q = self.memory.q
        q[self.l4 << 9] = l3 << 12 | WHOLE
        q[l3 << 9] = l2 << 12 | WHOLE
        q[(l2 << 9) + (CODE >> 21)] = self.l1 << 12 | WHOLE
        for number, mfn in enumerate(self.pages):
            q[(self.l1 << 9) + number] = mfn << 12 | WHOLE
        self.cpu.switch_mode(self.l4, False)
        self.image = bytearray(SIZE)
        self.native = NativeExtended(self.cpu, self.memory, COMPONENTS) if natively else None
        if self.native is not None:
            self.native.use(self.image, XCR0)

    def prepare(self, random: Random) -> tuple[int, int, int]:
        """A random state; the instruction, what it asks for, and the address of its area."""
        mnemonic = random.choice(list(INSTRUCTIONS))
        which = random.randrange(2)
        va = AREA + random.choice((0, 0x40, 0x3C0, 0xC00, 0x2C00, 8))
        requested = random.choice((XCR0, 3, 1, 2, 4, 0xE7, (1 << 64) - 1))
        area = bytearray(random.randbytes(3 * 4096))
        start = va - AREA
        given = random.choice((0, 3, 7, 0xE7, 2, 1, 0x227, 1 << 20))
        compacted = random.choice((0, 0, extended.COMPACTED | XCR0, extended.COMPACTED | 3, 1))
        area[start + 24 : start + 28] = (0x1F80 if random.random() < 0.8 else 0x1_0000).to_bytes(4, "little")
        header = given.to_bytes(8, "little") + compacted.to_bytes(8, "little") + bytes(48)
        if random.random() < 0.95:
            area[start + 512 : start + 576] = header
        if random.random() < 0.5:
            area[start + 576 :] = bytes(len(area) - start - 576)
        for number, mfn in enumerate(self.pages[1:]):
            self.memory.page(mfn)[:] = area[number * 4096 :][:4096]
        state = bytearray(random.randbytes(416)) + bytes(160)
        state[24:32] = b"\x80\x1f\0\0\xff\xff\0\0"
        for i in range(8):
            state[32 + 16 * i + 10 : 48 + 16 * i] = bytes(6)
        state[XSAVE_HEADER] = 3
        self.cpu.load_extended(state)
        self.image[:] = random.randbytes(SIZE)
        used = random.choice((3, 7, 0xE7, 0x227)) | 3
        self.image[XSAVE_HEADER : XSAVE_HEADER + 64] = used.to_bytes(8, "little") + bytes(56)
        flags = WHOLE & ~(PTE_D if random.random() < 0.1 else 0) & ~(PTE_RW if random.random() < 0.1 else 0)
        self.memory.q[(self.l1 << 9) + 2] = self.pages[2] << 12 | flags
        code = bytes.fromhex(INSTRUCTIONS[mnemonic][which])
        self.memory.page(self.pages[0])[: len(code)] = code
        regs = self.cpu.regs
        regs[RIP], regs[RDI], regs[RCX] = CODE, va - 0x40 * which, 0
        regs[RAX], regs[RDX] = requested & 0xFFFF_FFFF, requested >> 32
        return mnemonic, requested, va

    def carry_out(self, mnemonic: int, requested: int, va: int) -> bool:
        if self.native is not None:
            return self.native.carry_out()
        image, area = self.image, extended.Area(self.memory, self.l4, va)
        wide = int.from_bytes(image[512:520], "little") & ~3
        self.cpu.store_extended(image)
        image[512:520] = (wide | 3).to_bytes(8, "little")
        try:
            if mnemonic in extended.SAVES:
                return extended.save(mnemonic, image, XCR0, requested, COMPONENTS, area)
            if not extended.restore(image, XCR0, requested, COMPONENTS, area):
                return False
        except extended.OperandFault:  # which native code leaves to this
            return False
        image[XSAVE_HEADER] |= 3
        self.cpu.load_extended(image)
        return True

    def state(self) -> tuple[bytes, bytes, bytes]:
        """The area, x87 and SSE state, and the other components."""
        legacy = bytearray(576)
        self.cpu.store_extended(legacy)
        pages = b"".join(bytes(self.memory.page(mfn)) for mfn in self.pages[1:])
        return pages, bytes(legacy), bytes(self.image[XSAVE_HEADER:])

    def close(self) -> None:
        if self.native is not None:
            self.native.rest()
        self.engine.close()


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_saves_and_restores_are_the_same(random: Random) -> None:
    natively, reference = subjects = Subject(True), Subject(False)
    for _ in range(20):
        seed = random.getrandbits(32)
        operation, _ = (subject.prepare(Random(seed)) for subject in subjects)
        assert natively.carry_out(*operation) == reference.carry_out(*operation)
        for ours, theirs in zip(natively.state(), reference.state(), strict=True):
            assert ours == theirs
    assert natively.native is not None and natively.native.fields.handled  # and not all was refused
    for subject in subjects:
        subject.close()
