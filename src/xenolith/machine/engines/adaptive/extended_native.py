"""The instructions of extended.py in native code (extended.c), where there is a compiler."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_uint8, c_uint32, c_uint64
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Final

from xenolith.abi import x86
from xenolith.machine import native, page_walk
from xenolith.machine.engines.adaptive import extended
from xenolith.machine.engines.unicorn import layout
from xenolith.machine.engines.unicorn.cpu import UnicornCpu
from xenolith.machine.memory import MachineMemory
from xenolith.machine.native import Fields

MOST_COMPONENTS: Final = 16
SOURCE: Final = Path(__file__).with_name("extended.c")
HALVES: Final = (page_walk.SOURCE,)


class Extended(ctypes.Structure):
    """What extended.c works on; `image` is that of the components that Unicorn has not."""

    handled: int  # instructions carried out

    _fields_: ClassVar[Fields] = (
        ("env", c_uint64),
        ("image", c_uint64),
        ("memory", c_uint64),
        ("memory_size", c_uint64),
        ("xcr0", c_uint64),
        ("handled", c_uint64),
        ("update_fp_status", c_uint64),
        ("update_mxcsr_status", c_uint64),
        ("code_written", c_uint64),
        ("start", c_uint32 * MOST_COMPONENTS),
        ("size", c_uint32 * MOST_COMPONENTS),
        ("number", c_uint8 * MOST_COMPONENTS),
        ("aligned", c_bool * MOST_COMPONENTS),
        ("components", c_uint32),
        ("wide", c_bool),  # XRSTOR of extended components in use is carried out, too
    )


_IN_C: Final = {
    "env": "u8 *{}",
    "image": "u8 *{}",
    "memory": "u8 *{}",
    "update_fp_status": "void (*{})(void *env)",
    "update_mxcsr_status": "void (*{})(void *env)",
    "code_written": "void (*{})(u64 mfn)",
}


# Where these begin in the first 416 bytes of an image, and behind which of them they end.
_PLACES: Final = SimpleNamespace(
    MXCSR_IN_IMAGE=extended.MXCSR.start,
    ST=extended.X87_PARTS[1].start,
    XMM_IN_IMAGE=extended.SSE_PART.start,
    LEGACY_END=extended.SSE_PART.stop,
)


def declarations() -> str:
    """Of everything that extended.c uses."""
    return (
        native.define(
            x86,
            "RAX RDX RIP PTE_P PTE_US PTE_D PTE_PSE PTE_ADDRESS "
            "XSTATE_X87 XSTATE_SSE XSTATE_AVX XSAVE_HEADER XSAVE_EXTENDED INITIAL_MXCSR",
        )
        + native.define(extended, "COMPACTED MXCSR_DEFINED LOADABLE STORABLE")
        + native.define(_PLACES, " ".join(vars(_PLACES)))
        + native.define(layout, "CR HFLAGS HF_TS HF_CS64 FPSTT FPUS FPUC FPTAGS FPREGS FPIP FPDP MXCSR XMM XMM_STRIDE")
        + native.declare("extended", Extended, _IN_C)
    )


class NativeExtended:
    """The extended state of a vCPU on this UnicornCpu. Raises native.Missing."""

    def __init__(
        self, cpu: UnicornCpu, memory: MachineMemory, components: list[extended.Component], wide: bool = False
    ) -> None:
        library = native.load(SOURCE, declarations(), HALVES)
        self._carry_out = native.function_address(library.carry_out)
        self._cpu = cpu
        self._image: object = None
        self.fields = fields = Extended(
            env=cpu.env,
            memory=memory.address,
            memory_size=memory.size,
            components=len(components),
            wide=wide,
            **{name: native.function_address(function) for name, function in cpu.extended_calls.items()},
        )
        for place, component in enumerate(components):
            fields.start[place], fields.size[place] = component.start, component.size
            fields.number[place], fields.aligned[place] = component.number, component.aligned

    def use(self, image: bytearray, xcr0: int) -> None:
        """Carry out the vCPU's instructions, with the other components in this image, until `use` or `rest`."""
        self._image = ctypes.c_char.from_buffer(image)
        self.fields.image = native.buffer_address(image)
        self.fields.xcr0 = xcr0
        self._cpu.carry_out_extended(ctypes.addressof(self.fields), self._carry_out)

    def carry_out(self) -> bool:
        """Execute the instruction at RIP, as Unicorn's hook does at an undefined opcode; False: it is none of these."""
        function = ctypes.PYFUNCTYPE(c_bool, c_uint64)(self._carry_out)
        return bool(function(ctypes.addressof(self.fields)))

    def rest(self) -> None:
        """Carry out none."""
        self._cpu.carry_out_extended(0, 0)
        self._image = None
