"""Ring 0's commonest traps in native code, where there is a compiler: see machine.native and prelude.h.

The C functions do what the Python ones of the same name do, on the same flat state (domain.VcpuFields, DomainFields,
the frame table, machine memory), and leave everything rare to them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Final

from xenolith.abi import errno, grant_table, hypercalls, layout, x86
from xenolith.hypervisor import bounce, cpuid, domain, event_fifo, frames, grants, guest_memory, paging, time
from xenolith.hypervisor.hypercalls import iret, mmu, multicall, version
from xenolith.machine import native
from xenolith.machine.clock import Clock
from xenolith.machine.engines import native_state, protocol
from xenolith.machine.tsc import TscClock

SOURCE: Final = Path(__file__).with_name("ring0.c")
HALVES: Final = tuple(  # a file uses those before it
    SOURCE.parent / name
    for name in (
        "prelude.h",
        "guest_memory.c",
        "event_fifo.c",
        "tlb.c",
        "paging.c",
        "grants.c",
        "hypercalls/mmu.c",
        "hypercalls/misc.c",
        "hypercalls/event_channel_op.c",
        "hypercalls/multicall.c",
        "bounce.c",
        "hypercalls/iret.c",
        "writable_pagetables.c",
        "emulate.c",
        "traps.c",
    )
)
_log = logging.getLogger(__name__)

_DOMAIN_POINTERS = {
    "memory_address": "u8 *{}",
    "m2p_address": "u64 *{}",
    "owner_address": "u16 *{}",
    "type_info_address": "u64 *{}",
    "count_info_address": "u64 *{}",
    "stamp_address": "u32 *{}",
    "queues_address": "u8 *{}",
    "vcpu_addresses": "struct vcpu *{}[MAX_VCPUS]",
    "undo_list": "u64 {}[MOST_UNDONE]",
    "bells": "int32_t *{}",
    "grant_frames": "u64 *{}",
    "active_grants": "struct active *{}",
    "code_frames": "u8 *{}",
}
_VCPU_POINTERS = {**native_state.MODES_IN_C, "domain_address": "struct domain *{}", "calls": "struct engine_calls *{}"}


class IretFrame(ctypes.Structure):
    """What iret finds on the guest-kernel stack."""

    _fields_: ClassVar[native.Fields] = tuple((name, ctypes.c_uint64) for name in layout.IRET_FRAME_FIELDS)


def declarations() -> str:
    """Of everything that the C uses."""
    sizes = SimpleNamespace(
        MMU_UPDATE_SIZE=layout.MMU_UPDATE.size,
        MMUEXT_OP_SIZE=layout.MMUEXT_OP.size,
        MULTICALL_SIZE=multicall.ENTRY,
        MULTICALL_RESULT=multicall.RESULT,
        MULTICALL_ARGUMENTS=multicall.ARGUMENTS,
    )

    return "".join(
        (
            native.define(
                x86,
                "RAX RCX RDX RBX RSP RSI RDI R8 R10 R11 RIP CS SS FS_BASE GS_BASE PTE_P PTE_RW PTE_US PTE_A PTE_D "
                "PTE_G PTE_NX PTE_ADDRESS ENTRIES EFLAGS_CF EFLAGS_TF EFLAGS_IF EFLAGS_IOPL EFLAGS_STATUS VECTOR_GP "
                "VECTOR_PF PFEC_PRESENT PFEC_WRITE PFEC_USER PFEC_RESERVED PFEC_INSN OPCODE_TWO_BYTES OPCODE_CPUID "
                "OPCODE_CLI OPCODE_STI LOWER_HALF_END",
            ),
            native.define(
                hypercalls,
                "DOMID_SELF HYPERVISOR_mmu_update HYPERVISOR_stack_switch HYPERVISOR_multicall HYPERVISOR_iret "
                "HYPERVISOR_update_va_mapping HYPERVISOR_set_segment_base HYPERVISOR_mmuext_op "
                "HYPERVISOR_xen_version XENVER_version HYPERVISOR_event_channel_op EVTCHNOP_send SEGBASE_FS "
                "SEGBASE_GS_USER SEGBASE_GS_KERNEL VGCF_in_syscall MMU_MACHPHYS_UPDATE MMU_PT_UPDATE_PRESERVE_AD "
                "MMU_PT_UPDATE_NO_TRANSLATE MMU_UPDATE_PREEMPTED UVMF_FLUSHTYPE_MASK UVMF_TLB_FLUSH UVMF_INVLPG "
                "UVMF_ALL MMUEXT_PIN_L1_TABLE MMUEXT_PIN_L4_TABLE MMUEXT_UNPIN_TABLE MMUEXT_NEW_BASEPTR "
                "MMUEXT_NEW_USER_BASEPTR MMUEXT_TLB_FLUSH_LOCAL MMUEXT_INVLPG_LOCAL MMUEXT_TLB_FLUSH_MULTI "
                "MMUEXT_INVLPG_MULTI NR_VIRQS VIRQ_TIMER VMASST_TYPE_writable_pagetables",
            ),
            native.define(
                layout,
                "XEN_FIRST_SLOT XEN_LAST_SLOT HYPERVISOR_VIRT_START HYPERVISOR_VIRT_END FLAT_RING3_CS64 "
                "FLAT_RING3_SS64 VCPU_INFO_ARCH_CR2 VCPU_INFO_PENDING_SEL VCPU_INFO_UPCALL_PENDING "
                "VCPU_INFO_UPCALL_MASK SHARED_EVTCHN_PENDING SHARED_EVTCHN_MASK TRAP_INFO_MASK_EVENTS",
            ),
            native.define(
                frames,
                "TYPE_COUNT EXISTENCE_COUNT MOST_REFERENCES VALIDATED PINNED PARTIAL UNDOING PROGRESS_SHIFT "
                "PROGRESS_MASK TYPE_SHIFT TYPE_MASK TYPE_L1 TYPE_L4 TYPE_SEGDESC TYPE_WRITABLE",
            ),
            native.define(
                event_fifo,
                "P M L BUSY LINK_MASK LINK_ATTEMPTS QUEUE_BYTES PRIORITY LAST_PRIORITY LAST_VCPU EARLY "
                "EVENT_WORDS_PER_PAGE CONTROL_BLOCK_HEADS",
            ),
            native.define(guest_memory, "READ WRITE"),
            native.define(paging, "DISALLOWED L1_DISALLOWED COUNTED GUEST_KERNEL"),
            native.define(mmu, "BATCH"),
            native.define(version, "MAJOR MINOR"),
            native.define(cpuid, "LAST_SIMPLE LAST_SIMPLE_EXTENDED"),
            native.define(sizes, " ".join(vars(sizes))),
            native.declare("iret_frame", IretFrame),
            native.define(protocol, "ALWAYS_SET"),
            native.define(bounce, "KERNEL_ENTRY_FLAGS SYSCALL_FLAGS SAVED_FLAGS"),
            native.define(iret, "IRET_FLAGS"),
            native.define(domain, "COUNT_SYSCALL_BOUNCE COUNT_UPCALL COUNT_PAGE_TABLE_WRITE COUNT_PRIVILEGED"),
            native.define(time, "LONGEST_TICK LOOK_LATE"),
            native.define(protocol, "TRAP_SYSCALL TRAP_CPUID"),
            native.define(native_state, "LEAVE GO_ON NOT_HANDLED LOOK UNLIMITED"),
            native.define(errno, "EFAULT"),
            native.define(domain, "MAX_VCPUS MOST_UNDONE"),
            native.define(
                grant_table,
                "GTF_permit_access GTF_type_mask GTF_readonly GTF_reading GTF_writing GRANT_ENTRIES_PER_FRAME",
            ),
            native.define(grants, "ATTEMPTS NOT_PINNED IS_PINNED HAS_CODE COPIED NOT_ALL_PINNED TO_UNPIN"),
            native.declare("active", grants.Active),
            native.declare("pins", grants.Pins),
            "struct vcpu;\n",
            native.declare("domain", domain.DomainFields, _DOMAIN_POINTERS),
            native.declare("engine_calls", native_state.EngineCalls, native_state.CALLS_IN_C),
            native.declare("vcpu", domain.VcpuFields, _VCPU_POINTERS),
        )
    )


@functools.cache
def _loaded() -> tuple[ctypes.PyDLL | None, str]:
    try:
        return native.load(SOURCE, declarations(), HALVES), ""
    except native.Missing as missing:
        _log.info("no native trap handlers: %s", missing)
        return None, str(missing)


def _library() -> ctypes.PyDLL | None:
    return _loaded()[0] if native.missing() is None else None


def missing() -> str | None:
    """Why traps are handled by Python alone; None: the commonest are handled here."""
    return native.missing() or _loaded()[1] or None


def _address(name: str) -> int:
    library = _library()
    return native.function_address(library[name]) if library else 0


def handler_address() -> int:
    """Of the native trap handler, see ModeFields.native_handler; 0: there is none."""
    return _address("handle_trap")


def pin_addresses() -> tuple[int, int]:
    """Of `u32 pin_grants(struct domain *, struct pins *)` and unpin_grants; 0: there are none.

    They answer how many of the pins have still to be looked at, and are called without the domain's lock.
    """
    return _address("pin_grants"), _address("unpin_grants")


def grant_copier() -> Callable[[int, int, int, bool], int] | None:
    """`copy_grants(struct domain *, struct pins *, local address, to the guest)`, which runs without Python's lock.

    It answers COPIED, NOT_ALL_PINNED or TO_UNPIN. None without native code.
    """
    address = _address("copy_grants")
    kind = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_bool)
    return kind(address) if address else None


def timer_address() -> int:
    """Of the native function for a singleshot timer that is due, see ModeFields.native_timer; 0: there is none."""
    return _address("handle_timer")


def clock_address(clock: Clock) -> int:
    """Of the clock's own `now`; 0 where that is not machine code."""
    return native.function_address(clock.now) if isinstance(clock, TscClock) else 0


def lock_taker() -> Callable[[int], None] | None:
    """A function that takes the lock word at this address; None without native code."""
    library = _library()
    if library is None:
        return None
    try_lock = library["try_lock"]
    try_lock.argtypes, try_lock.restype = (ctypes.c_uint64,), ctypes.c_bool
    wait = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(native.function_address(library["wait_for_lock"]))

    def take(word: int) -> None:
        if not try_lock(word):
            wait(word)  # gives up the interpreter's lock

    return take
