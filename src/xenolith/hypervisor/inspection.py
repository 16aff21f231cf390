"""What a debugger may see of a domain that stands still (Xen: XEN_DOMCTL_getvcpucontext, getmemlist and foreign maps).

A domain's memory is where the frame table says, at the pfns that the machine-to-physical table gives; its linear
addresses are what its own page tables say.  Both of the latter are the guest's to write: a pfn that cannot be, or that
two frames claim, leaves a frame out, and a walk visits each table MOST_VISITS times at most, because a few tables that
refer to each other many times can span the whole address space. (Linux shares tables between its text and the direct
map, which both matter, and one table 500 times in its p2m list, which does not.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from xenolith.abi import layout, vcpu_context, x86
from xenolith.abi.vcpu_context import UserRegisters, VcpuContext
from xenolith.abi.x86 import CS, DS, ES, FS, FS_BASE, GS, GS_BASE, PAGE_SHIFT, PTE_P, RFLAGS, RIP, SS
from xenolith.hypervisor.frames import ALLOCATED, TYPE_L4, TYPE_MASK
from xenolith.machine.memory import Frames

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

MOST_PFNS: Final = 1 << 40  # with PAGE_SHIFT they are physical addresses of 52 bits
MOST_VISITS: Final = 4
CR0: Final = x86.CR0_PE | x86.CR0_MP | x86.CR0_ET | x86.CR0_NE | x86.CR0_WP | x86.CR0_AM | x86.CR0_PG
_GENERAL: Final = (
    x86.R15, x86.R14, x86.R13, x86.R12, x86.RBP, x86.RBX, x86.R11, x86.R10, x86.R9, x86.R8, x86.RAX, x86.RCX, x86.RDX,
    x86.RSI, x86.RDI,
)  # fmt: skip


@dataclass(frozen=True)
class OwnMemory:
    """A domain's frames in ascending order of pfn: `mfns[i]` is at pfn `pfns[i]`."""

    pfns: Frames
    mfns: Frames


@dataclass(frozen=True)
class LinearRun:
    """Consecutive pages at linear address `va`, behind which are consecutive pfns."""

    va: int
    pfn: int
    pages: int


def context(vcpu: Vcpu) -> VcpuContext:
    """The state of a vCPU that was stored (scheduler.store_states), as arch_get_info_guest gives it."""
    state, regs = vcpu.state, vcpu.state.regs
    rflags = regs[RFLAGS] & ~x86.EFLAGS_IOPL | vcpu.iopl << 12
    masked = vcpu.domain.memory.b[vcpu.info + layout.VCPU_INFO_UPCALL_MASK]
    frame = (0, 0, regs[RIP], regs[CS] & 0xFFFF, 0, masked, 0, 0, rflags, regs[x86.RSP])
    selectors = (regs[index] & 0xFFFF for index in (SS, ES, DS, FS, GS))
    user_regs = UserRegisters._make((*(regs[index] for index in _GENERAL), *frame, *selectors))
    kernel_gs, user_gs = regs[GS_BASE], vcpu.other_gs_base
    if not vcpu.kernel_mode:
        kernel_gs, user_gs = user_gs, kernel_gs
    flags = (
        vcpu_context.VGCF_I387_VALID
        | vcpu_context.VGCF_in_kernel * vcpu.kernel_mode
        | vcpu_context.VGCF_failsafe_disables_events * vcpu.failsafe_masks_events
        | vcpu_context.VGCF_syscall_disables_events * vcpu.syscall_masks_events
        | vcpu_context.VGCF_online * vcpu.online
    )
    cr0 = CR0 | x86.CR0_TS * vcpu.task_switched
    return VcpuContext(
        fpu=bytes(state.xsave[:512]),
        flags=flags,
        regs=user_regs,
        traps=[
            (vector, vcpu.trap_flags[vector], vcpu.trap_selector[vector], 0, vcpu.trap_address[vector])
            for vector in range(256)
        ],
        ldt_base=vcpu.ldt_va,
        ldt_entries=vcpu.ldt_entries,
        gdt_frames=tuple([*vcpu.gdt_frames, *[0] * 16][:16]),
        gdt_entries=vcpu.gdt_entries,
        kernel_ss=vcpu.kernel_ss,
        kernel_sp=vcpu.kernel_sp,
        ctrlreg=(cr0, vcpu.user_l4 << PAGE_SHIFT, _cr2(vcpu), vcpu.kernel_l4 << PAGE_SHIFT, vcpu.cr4, 0, 0, 0),
        debugreg=tuple(vcpu.debug),
        event_callback=vcpu.event_callback,
        failsafe_callback=vcpu.failsafe_callback,
        syscall_callback=vcpu.syscall_callback,
        vm_assist=vcpu.domain.vm_assist,
        fs_base=regs[FS_BASE],
        gs_base_kernel=kernel_gs,
        gs_base_user=user_gs,
    )


