/*
 * Direct paging as it is meant to be used: building tables, pinning and linking them, changing entries
 * by every hypercall that can, switching the base pointer, and writing to a page table that is mapped
 * read-only (the paper's section 3.3.3; Xen's public xen.h, mmu_update and mmuext_op).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define REGION 0x0000100000000000ul /* L4 slot 32, empty at first */
#define SELF_SLOT 40
#define RO_TABLE (PTE_P | PTE_U | PTE_A)

static u64 *l4, *t3, *t2, *t1; /* the tables we build for REGION */
static u8 *data, *more;
static volatile u64 *m2p_table;

static void build(void)
{
    l4 = (u64 *)start_info->pt_base;
    t3 = page_alloc(), t2 = page_alloc(), t1 = page_alloc(), data = page_alloc(), more = page_alloc();
    data[0] = 0x5a, more[0] = 0xa5;
    t3[0] = entry(t2, PTE_TABLE);
    t2[0] = entry(t1, PTE_TABLE);
    t1[0] = entry(data, PTE_P | PTE_W | PTE_G); /* neither U nor A nor D */
    t1[1] = entry(more, PTE_KERNEL_RO | PTE_AVL0 | PTE_NX);

    print("# tables become page tables by being linked\n");
    check_eq("  write-protect the L3", set_read_only(t3), 0);
    check_eq("  write-protect the L2", set_read_only(t2), 0);
    check_eq("  write-protect the L1", set_read_only(t1), 0);
    check_eq("  link the L3", mmu_update(machine_address(&l4[32]), entry(t3, PTE_TABLE)), 0);
    check_eq("  the page is there", *(volatile u8 *)REGION, 0x5a);
    *(volatile u8 *)(REGION + 1) = 0x33;
    check_eq("  and is the page that we put there", data[1], 0x33);
    check_eq("  a second page", *(volatile u8 *)(REGION + 4096), 0xa5);
    TRY("movb $1, (%0)", : : "r"(REGION + 4096) : "memory");
    check_eq("  which is read-only: #PF", (long)fault.error, 3);
    check_eq("  Xen gave the L1 entry the user bit, and the processor accessed and dirty",
             (long)(t1[0] & 0xfff & ~PTE_G), PTE_P | PTE_W | PTE_U | PTE_A | PTE_D);
    check_eq("  available bits and NX stay", (long)(t1[1] & (PTE_AVL0 | PTE_NX)), (long)(PTE_AVL0 | PTE_NX));
}

static void single_updates(void)
{
    print("# mmu_update of one entry\n");
    u64 at = machine_address(&t1[2]);
    check_eq("  map", mmu_update(at | MMU_NORMAL_PT_UPDATE, entry(data, PTE_P | PTE_W)), 0);
    check_eq("  the page is there", *(volatile u8 *)(REGION + 2 * 4096), 0x5a);
    *(volatile u8 *)(REGION + 2 * 4096) = 0x5a;
    check_eq("  accessed and dirty are set by use", (long)(t1[2] & (PTE_A | PTE_D)), PTE_A | PTE_D);
    check_eq("  preserving them", mmu_update(at | MMU_PT_UPDATE_PRESERVE_AD, entry(data, PTE_P)), 0);
    check_eq("  they are preserved, the rest is as given", (long)(t1[2] & 0xfff), PTE_P | PTE_U | PTE_A | PTE_D);
    check_eq("  a normal update", mmu_update(at, entry(data, PTE_P)), 0);
    check_eq("  does not preserve them", (long)(t1[2] & 0xfff), PTE_P | PTE_U);
    check_eq("  sub-command 3, for a PV guest the same as a normal update",
             mmu_update(at | MMU_PT_UPDATE_NO_TRANSLATE, entry(more, PTE_P)), 0);
    check_eq("  it took effect", (long)PTE_MFN(t1[2]), (long)va_to_mfn(more));
    check_eq("  unmap", mmu_update(at, 0), 0);
    check_eq("  the entry is 0", (long)t1[2], 0);
    mmuext(MMUEXT_INVLPG_LOCAL, REGION + 2 * 4096, 0);
    TRY("mov (%0), %%al", : : "r"(REGION + 2 * 4096) : "rax", "memory");
    check_eq("  the page is gone", (long)fault.vector, VECTOR_PF);
    check_eq("  a not-present entry may hold anything", mmu_update(at, 0xdeadbeefdeadbee0), 0);
    check_eq("  and keeps it", (long)t1[2], (long)0xdeadbeefdeadbee0);
    mmu_update(at, 0);
    check_eq("  an ordinary page is written as data", mmu_update(machine_address(data + 64), 0x123456789), 0);
    check_eq("  word for word", *(long *)(data + 64), 0x123456789);
}

