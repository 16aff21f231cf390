/* Direct paging from the guest's side: find an entry, ask Xen to change it. */
#include "paging.h"

#define POOL_PAGES 96

static u8 pool[POOL_PAGES][PAGE_SIZE] PAGE_ALIGNED;
static u64 allocated;

void *page_alloc(void)
{
    if (allocated == POOL_PAGES) {
        print("the page pool is empty\n");
        shut_down(SHUTDOWN_crash);
    }
    return pool[allocated++];
}

u64 *table_va(u64 mfn)
{
    /* The builder's tables are the usual answer, and they lie together. */
    u64 first = va_to_pfn((void *)start_info->pt_base);
    for (u64 pfn = first; pfn < first + start_info->nr_pt_frames; pfn++)
        if (pfn_to_mfn(pfn) == mfn)
            return pfn_to_va(pfn);
    return pfn_to_va(mfn_to_pfn(mfn));
}

u64 *pte_of(const void *va, int level)
{
    u64 *table = (u64 *)start_info->pt_base;
    for (int at = 4;; at--) {
        u64 *entry = &table[(u64)va >> (3 + 9 * at) & 511];
        if (at == level)
            return entry;
        table = table_va(PTE_MFN(*entry));
    }
}

long mmu_update(u64 ptr, u64 val)
{
    struct mmu_update update = {ptr, val};
    return HYPERCALL(HC_mmu_update, &update, 1, 0, DOMID_SELF);
}

long mmuext(u32 cmd, u64 arg1, u64 arg2)
{
    struct mmuext_op op = {cmd, arg1, arg2};
    return HYPERCALL(HC_mmuext_op, &op, 1, 0, DOMID_SELF);
}

long update_va(const void *va, u64 pte, u64 flags)
{
    return HYPERCALL(HC_update_va_mapping, va, pte, flags);
}

long set_read_only(const void *va)
{
    return update_va(va, va_to_mfn(va) << PAGE_SHIFT | PTE_KERNEL_RO, UVMF_INVLPG);
}

long set_writable(const void *va)
{
    return update_va(va, va_to_mfn(va) << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG);
}

struct region region_build(u64 slot)
{
    struct region r = {(u64)((s64)(slot << 55) >> 16) & ~0xffful, (u64 *)start_info->pt_base, page_alloc(), page_alloc(), page_alloc(),
                       page_alloc()};
    r.t3[0] = entry(r.t2, PTE_TABLE);
    r.t2[0] = entry(r.t1, PTE_TABLE);
    r.t1[0] = entry(r.page, PTE_KERNEL);
    r.page[0] = 0x5a;
    long status = set_read_only(r.t3) | set_read_only(r.t2) | set_read_only(r.t1);
    status |= mmu_update(machine_address(&r.l4[slot]), entry(r.t3, PTE_TABLE));
    check_eq("tables of our own are linked", status, 0);
    return r;
}

long region_take_down(struct region *r)
{
    long status = mmu_update(machine_address(&r->l4[r->base >> 39 & 511]), 0);
    if (!status)
        status = set_writable(r->t3);
    if (!status)
        status = set_writable(r->t2);
    return status ? status : set_writable(r->t1);
}

u64 foreign_mfn(void)
{
    u64 mfn = va_to_mfn((void *)start_info->pt_base);
    while (mfn_to_pfn(mfn) != ~0ul)
        mfn--;
    return mfn;
}

struct m2p machphys_mapping(void)
{
    struct m2p m2p = {0, 0, 0};
    check_eq("XENMEM_machphys_mapping", HYPERCALL(HC_memory_op, 12, &m2p), 0);
    return m2p;
}