def _cr2(vcpu: Vcpu) -> int:
    (address,) = layout.U64.unpack_from(vcpu.domain.memory.b, vcpu.info + layout.VCPU_INFO_ARCH_CR2)
    return int(address)


def own_memory(domain: Domain) -> OwnMemory:
    """The frames that the domain has at a pfn of its own. The caller holds the domain's lock."""
    frames = domain.frames
    mine = frames.owners == domain.domid
    mine &= (frames.count_infos & np.uint64(ALLOCATED)) != 0
    mine[[domain.shared_info_mfn, *domain.shared_frames()]] = False  # Xen's own, shared with it
    mfns = np.flatnonzero(mine).astype(np.uint64)
    pfns = domain.view.m2p_words[mfns]
    possible = pfns < np.uint64(MOST_PFNS)
    ordered, first = np.unique(pfns[possible], return_index=True)
    return OwnMemory(ordered, mfns[possible][first])


def linear_runs(domain: Domain, table: int) -> list[LinearRun]:
    """Where the page table maps the domain's own frames, by linear address. The caller holds the domain's lock."""
    frames = domain.frames
    if not table or frames.owner[table] != domain.domid or frames.type_info[table] & TYPE_MASK != TYPE_L4:
        return []
    runs: list[LinearRun] = []
    for va, mfns in _leaf_tables(domain, table):
        _append_runs(domain, runs, va, mfns)
    return runs


def _leaf_tables(domain: Domain, l4: int) -> Iterator[tuple[int, Frames]]:
    """(first linear address, the MFN in each of 512 entries or 0) of each L1 table, in ascending order."""
    visits = Counter({l4: MOST_VISITS})
    for slot4, l3 in _entries(domain, l4, visits):
        if layout.XEN_FIRST_SLOT <= slot4 <= layout.XEN_LAST_SLOT:
            continue
        base = slot4 << 39 | (0xFFFF << 48 if slot4 & 256 else 0)
        for slot3, l2 in _entries(domain, l3, visits):
            for slot2, l1 in _entries(domain, l2, visits):
                entries = domain.memory.table(l1)
                mfns = (entries & np.uint64(x86.PTE_ADDRESS)) >> np.uint64(PAGE_SHIFT)
                yield base | slot3 << 30 | slot2 << 21, np.where(entries & np.uint64(PTE_P), mfns, np.uint64(0))


def _entries(domain: Domain, table: int, visits: Counter[int]) -> Iterator[tuple[int, int]]:
    """(slot, MFN) of the tables that an upper table refers to, but for those visited too often already."""
    entries = domain.memory.table(table)
    slots = np.flatnonzero(entries & np.uint64(PTE_P))
    mfns = (entries[slots] & np.uint64(x86.PTE_ADDRESS)) >> np.uint64(PAGE_SHIFT)
    for slot, mfn in zip(slots.tolist(), mfns.tolist(), strict=True):
        if visits[mfn] < MOST_VISITS:
            visits[mfn] += 1
            yield slot, mfn


def _append_runs(domain: Domain, runs: list[LinearRun], va: int, mfns: Frames) -> None:
    """Add what one L1 table maps, joined to the last run where it goes on."""
    valid = np.where(mfns < domain.frames.frames, mfns, np.uint64(0))
    slots = np.flatnonzero((domain.frames.owners[valid] == domain.domid) & (valid != 0))
    if not len(slots):
        return
    pfns: npt.NDArray[np.int64] = domain.view.m2p_words[valid[slots]].astype(np.int64)
    breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(pfns) != 1)) + 1
    for part in np.split(np.arange(len(slots)), breaks):
        run = LinearRun(va + (int(slots[part[0]]) << PAGE_SHIFT), int(pfns[part[0]]), len(part))
        last = runs[-1] if runs else None
        if last and last.va + (last.pages << PAGE_SHIFT) == run.va and last.pfn + last.pages == run.pfn:
            runs[-1] = LinearRun(last.va, last.pfn, last.pages + run.pages)
        else:
            runs.append(run)