static void batches(void)
{
    struct mmu_update updates[8];
    u32 done = 77;
    print("# mmu_update of several entries\n");
    for (int i = 0; i < 8; i++)
        updates[i] = (struct mmu_update){machine_address(&t1[16 + i]), entry(i & 1 ? more : data, PTE_KERNEL_RO)};
    check_eq("  eight", HYPERCALL(HC_mmu_update, updates, 8, &done, DOMID_SELF), 0);
    check_eq("  all done", done, 8);
    check_eq("  the last one is there", *(volatile u8 *)(REGION + 23 * 4096), 0xa5);
    check_eq("  none", HYPERCALL(HC_mmu_update, updates, 0, &done, DOMID_SELF), 0);
    check_eq("  none done", done, 0);
    updates[5].val = 0x000ffffffffff000 | PTE_P;
    check_eq("  the sixth is wrong", HYPERCALL(HC_mmu_update, updates, 8, &done, DOMID_SELF), -EINVAL);
    check_eq("  five done", done, 5);
    check_eq("  without a done pointer", HYPERCALL(HC_mmu_update, updates, 3, 0, DOMID_SELF), 0);
    done = 10;
    check_eq("  the count's preemption flag adds to what was done",
             HYPERCALL(HC_mmu_update, updates, 3 | MMU_UPDATE_PREEMPTED, &done, DOMID_SELF), 0);
    check_eq("  thirteen", done, 13);
    for (int i = 0; i < 8; i++)
        updates[i].val = 0;
    check_eq("  clear them", HYPERCALL(HC_mmu_update, updates, 8, 0, DOMID_SELF), 0);
    mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
}

static void machine_to_physical(void)
{
    print("# the machine-to-physical table\n");
    struct m2p m2p = machphys_mapping();
    volatile u64 *table = m2p_table = (u64 *)m2p.v_start;
    u64 mfn = va_to_mfn(data);
    check_eq("  our mfn is within its bounds", mfn <= m2p.max_mfn && m2p.v_start + 8 * mfn < m2p.v_end, 1);
    check_eq("  it knows our frame", (long)table[mfn], (long)va_to_pfn(data));
    check_eq("  machphys update", mmu_update(mfn << PAGE_SHIFT | MMU_MACHPHYS_UPDATE, 0x1234), 0);
    check_eq("  it took effect", (long)table[mfn], 0x1234);
    check_eq("  and back", mmu_update(mfn << PAGE_SHIFT | MMU_MACHPHYS_UPDATE, va_to_pfn(data)), 0);
    check_eq("  it took effect", (long)table[mfn], (long)va_to_pfn(data));
}

static void by_virtual_address(void)
{
    static u64 first_vcpu = 1;
    void *va = (void *)(REGION + 5 * 4096);
    const u64 flushes[] = {
        UVMF_NONE, UVMF_TLB_FLUSH | UVMF_LOCAL, UVMF_TLB_FLUSH | UVMF_ALL, UVMF_TLB_FLUSH | UVMF_MULTI | (u64)&first_vcpu,
        UVMF_INVLPG | UVMF_LOCAL, UVMF_INVLPG | UVMF_ALL, UVMF_INVLPG | UVMF_MULTI | (u64)&first_vcpu,
    };
    print("# update_va_mapping, with every kind of flush\n");
    for (u64 i = 0; i < LENGTH(flushes); i++) {
        u8 *page = i & 1 ? data : more;
        check_eq("  map", update_va(va, entry(page, PTE_KERNEL), flushes[i]), 0);
        if (flushes[i]) /* without a flush the old translation may live on */
            check_eq("  the new page is there", *(volatile u8 *)va, page[0]);
    }
    check_eq("  unmap", update_va(va, 0, UVMF_INVLPG), 0);
    TRY("mov (%0), %%al", : : "r"(va) : "rax", "memory");
    check_eq("  the page is gone", (long)fault.vector, VECTOR_PF);
    check_eq("  flush type 3 flushes nothing", update_va(va, entry(data, PTE_KERNEL), 3), 0);
    check_eq("  a vCPU bitmap that cannot be read", update_va(va, entry(data, PTE_KERNEL), UVMF_TLB_FLUSH | 0x700000000000), -EFAULT);
    check_eq("  an address without an L1", update_va((void *)0x200000000000, entry(data, PTE_KERNEL), 0), -EINVAL);
    check_eq("  an address of Xen's", update_va((void *)0xffff900000000000, entry(data, PTE_KERNEL), 0), -EINVAL);
    check_eq("  a non-canonical address", update_va((void *)0x8000000000000000, entry(data, PTE_KERNEL), 0), -EINVAL);
    update_va(va, 0, UVMF_INVLPG);
}

