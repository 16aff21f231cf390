"""The paging hypercalls: mmu_update, mmuext_op, update_va_mapping (public/xen.h; Xen: arch/x86/mm.c).

Each takes a batch, stops at the first failure, and says through the done pointer how many operations
succeeded.  A long batch is not allowed to keep its domain out of reach: after `BATCH` operations, or when the trap's
work is used up (see paging), the hypercall is restarted by the guest itself with its arguments advanced
(Xen: hypercall_create_continuation).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xenolith.abi import layout
from xenolith.abi.errno import EACCES, EFAULT, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, ERESTART, ESRCH
from xenolith.abi.hypercalls import (
    DOMID_IO,
    DOMID_SELF,
    DOMID_XEN,
    MMU_MACHPHYS_UPDATE,
    MMU_NORMAL_PT_UPDATE,
    MMU_PT_UPDATE_NO_TRANSLATE,
    MMU_PT_UPDATE_PRESERVE_AD,
    MMU_UPDATE_PREEMPTED,
    MMUEXT_CLEAR_PAGE,
    MMUEXT_COPY_PAGE,
    MMUEXT_FLUSH_CACHE,
    MMUEXT_FLUSH_CACHE_GLOBAL,
    MMUEXT_INVLPG_ALL,
    MMUEXT_INVLPG_LOCAL,
    MMUEXT_INVLPG_MULTI,
    MMUEXT_MARK_SUPER,
    MMUEXT_NEW_BASEPTR,
    MMUEXT_NEW_USER_BASEPTR,
    MMUEXT_PIN_L1_TABLE,
    MMUEXT_PIN_L4_TABLE,
    MMUEXT_SET_LDT,
    MMUEXT_TLB_FLUSH_ALL,
    MMUEXT_TLB_FLUSH_LOCAL,
    MMUEXT_TLB_FLUSH_MULTI,
    MMUEXT_UNMARK_SUPER,
    MMUEXT_UNPIN_TABLE,
    UVMF_ALL,
    UVMF_FLUSHTYPE_MASK,
    UVMF_INVLPG,
    UVMF_TLB_FLUSH,
    HYPERVISOR_mmu_update,
    HYPERVISOR_mmuext_op,
)
from xenolith.abi.x86 import PAGE_SIZE, PTE_ADDRESS, PTE_P
from xenolith.hypervisor import descriptors, paging, tlb
from xenolith.hypervisor.frames import TYPE_COUNT, TYPE_L1, TYPE_MASK, TYPE_SHIFT, TYPE_WRITABLE
from xenolith.hypervisor.guest_memory import READ, copy_from_guest, copy_to_guest, translate

if TYPE_CHECKING:
    from xenolith.hypervisor.domain import Domain, Vcpu

BATCH: Final = 512  # operations before a batch is restarted
REQUEST_WORK: Final = 2  # see paging
_done = layout.U32.pack
_unpack_mmuext = layout.MMUEXT_OP.unpack


def frame_owner(vcpu: Vcpu, foreign: int) -> Domain | int:
    """The domain whose frames a paging hypercall may name, or an errno (Xen: get_pg_owner and the XSM default)."""
    domain = vcpu.domain
    if foreign in (DOMID_SELF, DOMID_IO):
        return domain  # DOMID_IO adds device memory to what may be named, and there is none
    if foreign == DOMID_XEN:
        return -EPERM
    if foreign == domain.domid or domain.hypervisor.domain(foreign) is None:
        return -ESRCH
    return -EPERM


def _done_before(vcpu: Vcpu, count: int, done_va: int) -> int | None:
    """How many requests a batch that goes on has done, as it noted for the guest; None where that cannot be read."""
    if vcpu.batch_begun:  # by native code
        vcpu.batch_begun = False
        return vcpu.batch_done
    if not count & MMU_UPDATE_PREEMPTED or not done_va:
        return 0
    data = copy_from_guest(vcpu, done_va, 4)
    return None if data is None else int.from_bytes(data, "little")


def do_mmu_update(vcpu: Vcpu, requests: int, count: int, done_va: int, foreign: int) -> int:
    """Update page-table entries or machine-to-physical entries by machine address."""
    domain = vcpu.domain
    count &= 0xFFFFFFFF
    alone = count == 1 and foreign == DOMID_SELF and not done_va and not domain.undo_count
    if alone and not requests & 7 and requests & 0xFFF <= 0xFF0:
        # set_pte outside of a batch, the commonest hypercall of all: one walk, one update
        address = translate(vcpu, requests, READ)
        if address < 0:
            return -EFAULT
        q = domain.memory.q
        result = _update(domain, q[address >> 3], q[(address >> 3) + 1])
        return _continue(vcpu, HYPERVISOR_mmu_update, requests, 1, 0, foreign) if result == -ERESTART else result
    done = _done_before(vcpu, count, done_va)
    if done is None:
        return -EFAULT
    count &= ~MMU_UPDATE_PREEMPTED
    if foreign & 0xFFFFFFFF != DOMID_SELF:
        if foreign >> 16 & 0xFFFF:
            owner = frame_owner(vcpu, (foreign >> 16 & 0xFFFF) - 1)
            if isinstance(owner, int):
                return owner
        owner = frame_owner(vcpu, foreign & 0xFFFF)
        if isinstance(owner, int):
            return owner
    q = domain.memory.q
    result = processed = 0
    while processed < min(count, BATCH) and paging.undo(domain) and domain.work_left > 0:
        domain.work_left -= REQUEST_WORK
        va = requests + 16 * processed
        if va & 7 or va & 0xFFF > 0xFF0:
            data = copy_from_guest(vcpu, va, 16)
            if data is None:
                result = -EFAULT
                break
            pointer, value = layout.MMU_UPDATE.unpack(data)
        else:
            address = translate(vcpu, va, READ)
            if address < 0:
                result = -EFAULT
                break
            address >>= 3
            pointer = q[address]
            value = q[address + 1]
        result = _update(domain, pointer, value)
        if result:
            break
        processed += 1
    if result == -ERESTART:
        result = 0  # begun, and to be made again
    if done_va:
        copy_to_guest(vcpu, done_va, _done(done + processed & 0xFFFFFFFF))
    if not result and processed < count:
        return _continue(vcpu, HYPERVISOR_mmu_update, requests + 16 * processed, count - processed, done_va, foreign)
    return result


def _continue(vcpu: Vcpu, number: int, batch: int, count: int, done_va: int, foreign: int) -> int:
    """Have the guest go on with the rest of a batch."""
    return vcpu.restart_hypercall(number, batch, count | MMU_UPDATE_PREEMPTED, done_va, foreign)


def _update(domain: Domain, pointer: int, value: int) -> int:
    command = pointer & 7
    frames = domain.frames
    mfn = pointer >> 12
    if command > MMU_PT_UPDATE_NO_TRANSLATE:
        return -ENOSYS
    if not 0 < mfn < frames.frames or frames.owner[mfn] != domain.domid:
        return -EINVAL
    if command == MMU_NORMAL_PT_UPDATE or command != MMU_MACHPHYS_UPDATE:
        info = frames.type_info[mfn]
        if info & TYPE_MASK == TYPE_L1 and info & TYPE_COUNT and not command:
            return paging.modify_l1(domain, pointer >> 3, value)
        if not frames.get_page(mfn, domain.domid):
            return -EINVAL
        result = paging.modify_entry(domain, pointer & ~7, value, command == MMU_PT_UPDATE_PRESERVE_AD)
        paging.put_page(domain, mfn)
        return result
    domain.view.m2p[mfn] = value
    return 0


def do_update_va_mapping(vcpu: Vcpu, va: int, value: int, flags: int) -> int:
    """Change the L1 entry that maps linear address `va`, then flush as asked."""
    domain = vcpu.domain
    index = l1_entry_index(vcpu, va)
    if index < 0:
        return -EINVAL
    info = domain.frames.type_info[index >> 9]
    if info & TYPE_MASK != TYPE_L1 or not info & TYPE_COUNT or domain.frames.owner[index >> 9] != domain.domid:
        return -EINVAL
    result = paging.modify_l1(domain, index, value)
    if result or not flags:
        return result
    kind = flags & UVMF_FLUSHTYPE_MASK
    target = flags & ~UVMF_FLUSHTYPE_MASK
    if kind not in (UVMF_TLB_FLUSH, UVMF_INVLPG):
        return 0
    vcpus = [vcpu] if not target else domain.vcpus if target == UVMF_ALL else vcpus_of_mask(vcpu, target)
    if vcpus is None:
        return -EFAULT
    if kind == UVMF_TLB_FLUSH:
        tlb.flush_vcpus(vcpus)
    else:
        tlb.flush_page(vcpus, va)
    return 0


def do_update_va_mapping_otherdomain(vcpu: Vcpu, va: int, value: int, flags: int, foreign: int) -> int:
    """As update_va_mapping, naming frames of another domain: for dom0."""
    owner = frame_owner(vcpu, foreign & 0xFFFF)
    if isinstance(owner, int):
        return owner
    return do_update_va_mapping(vcpu, va, value, flags)


def l1_entry_index(vcpu: Vcpu, va: int) -> int:
    """Index (64-bit words of machine memory) of the L1 entry for a linear address, -1 where there is no L1 table."""
    q = vcpu.domain.memory.q
    if not -(1 << 47) <= va - (va >> 63 << 64) < 1 << 47:
        return -1
    if layout.XEN_FIRST_SLOT <= va >> 39 & 511 <= layout.XEN_LAST_SLOT:
        return -1
    table = vcpu.kernel_l4 if vcpu.kernel_mode else vcpu.user_l4
    for shift in (39, 30, 21):
        entry = q[table << 9 | va >> shift & 511]
        if not entry & PTE_P:
            return -1
        table = (entry & PTE_ADDRESS) >> 12
    return table << 9 | va >> 12 & 511


def vcpus_of_mask(vcpu: Vcpu, va: int) -> list[Vcpu] | None:
    """The domain's vCPUs named by a bitmap in guest memory; None where it cannot be read."""
    vcpus = vcpu.domain.vcpus
    data = copy_from_guest(vcpu, va, (len(vcpus) + 7) // 8)
    if data is None:
        return None
    mask = int.from_bytes(data, "little")
    return [each for each in vcpus if mask >> each.vcpu_id & 1]


def do_mmuext_op(vcpu: Vcpu, operations: int, count: int, done_va: int, foreign: int) -> int:
    """Pin and unpin tables, load base pointers, flush TLBs, set the LDT, clear and copy frames."""
    domain = vcpu.domain
    count &= 0xFFFFFFFF
    done = _done_before(vcpu, count, done_va)
    if done is None:
        return -EFAULT
    count &= ~MMU_UPDATE_PREEMPTED
    foreign &= 0xFFFFFFFF
    if foreign != DOMID_SELF:
        owner = frame_owner(vcpu, foreign & 0xFFFF)
        if isinstance(owner, int):
            return owner
    result = processed = 0
    vcpu.base_changed = False
    while processed < min(count, BATCH) and paging.undo(domain) and domain.work_left > 0:
        domain.work_left -= REQUEST_WORK
        data = copy_from_guest(vcpu, operations + 24 * processed, 24)
        if data is None:
            result = -EFAULT
            break
        command, _, argument1, argument2 = _unpack_mmuext(data)
        operation = _OPERATIONS.get(command)
        result = -ENOSYS if operation is None else operation(vcpu, command, argument1, argument2)
        if result:
            break
        processed += 1
    if result == -ERESTART:
        result = 0  # begun, and to be made again
    if vcpu.base_changed and vcpu.cpu is not None:
        vcpu.cpu.switch_mode(vcpu.kernel_l4, False)
        vcpu.cpu.flush_tlb()
    if done_va:
        copy_to_guest(vcpu, done_va, _done(done + processed & 0xFFFFFFFF))
    if not result and processed < count:
        return _continue(vcpu, HYPERVISOR_mmuext_op, operations + 24 * processed, count - processed, done_va, foreign)
    return result


def _pin(vcpu: Vcpu, command: int, mfn: int, _: int) -> int:
    result = paging.pin(vcpu.domain, mfn, command - MMUEXT_PIN_L1_TABLE + 1 << TYPE_SHIFT)
    vcpu.new_space |= command == MMUEXT_PIN_L4_TABLE and not result
    return result


def _unpin(vcpu: Vcpu, _: int, mfn: int, __: int) -> int:
    return paging.unpin(vcpu.domain, mfn)


def _new_base(vcpu: Vcpu, _: int, mfn: int, __: int) -> int:
    return new_base(vcpu, mfn)


def new_base(vcpu: Vcpu, mfn: int) -> int:
    """Load the guest-kernel base pointer (Xen: new_guest_cr3). The caller flushes: `vcpu.base_changed` is set."""
    domain = vcpu.domain
    result = paging.get_page_and_type(domain, mfn, paging.TYPE_L4) if mfn != vcpu.kernel_l4 else 0
    if result:
        return result
    if domain.ldt_in_use:
        descriptors.unload_ldt(vcpu)
    if mfn != vcpu.kernel_l4:
        paging.choose_view(domain, mfn, True)
        old, vcpu.kernel_l4 = vcpu.kernel_l4, mfn
        paging.drop_base(domain, old)
    if domain.ldt_in_use:
        descriptors.load_ldt(vcpu)
    vcpu.base_changed = True
    return 0


def _new_user_base(vcpu: Vcpu, _: int, mfn: int, __: int) -> int:
    domain = vcpu.domain
    if mfn == vcpu.user_l4:
        vcpu.base_changed = True
        return 0
    if mfn:
        result = paging.get_page_and_type(domain, mfn, paging.TYPE_L4)
        if result:
            return result
        paging.choose_view(domain, mfn, False)
    old, vcpu.user_l4 = vcpu.user_l4, mfn
    paging.drop_base(domain, old)
    vcpu.base_changed = True
    return 0


def _flush_local(vcpu: Vcpu, _: int, __: int, ___: int) -> int:
    tlb.flush_vcpus([vcpu])
    return 0


def _flush_page_local(vcpu: Vcpu, _: int, va: int, __: int) -> int:
    tlb.flush_page([vcpu], va)
    return 0


def _flush_multi(vcpu: Vcpu, _: int, __: int, mask_va: int) -> int:
    vcpus = vcpus_of_mask(vcpu, mask_va)
    if vcpus is None:
        return -EINVAL
    tlb.flush_vcpus(vcpus)
    return 0


def _flush_page_multi(vcpu: Vcpu, _: int, va: int, mask_va: int) -> int:
    vcpus = vcpus_of_mask(vcpu, mask_va)
    if vcpus is None:
        return -EINVAL
    tlb.flush_page(vcpus, va)
    return 0


def _flush_all(vcpu: Vcpu, _: int, __: int, ___: int) -> int:
    tlb.flush_domain(vcpu.domain)
    return 0


def _flush_page_all(vcpu: Vcpu, _: int, va: int, __: int) -> int:
    tlb.flush_page(vcpu.domain.vcpus, va)
    return 0


def _flush_cache(vcpu: Vcpu, _: int, __: int, ___: int) -> int:
    return -EACCES  # a domain without device memory may not (Xen: cache_flush_permitted)


def _flush_cache_global(vcpu: Vcpu, _: int, __: int, ___: int) -> int:
    return -EINVAL  # as above; Xen tests for it in another order


def _set_ldt(vcpu: Vcpu, _: int, va: int, entries: int) -> int:
    return descriptors.set_ldt(vcpu, va, entries & 0xFFFFFFFF)


def _clear_page(vcpu: Vcpu, _: int, mfn: int, __: int) -> int:
    domain = vcpu.domain
    result = paging.get_page_and_type(domain, mfn, TYPE_WRITABLE)
    if result:
        return -EINVAL
    domain.memory.page(mfn)[:] = bytes(PAGE_SIZE)
    paging.put_page_and_type(domain, mfn)
    if domain.executable_mapped is not None:
        domain.executable_mapped(mfn)
    return 0


def _copy_page(vcpu: Vcpu, _: int, mfn: int, source: int) -> int:
    domain = vcpu.domain
    if not domain.frames.get_page(source, domain.domid):
        return -EINVAL
    result = paging.get_page_and_type(domain, mfn, TYPE_WRITABLE)
    if not result:
        domain.memory.page(mfn)[:] = domain.memory.page(source)
        paging.put_page_and_type(domain, mfn)
        if domain.executable_mapped is not None:
            domain.executable_mapped(mfn)
    paging.put_page(domain, source)
    return -EINVAL if result else 0


def _superpage(vcpu: Vcpu, _: int, __: int, ___: int) -> int:
    return -EOPNOTSUPP  # removed from Xen


_OPERATIONS: Final = {
    **dict.fromkeys(range(MMUEXT_PIN_L1_TABLE, MMUEXT_PIN_L4_TABLE + 1), _pin),
    MMUEXT_UNPIN_TABLE: _unpin,
    MMUEXT_NEW_BASEPTR: _new_base,
    MMUEXT_NEW_USER_BASEPTR: _new_user_base,
    MMUEXT_TLB_FLUSH_LOCAL: _flush_local,
    MMUEXT_INVLPG_LOCAL: _flush_page_local,
    MMUEXT_TLB_FLUSH_MULTI: _flush_multi,
    MMUEXT_INVLPG_MULTI: _flush_page_multi,
    MMUEXT_TLB_FLUSH_ALL: _flush_all,
    MMUEXT_INVLPG_ALL: _flush_page_all,
    MMUEXT_FLUSH_CACHE: _flush_cache,
    MMUEXT_FLUSH_CACHE_GLOBAL: _flush_cache_global,
    MMUEXT_SET_LDT: _set_ldt,
    MMUEXT_CLEAR_PAGE: _clear_page,
    MMUEXT_COPY_PAGE: _copy_page,
    MMUEXT_MARK_SUPER: _superpage,
    MMUEXT_UNMARK_SUPER: _superpage,
}
