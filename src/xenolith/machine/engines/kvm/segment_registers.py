"""The segment registers of a virtual processor: those that hardware holds, and those that the guest knows.

Hardware CS and SS are always the same two selectors (0x33 or, in compatibility mode, 0x23; and 0x2b); the ones that
the guest knows live in the register file.  Some hosts insist on that, and it costs nothing on the others.  Loads of
other selectors fault for want of a descriptor and are carried out from the guest's own GDT (engines/segment_loads.py).
"""

from __future__ import annotations

from typing import Final

from xenolith.abi import layout
from xenolith.abi.x86 import CS, DS, ES, FS, GS, SS, VECTOR_PF
from xenolith.machine import page_walk, segments
from xenolith.machine.engines.kvm import api, area, run_page
from xenolith.machine.engines.kvm.native_run import KvmFields
from xenolith.machine.engines.kvm.run_page import RunPage
from xenolith.machine.engines.unicorn.layout import DESC_L, FLAT_CODE32, FLAT_CODE64
from xenolith.machine.memory import MachineMemory
from xenolith.machine.operands import GuestFault
from xenolith.machine.segments import Segment

DATA_SEGMENTS: Final = (ES, DS, FS, GS)
NULL_IMAGE: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, 0, 3, 1, 3, 1, 1, 0, 1, 0, 0)
FLAT_CODE: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.USER_CODE64, 0xB, 1, 3, 0, 1, 1, 1, 0, 0)
FLAT_STACK: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.USER_DATA, 3, 1, 3, 1, 1, 0, 1, 0, 0)
CODE0: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.CODE0, 0xB, 1, 0, 0, 1, 1, 1, 0, 0)
DATA0: Final = api.SEGMENT.pack(0, 0xFFFF_FFFF, area.DATA0, 3, 1, 0, 1, 1, 0, 1, 0, 0)


class SegmentRegisters:
    """Those of one vCPU.

    `cs`, `ss`: the images (struct kvm_segment) for the next entry.  `gdt`, `ldt`: linear address and limit of the
    guest's tables.
    """

    def __init__(self, memory: MachineMemory, regs: memoryview, page: RunPage, shared: KvmFields) -> None:
        self._memory = memory
        self._regs = regs
        self._page = page
        self._shared = shared
        self.cs = FLAT_CODE
        self.ss = FLAT_STACK
        self.selectors = run_page.NO_SELECTORS
        self.gdt = (0, 0)
        self.ldt = (0, 0)

    @property
    def is_flat(self) -> bool:
        """Whether the guest runs 64-bit code."""
        return self.cs is FLAT_CODE

    @property
    def hardware_cs(self) -> int:
        return area.USER_CODE64 if self.cs is FLAT_CODE else area.USER_CODE32

    # --- loading ----------------------------------------------------------------------------------------

    def load(self, index: int, selector: int) -> None:
        """Load ES, DS, FS or GS. Raises ValueError where the instruction would fault; the register stays as it is."""
        self._write(index, selector, segments.data_segment(selector, self.descriptor))

    def load_null(self, index: int) -> None:
        self._write(index, 0, segments.NULL)

    def load_code_stack(self, cs: int, ss: int) -> None:
        """Load CS and SS: see protocol.Cpu.set_code_stack. Raises ValueError."""
        code = segments.code_segment(cs, self.descriptor)
        stack = segments.stack_segment(ss, self.descriptor)
        if code.flags & DESC_L:
            self.cs, self.ss = FLAT_CODE, FLAT_STACK
        else:
            self.cs = _image(code, area.USER_CODE32)
            self.ss = _image(stack, area.USER_DATA)
        self._shared.flat = self.is_flat
        for index, selector, segment in ((CS, cs, code), (SS, ss, stack)):
            self._note(index, selector, segment)

    def restore_code_stack(self, cs: int, ss: int) -> None:
        """Of a saved state: Xen's flat pair where the saved selectors are no good any more."""
        try:
            self.load_code_stack(cs | 3, ss)
        except ValueError:
            self.load_code_stack(layout.FLAT_RING3_CS64, layout.FLAT_RING3_SS64)

    def _write(self, index: int, selector: int, segment: Segment) -> None:
        self._note(index, selector, segment)
        image = _image(segment, selector) if selector & ~3 else NULL_IMAGE
        start = run_page.SEGMENT_OFFSETS[index]
        self._page.b[start : start + len(image)] = image
        self.note_selectors()

    def _note(self, index: int, selector: int, segment: Segment) -> None:
        self._regs[index] = selector
        self._regs[index + 1] = segment.base
        self._regs[index + 2] = segment.limit | segment.flags << 32

    # --- what guest code did by itself --------------------------------------------------------------------

    def look_for_loads(self) -> None:
        """Take over data-segment registers that guest code has loaded: null selectors, or the flat one of hardware."""
        if self._page.selectors == self.selectors:
            return
        for index in DATA_SEGMENTS:
            base, limit, selector, *_ = api.SEGMENT.unpack_from(self._page.b, run_page.SEGMENT_OFFSETS[index])
            if selector != self._regs[index] & 0xFFFF:
                self._regs[index] = selector
                self._regs[index + 1] = base
                self._regs[index + 2] = limit
        self.note_selectors()

    def look_for_far_jump(self, selector: int) -> None:
        """`selector` was in CS when the guest stopped: take over a jump between 64-bit and 32-bit code."""
        if selector == self.hardware_cs:
            return
        flags = FLAT_CODE64 if selector == area.USER_CODE64 else FLAT_CODE32
        code = Segment(0, 0xFFFF_FFFF, flags)
        self.cs = FLAT_CODE if selector == area.USER_CODE64 else _image(code, area.USER_CODE32)
        self.ss = FLAT_STACK
        self._shared.flat = self.is_flat
        self._note(CS, selector, code)

    def note_selectors(self) -> None:
        """The data-segment registers of the page are what the register file says."""
        self.selectors = self._page.selectors
        self._shared.selectors[:] = self.selectors

    # --- descriptors --------------------------------------------------------------------------------------

    def descriptor(self, selector: int) -> bytes | None:
        """The descriptor of a selector; None if that is outside of its table."""
        va, limit = self.ldt if selector & segments.SELECTOR_TI else self.gdt
        offset = selector & 0xFFF8
        if not va or offset + 7 > limit:
            return None
        descriptor = page_walk.read(self._memory, self._shared.l4_mfn, va + offset, 8)
        if descriptor is None:
            raise GuestFault(VECTOR_PF, 0, va + offset)  # by the processor's own read of the table
        return descriptor


def _image(segment: Segment, selector: int) -> bytes:
    """A segment in the form of struct kvm_segment."""
    flags = segment.flags
    return api.SEGMENT.pack(
        segment.base,
        segment.limit,
        selector,
        flags >> 8 & 15,
        flags >> 15 & 1,
        flags >> 13 & 3,
        flags >> 22 & 1,
        flags >> 12 & 1,
        flags >> 21 & 1,
        flags >> 23 & 1,
        flags >> 20 & 1,
        0,
    )