static void direct_writes(void)
{
    u8 carry;
    u64 old;
    print("# stores to an L1 that is mapped read-only\n");
    TRY("movq $0, (%0)", : : "r"(&t1[7]) : "memory");
    check_eq("  without the assist: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  vm_assist: enable writable_pagetables", HYPERCALL(HC_vm_assist, 0, 2), 0);

    volatile u64 *e = &t1[7];
    TRY("mov %1, (%0)", : : "r"(e), "r"(entry(data, PTE_KERNEL)) : "memory");
    check_eq("  mov: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  the entry has the user bit", (long)(*e & 0xfff), PTE_KERNEL | PTE_U);
    check_eq("  the page is there", *(volatile u8 *)(REGION + 7 * 4096), 0x5a);
    TRY("lock btrq $1, (%2)\n setc %0", : "=q"(carry), "=m"(*e) : "r"(e) : "memory", "cc");
    check_eq("  lock btr of the write bit: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  carry is the old bit", carry, 1);
    check_eq("  the bit is clear", (long)(*e & PTE_W), 0);
    TRY("lock btrq $1, (%2)\n setc %0", : "=q"(carry), "=m"(*e) : "r"(e) : "memory", "cc");
    check_eq("  again: carry is clear", carry, 0);
    mmuext(MMUEXT_INVLPG_LOCAL, REGION + 7 * 4096, 0);
    TRY("movb $1, (%0)", : : "r"(REGION + 7 * 4096) : "memory");
    check_eq("  the page is read-only now", (long)fault.vector, VECTOR_PF);
    u64 before = *e;
    old = entry(more, PTE_KERNEL_RO);
    TRY("xchg %0, (%1)", : "+r"(old) : "r"(e) : "memory");
    check_eq("  xchg: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  it gives the old entry", (long)old, (long)before);
    mmuext(MMUEXT_INVLPG_LOCAL, REGION + 7 * 4096, 0);
    check_eq("  and the new page is there", *(volatile u8 *)(REGION + 7 * 4096), 0xa5);
    u64 expected = *e, desired = entry(data, PTE_KERNEL_RO | PTE_U);
    TRY("lock cmpxchg %2, (%1)", : "+a"(expected) : "r"(e), "r"(desired) : "memory", "cc");
    check_eq("  lock cmpxchg: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  it took effect", (long)(*e & ~PTE_G), (long)desired);
    expected = 0x1234;
    TRY("lock cmpxchg %2, (%1)\n setz %%cl", : "+a"(expected) : "r"(e), "r"(0ul) : "rcx", "memory", "cc");
    check_eq("  lock cmpxchg of another value: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  it gives the entry", (long)(expected & ~PTE_G), (long)desired);
    TRY("lock orq $0x200, (%0)", : : "r"(e) : "memory", "cc");
    check_eq("  lock or: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  it took effect", (long)(*e & ~PTE_G), (long)(desired | PTE_AVL0));
    TRY("movl $0, (%0)", : : "r"(e) : "memory");
    check_eq("  a store of the lower half: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  it took effect", (long)*e, (long)(desired & ~0xfffffffful));
    TRY("movq $0, (%0)", : : "r"(e) : "memory");
    check_eq("  a store of zero: no fault", (long)fault.vector, NO_FAULT);
    check_eq("  it took effect", (long)*e, 0);

    TRY("mov %1, (%0)", : : "r"(e), "r"(0x000ffffffffff000 | PTE_P) : "memory");
    check_eq("  an entry that Xen refuses: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  cr2", (long)fault.cr2, (long)e);
    check_eq("  error code", (long)fault.error, 3);
    check_eq("  nothing was stored", (long)*e, 0);
    TRY("mov %1, (%0)", : : "r"(e), "r"(entry(t2, PTE_KERNEL)) : "memory");
    check_eq("  a writable mapping of a page table: #PF", (long)fault.vector, VECTOR_PF);
    TRY("movq $0, (%0)", : : "r"(&t2[5]) : "memory");
    check_eq("  a store to an L2: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  vm_assist: disable writable_pagetables", HYPERCALL(HC_vm_assist, 1, 2), 0);
    TRY("movq $0, (%0)", : : "r"(e) : "memory");
    check_eq("  #PF again", (long)fault.vector, VECTOR_PF);
}

