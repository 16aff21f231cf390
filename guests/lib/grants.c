#include "grants.h"

#include "paging.h"

#define GNTTABOP_setup_table 2

volatile struct grant *grant_table;

bool grants_open(void)
{
    static u8 window[PAGE_SIZE] PAGE_ALIGNED;
    static u64 frame;
    struct {
        u16 dom;
        u32 nr;
        s16 status;
        u64 *list;
    } setup = {DOMID_SELF, 1, 99, &frame};
    if (HYPERCALL(HC_grant_table_op, GNTTABOP_setup_table, &setup, 1) || setup.status)
        return false;
    grant_table = (void *)window;
    return update_va(window, frame << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG) == 0;
}

void grant_to(u32 ref, u16 domid, u64 mfn, u16 flags)
{
    grant_table[ref].domid = domid;
    grant_table[ref].frame = (u32)mfn;
    barrier();
    grant_table[ref].flags = (u16)(flags | GTF_permit_access);
}

void grant_end(u32 ref)
{
    grant_table[ref].flags = 0;
}
