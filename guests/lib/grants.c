#include "grants.h"

#include "paging.h"

volatile struct grant *grant_table;

bool grants_open(void)
{
    static u8 window[PAGE_SIZE] PAGE_ALIGNED;
    static u64 frame;
    struct grant_setup setup = {DOMID_SELF, 1, 99, &frame};
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

struct grant_map grant_map(u32 ref, u64 va, u32 flags, u16 dom)
{
    struct grant_map op = {va, flags, ref, dom, 99, 0, 0};
    long error = HYPERCALL(HC_grant_table_op, GNTTABOP_map_grant_ref, &op, 1);
    if (error)
        op.status = (s16)error;
    return op;
}

s16 grant_unmap(u32 handle, u64 va, u64 dev_bus_addr)
{
    struct grant_unmap op = {va, dev_bus_addr, handle, 99};
    long error = HYPERCALL(HC_grant_table_op, GNTTABOP_unmap_grant_ref, &op, 1);
    return error ? (s16)error : op.status;
}

s16 grant_copy(struct grant_end from, struct grant_end to, u16 length, u16 flags)
{
    struct grant_copy op = {from, to, length, flags, 99};
    long error = HYPERCALL(HC_grant_table_op, GNTTABOP_copy, &op, 1);
    return error ? (s16)error : op.status;
}

u16 own_domid(void)
{
    u16 domid;
    for (domid = 1; domid < 1000; domid++) {
        struct {
            u16 dom;
            u32 nr, max;
            s16 status;
        } size = {domid, 0, 0, 99};
        HYPERCALL(HC_grant_table_op, GNTTABOP_query_size, &size, 1);
        if (size.status == GNTST_okay)
            break;
    }
    return domid;
}