static void self_map(void)
{
    u64 all = (u64)SELF_SLOT << 39 | (u64)SELF_SLOT << 30 | (u64)SELF_SLOT << 21 | (u64)SELF_SLOT << 12;
    print("# a linear map: the L4 as its own L3, read-only\n");
    check_eq("  link", mmu_update(machine_address(&l4[SELF_SLOT]), entry(l4, RO_TABLE)), 0);
    volatile u64 *seen = (u64 *)all;
    check_eq("  the L4 is seen in itself", (long)PTE_MFN(seen[SELF_SLOT]), (long)va_to_mfn(l4));
    u64 *linear = (u64 *)(((u64)SELF_SLOT << 39) + (REGION >> 9));
    check_eq("  and the L1 entry of any address", (long)linear[0], (long)t1[0]);
    TRY("movq $0, (%0)", : : "r"(&linear[0]) : "memory");
    check_eq("  read-only: #PF", (long)fault.error, 3);
    check_eq("  a second one", mmu_update(machine_address(&l4[SELF_SLOT + 1]), entry(l4, RO_TABLE)), 0);
    check_eq("  unlink", mmu_update(machine_address(&l4[SELF_SLOT + 1]), 0), 0);
    check_eq("  unlink", mmu_update(machine_address(&l4[SELF_SLOT]), 0), 0);
}

static void base_pointer(void)
{
    u64 cr3, *other = page_alloc();
    print("# another L4\n");
    for (int i = 0; i < 512; i++)
        if (i < 256 || i > 271)
            other[i] = l4[i];
    other[32] = 0;
    other[33] = l4[32];
    check_eq("  write-protect it", set_read_only(other), 0);
    check_eq("  pin it", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(other), 0), 0);
    check_eq("  switch to it", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(other), 0), 0);
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    check_eq("  cr3 shows it", (long)(cr3 >> PAGE_SHIFT), (long)va_to_mfn(other));
    check_eq("  the machine-to-physical table is there, though we did not link it", (long)m2p_table[va_to_mfn(data)],
             (long)va_to_pfn(data));
    TRY("mov (%0), %%al", : : "r"(REGION) : "rax", "memory");
    check_eq("  the old region is gone", (long)fault.vector, VECTOR_PF);
    check_eq("  the new one is there", *(volatile u8 *)(REGION + (1ul << 39)), 0x5a);
    TRY("mov %0, %%cr3", : : "r"(va_to_mfn(l4) << PAGE_SHIFT) : "memory");
    check_eq("  mov to cr3 switches too", (long)fault.vector, NO_FAULT);
    check_eq("  the old region is back", *(volatile u8 *)REGION, 0x5a);
    check_eq("  unpin", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(other), 0), 0);
    check_eq("  it may be written to again", set_writable(other), 0);
    memset(other, 0, 511 * 8);
    set_read_only(other);
    check_eq("  the base pointer to a table that is not pinned", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(other), 0), 0);
    check_eq("  and back", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(l4), 0), 0);
    check_eq("  it is no page table any more", set_writable(other), 0);
}

static void pins(void)
{
    static const char *const names[] = {"  L1", "  L2", "  L3", "  L4"};
    u64 *tables[4] = {page_alloc(), page_alloc(), page_alloc(), page_alloc()};
    print("# pin and unpin\n");
    tables[0][0] = entry(data, PTE_KERNEL);
    for (int i = 1; i < 4; i++)
        tables[i][0] = entry(tables[i - 1], PTE_TABLE);
    for (int i = 0; i < 4; i++) {
        set_read_only(tables[i]);
        check_eq(names[i], mmuext(MMUEXT_PIN_L1_TABLE + (u32)i, va_to_mfn(tables[i]), 0), 0);
    }
    for (int i = 3; i >= 0; i--)
        check_eq(names[i], mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(tables[i]), 0), 0);
    for (int i = 0; i < 4; i++)
        check_eq("  writable again", set_writable(tables[i]), 0);
    for (int i = 0; i < 4; i++)
        set_read_only(tables[i]);
    check_eq("  pin of an L4 validates all below it", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(tables[3]), 0), 0);
    check_eq("  even the L1 is a page table now", set_writable(tables[0]), -EBUSY);
    check_eq("  unpin", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(tables[3]), 0), 0);
    check_eq("  and no more", set_writable(tables[0]), 0);
}

