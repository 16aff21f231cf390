"""A vCPU in its domain's record: its registers, tables, areas and timers."""

from __future__ import annotations

from array import array
from typing import Final

from xenolith.abi import layout
from xenolith.abi.layout import VCPU_INFO_SIZE
from xenolith.abi.x86 import (
    CS,
    DS,
    ES,
    FS,
    FS_BASE,
    GS,
    GS_BASE,
    PAGE_SIZE,
    RFLAGS,
    RIP,
    SS,
    XSAVE_EXTENDED,
    XSAVE_HEADER,
    XSAVE_MXCSR,
    XSTATE_SSE,
    XSTATE_X87,
    is_canonical,
    is_legal_xcr0,
)
from xenolith.hypervisor import descriptors, paging
from xenolith.hypervisor.domain import Vcpu
from xenolith.hypervisor.domain_record.fields import pack, unpack
from xenolith.hypervisor.domain_record.kinds import (
    ADDRESS,
    U16,
    U64,
    Array,
    Listing,
    Number,
    Octets,
    Optional,
    Plain,
    Record,
    RecordError,
)
from xenolith.hypervisor.frames import TYPE_L4, TYPE_WRITABLE
from xenolith.hypervisor.hypercalls import misc
from xenolith.machine import segments
from xenolith.machine.engines.protocol import ALWAYS_SET, ENTRY_FLAGS

_SELECTORS: Final = (ES, CS, SS, DS, FS, GS)
MOST_XSAVE: Final = 1 << 14


def vcpu_state(vcpu: Vcpu) -> dict[str, Plain]:
    """A vCPU without its timers, its state stored."""
    state = vcpu.state
    regs = state.regs
    return {
        **pack(vcpu),
        "kernel_l4": vcpu.kernel_l4,
        "user_l4": vcpu.user_l4,
        "debug": list(vcpu.debug),
        "gdt_frames": list(vcpu.gdt_frames),
        "gdt_entries": vcpu.gdt_entries,
        "info_mfn": vcpu.info_mfn,
        "info_offset": vcpu.info & PAGE_SIZE - 1 if vcpu.info_mfn else 0,
        "polls": [vcpu.poll_port] if vcpu.poll_port > 0 else [] if vcpu.poll_port else None,
        "cpu": {
            **pack(state),
            "regs": regs[: RIP + 1].tolist(),
            "rflags": regs[RFLAGS],
            "selectors": [regs[index] & 0xFFFF for index in _SELECTORS],
            "fs_base": regs[FS_BASE],
            "gs_base": regs[GS_BASE],
            "xsave": bytes(state.xsave).hex(),
            "xcr0": state.xcr0,
        },
    }


def timers_state(vcpu: Vcpu) -> dict[str, Plain]:
    """Its timers, in ns of the domain's time."""
    timers, ahead = vcpu.timers, vcpu.domain.clock_ahead
    return {
        **pack(timers),
        **{
            name: (deadline := getattr(timers, name).deadline) and max(deadline + ahead, 1)
            for name in ("singleshot", "poll")
        },
    }


def load_vcpu(vcpu: Vcpu, record: Record) -> None:
    """After `unpack`: its debug registers and its GDT. Raises RecordError, as all below."""
    if vcpu.time_area_va & 7 or (vcpu.ldt_entries and vcpu.ldt_va & PAGE_SIZE - 1):
        raise RecordError(f"{record.where} has an area at an address where it cannot be")
    for number, value in enumerate(record.get("debug", Array(U64, 8))):
        if value and misc.do_set_debugreg(vcpu, number, value):
            raise RecordError(f"{record.where} has a debug register that it cannot have")
    vcpu.state.debug = list(vcpu.debug)
    entries = record.get("gdt_entries", Number(layout.FIRST_RESERVED_GDT_ENTRY + 1))
    if descriptors.set_gdt_frames(vcpu, record.get("gdt_frames", Listing(U64, 14)), entries):
        raise RecordError(f"{record.where}: what is said to be its GDT cannot be one")


