"""The x87 and SSE state, between QEMU's own form and a standard XSAVE image (Intel SDM vol. 1, 10.5.1 and 13.4).

An XSAVE image numbers x87 registers from the top of the stack, QEMU by physical register.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from xenolith.abi.x86 import INITIAL_MXCSR, XSAVE_EXTENDED, XSAVE_HEADER, XSTATE_SSE, XSTATE_X87
from xenolith.machine.engines.unicorn import layout

_CONTROL = Struct("<HHBxHQQII")  # FCW FSW FTW (abridged) FOP FIP FDP MXCSR MXCSR_MASK
_ST: Final = 32
_XMM: Final = 160
_TOP_SHIFT: Final = 11
_TOP: Final = 7 << _TOP_SHIFT
_INITIAL_FCW: Final = 0x37F
_X87: Final = Struct("10s6x" * 8)
_IMAGE_XMM: Final = Struct("16s" * 16)
_QEMU_XMM: Final = Struct(f"16s{layout.XMM_STRIDE - 16}x" * 16)  # what follows each is AVX's, which Unicorn has not
_EMPTY: Final = [bytes(not tags >> i & 1 for i in range(8)) for tags in range(256)]  # by abridged tags: QEMU's


def save(env: memoryview, image: bytearray) -> None:
    """Write the state in `env` (the bytes of CPUX86State) as an XSAVE image over the start of `image`."""
    top = env[layout.FPSTT] & 7
    status = int.from_bytes(env[layout.FPUS : layout.FPUS + 2], "little") & ~_TOP | top << _TOP_SHIFT
    control = int.from_bytes(env[layout.FPUC : layout.FPUC + 2], "little")
    tags = sum(1 << i for i in range(8) if not env[layout.FPTAGS + i])
    fip = int.from_bytes(env[layout.FPIP : layout.FPIP + 8], "little")
    fdp = int.from_bytes(env[layout.FPDP : layout.FPDP + 8], "little")
    mxcsr = int.from_bytes(env[layout.MXCSR : layout.MXCSR + 4], "little")
    image[:XSAVE_EXTENDED] = bytes(XSAVE_EXTENDED)
    _CONTROL.pack_into(image, 0, control, status, tags, 0, fip, fdp, mxcsr, layout.MXCSR_DEFINED)
    physical = _X87.unpack_from(env, layout.FPREGS)
    _X87.pack_into(image, _ST, *physical[top:], *physical[:top])
    image[_XMM : _XMM + 256] = b"".join(_QEMU_XMM.unpack_from(env, layout.XMM))
    image[XSAVE_HEADER] = XSTATE_X87 | XSTATE_SSE


def restore(image: bytes | bytearray, env: memoryview) -> None:
    """Load an XSAVE image into `env`; the caller has QEMU recompute what it derives from FCW and MXCSR."""
    components = image[XSAVE_HEADER]
    control, status, tags, _, fip, fdp, mxcsr, _ = _CONTROL.unpack_from(image)
    if not components & XSTATE_X87:
        control, status, tags, fip, fdp = _INITIAL_FCW, 0, 0, 0, 0
    top = status >> _TOP_SHIFT & 7
    env[layout.FPSTT : layout.FPSTT + 4] = top.to_bytes(4, "little")
    env[layout.FPUS : layout.FPUS + 2] = (status & ~_TOP).to_bytes(2, "little")
    env[layout.FPUC : layout.FPUC + 2] = control.to_bytes(2, "little")
    env[layout.FPIP : layout.FPIP + 8] = fip.to_bytes(8, "little")
    env[layout.FPDP : layout.FPDP + 8] = fdp.to_bytes(8, "little")
    env[layout.FPTAGS : layout.FPTAGS + 8] = _EMPTY[tags]
    stack = _X87.unpack_from(image, _ST) if components & XSTATE_X87 else (b"",) * 8
    _X87.pack_into(env, layout.FPREGS, *stack[8 - top :], *stack[: 8 - top])
    if not components & XSTATE_SSE:
        mxcsr = INITIAL_MXCSR
    env[layout.MXCSR : layout.MXCSR + 4] = (mxcsr & layout.MXCSR_DEFINED).to_bytes(4, "little")
    registers = _IMAGE_XMM.unpack_from(image, _XMM) if components & XSTATE_SSE else (b"",) * 16
    _QEMU_XMM.pack_into(env, layout.XMM, *registers)