static void other_operations(void)
{
    static u64 first_vcpu = 1;
    u8 *from = page_alloc(), *to = page_alloc();
    u32 done = 99;
    print("# mmuext_op\n");
    check_eq("  TLB_FLUSH_LOCAL", mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0, 0), 0);
    check_eq("  INVLPG_LOCAL", mmuext(MMUEXT_INVLPG_LOCAL, REGION, 0), 0);
    check_eq("  INVLPG_LOCAL of a non-canonical address", mmuext(MMUEXT_INVLPG_LOCAL, 1ul << 63, 0), 0);
    check_eq("  TLB_FLUSH_MULTI", mmuext(MMUEXT_TLB_FLUSH_MULTI, 0, (u64)&first_vcpu), 0);
    check_eq("  TLB_FLUSH_MULTI, a bad pointer", mmuext(MMUEXT_TLB_FLUSH_MULTI, 0, 0x700000000000), -EINVAL);
    check_eq("  INVLPG_MULTI", mmuext(MMUEXT_INVLPG_MULTI, REGION, (u64)&first_vcpu), 0);
    check_eq("  INVLPG_MULTI, a bad pointer", mmuext(MMUEXT_INVLPG_MULTI, REGION, 0x700000000000), -EINVAL);
    check_eq("  TLB_FLUSH_ALL", mmuext(MMUEXT_TLB_FLUSH_ALL, 0, 0), 0);
    check_eq("  INVLPG_ALL", mmuext(MMUEXT_INVLPG_ALL, REGION, 0), 0);
    check_eq("  FLUSH_CACHE without devices", mmuext(MMUEXT_FLUSH_CACHE, 0, 0), -EACCES);
    check_eq("  FLUSH_CACHE_GLOBAL without devices", mmuext(MMUEXT_FLUSH_CACHE_GLOBAL, 0, 0), -EINVAL);
    check_eq("  MARK_SUPER", mmuext(MMUEXT_MARK_SUPER, va_to_mfn(data), 0), -EOPNOTSUPP);
    check_eq("  UNMARK_SUPER", mmuext(MMUEXT_UNMARK_SUPER, va_to_mfn(data), 0), -EOPNOTSUPP);
    check_eq("  14, which was never defined", mmuext(14, 0, 0), -ENOSYS);
    check_eq("  an unknown operation", mmuext(77, 0, 0), -ENOSYS);
    memset(from, 0x77, PAGE_SIZE);
    check_eq("  COPY_PAGE", mmuext(MMUEXT_COPY_PAGE, va_to_mfn(to), va_to_mfn(from)), 0);
    check_eq("  it copied", memcmp(from, to, PAGE_SIZE), 0);
    check_eq("  CLEAR_PAGE", mmuext(MMUEXT_CLEAR_PAGE, va_to_mfn(to), 0), 0);
    check_eq("  it cleared", to[0] | to[4095], 0);
    check_eq("  CLEAR_PAGE of a page table", mmuext(MMUEXT_CLEAR_PAGE, va_to_mfn(t1), 0), -EINVAL);
    check_eq("  COPY_PAGE to a page table", mmuext(MMUEXT_COPY_PAGE, va_to_mfn(t1), va_to_mfn(from)), -EINVAL);
    check_eq("  COPY_PAGE from a page table", mmuext(MMUEXT_COPY_PAGE, va_to_mfn(to), va_to_mfn(t1)), 0);
    check_eq("  NEW_USER_BASEPTR 0", mmuext(MMUEXT_NEW_USER_BASEPTR, 0, 0), 0);

    struct mmuext_op ops[3] = {{MMUEXT_CLEAR_PAGE, va_to_mfn(to), 0}, {77, 0, 0}, {MMUEXT_TLB_FLUSH_ALL, 0, 0}};
    check_eq("  three, the second wrong", HYPERCALL(HC_mmuext_op, ops, 3, &done, DOMID_SELF), -ENOSYS);
    check_eq("  one done", done, 1);
    ops[1].cmd = MMUEXT_TLB_FLUSH_LOCAL;
    check_eq("  three", HYPERCALL(HC_mmuext_op, ops, 3, &done, DOMID_SELF), 0);
    check_eq("  three done", done, 3);
    check_eq("  none", HYPERCALL(HC_mmuext_op, ops, 0, &done, DOMID_SELF), 0);
    check_eq("  none done", done, 0);
}

static void take_down(void)
{
    print("# unlinking ends it\n");
    check_eq("  the L1 is in use", set_writable(t1), -EBUSY);
    check_eq("  unlink", mmu_update(machine_address(&l4[32]), 0), 0);
    check_eq("  the L3 is free", set_writable(t3), 0);
    check_eq("  the L2 is free", set_writable(t2), 0);
    check_eq("  the L1 is free", set_writable(t1), 0);
    t1[0] = 0;
}

int main(void)
{
    traps_install();
    build();
    single_updates();
    batches();
    machine_to_physical();
    by_virtual_address();
    direct_writes();
    self_map();
    base_pointer();
    pins();
    other_operations();
    take_down();
    return 0;
}