def take_references(vcpu: Vcpu, record: Record) -> None:
    """Its L4 tables, vcpu_info and LDT are in use. The tables that were pinned are so again."""
    domain = vcpu.domain
    kernel, user = record.get("kernel_l4", U64), record.get("user_l4", U64)
    for taken in (kernel, user):
        if taken and paging.get_page_and_type(domain, taken, TYPE_L4):
            raise RecordError(f"{record.where}: frame {taken:#x} cannot be its L4 table")
    if kernel:
        paging.set_bases(vcpu, kernel, user)
    if (vcpu.initialised and not kernel) or (user and not kernel) or (vcpu.online and not vcpu.initialised):
        raise RecordError(f"{record.where} runs without page tables")
    if not vcpu.kernel_mode and not user:
        raise RecordError(f"{record.where} is in guest-user mode without a table for it")
    info, offset = record.get("info_mfn", U64), record.get("info_offset", Number(PAGE_SIZE - VCPU_INFO_SIZE + 1))
    if info:
        if offset & 7 or paging.get_page_and_type(domain, info, TYPE_WRITABLE):
            raise RecordError(f"{record.where}: frame {info:#x} cannot have its vcpu_info")
        vcpu.info_mfn, vcpu.info = info, info * PAGE_SIZE + offset
    vcpu.state.l4_mfn, vcpu.state.user = (kernel, False) if vcpu.kernel_mode else (user, True)
    if vcpu.ldt_entries:
        domain.ldt_in_use = True
        if kernel:
            descriptors.load_ldt(vcpu)
    vcpu.time_outdated = True
    vcpu.flush_requested = True


def load_cpu(vcpu: Vcpu, record: Record) -> None:
    """Its registers, which have to fit its descriptors and the engine."""
    state = vcpu.state
    unpack(state, record)
    regs = state.regs
    regs[: RIP + 1] = memoryview(array("Q", record.get("regs", Array(U64, RIP + 1))))
    regs[RFLAGS] = record.get("rflags", U64) & ENTRY_FLAGS | ALWAYS_SET
    regs[FS_BASE], regs[GS_BASE] = record.get("fs_base", ADDRESS), record.get("gs_base", ADDRESS)
    if not is_canonical(regs[RIP]):
        raise RecordError(f"{record.where} is at no address: {regs[RIP]:#x}")
    for index, selector in zip(_SELECTORS, record.get("selectors", Array(U16, 6)), strict=True):
        regs[index] = selector
    if vcpu.initialised:
        _check_code_stack(vcpu, record)
    _load_extended(vcpu, record)


def _check_code_stack(vcpu: Vcpu, record: Record) -> None:
    def read(selector: int) -> bytes | None:
        descriptor = descriptors.lookup(vcpu, selector) if selector < 1 << 16 else 0
        return descriptor.to_bytes(8, "little") if descriptor else None

    regs = vcpu.state.regs
    try:
        segments.code_segment(regs[CS], read)
        if regs[SS]:
            segments.stack_segment(regs[SS], read)
    except ValueError as error:
        raise RecordError(f"{record.where}: {error}") from error


def _load_extended(vcpu: Vcpu, record: Record) -> None:
    """x87, SSE and the rest, which the processor would refuse to load if they were not as they have to be."""
    engine, state = vcpu.domain.engine, vcpu.state
    assert engine is not None
    xcr0 = record.get("xcr0", U64)
    if xcr0 & ~engine.xcr0_mask:
        raise RecordError(f"{record.where}: the engine {engine.name} has not all components of XCR0 {xcr0:#x}")
    if not is_legal_xcr0(xcr0):
        raise RecordError(f"{record.where}: XCR0 cannot be {xcr0:#x}")
    image = record.get("xsave", Octets(XSAVE_EXTENDED, MOST_XSAVE))
    components = int.from_bytes(image[XSAVE_HEADER : XSAVE_HEADER + 8], "little")
    mxcsr = int.from_bytes(image[XSAVE_MXCSR : XSAVE_MXCSR + 4], "little")
    if components & ~(xcr0 | XSTATE_X87 | XSTATE_SSE) or any(image[XSAVE_HEADER + 8 : XSAVE_EXTENDED]) or mxcsr >> 16:
        raise RecordError(f"{record.where}: its XSAVE image is none")
    state.xcr0, state.xsave = xcr0, bytearray(image)


def load_timers(vcpu: Vcpu, record: Record) -> None:
    """Arm its timers; one that polled event channels does so again."""
    times, timers = record.record("timers"), vcpu.timers
    unpack(timers, times)
    if timers.period and timers.period < 1_000_000:
        raise RecordError(f"{record.where} has a timer that ticks all the time")
    for name in ("singleshot", "poll"):
        deadline = times.get(name, U64)
        if deadline:
            timers.arm(getattr(timers, name), deadline)
    polls = record.get("polls", Optional(Listing(Number(vcpu.domain.events.max_port + 1), 1)))
    if polls is not None:
        if not vcpu.blocked or polls == [0]:
            raise RecordError(f"{record.where} polls without waiting")
        vcpu.poll_port = polls[0] if polls else -1
        vcpu.domain.events.pollers.append(vcpu)
