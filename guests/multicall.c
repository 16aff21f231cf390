/*
 * multicall: a list of hypercalls in one (public xen.h). They run in order, each result goes into its
 * entry, and a failing one does not stop the rest.
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul

struct call {
    u64 op;
    s64 result;
    u64 args[6];
};

static struct call calls[64];

static long run(u64 count)
{
    for (u64 i = 0; i < count; i++)
        calls[i].result = 0x5555;
    return HYPERCALL(HC_multicall, calls, count);
}

static void order(struct region *r)
{
    u8 *page = page_alloc();
    void *va = (void *)(r->base + PAGE_SIZE);
    page[0] = 0x77;
    print("# in order, with results\n");
    check_eq("  none", run(0), 0);
    calls[0] = (struct call){HC_xen_version, 0, {0}};
    check_eq("  one", run(1), 0);
    check_eq("  its result", calls[0].result, HYPERCALL(HC_xen_version, 0, 0));

    calls[0] = (struct call){HC_update_va_mapping, 0, {(u64)va, entry(page, PTE_KERNEL), UVMF_INVLPG}};
    calls[1] = (struct call){HC_update_va_mapping, 0, {(u64)va, entry(r->t1, PTE_KERNEL), UVMF_INVLPG}};
    calls[2] = (struct call){HC_fpu_taskswitch, 0, {0}};
    calls[3] = (struct call){63, 0, {0}};
    calls[4] = (struct call){HC_update_va_mapping, 0, {(u64)va, entry(page, PTE_KERNEL_RO), UVMF_INVLPG}};
    check_eq("  five, of which two fail", run(5), 0);
    check_eq("  map", calls[0].result, 0);
    check_eq("  a writable mapping of a page table", calls[1].result, -EBUSY);
    check_eq("  fpu_taskswitch", calls[2].result, 0);
    check_eq("  an unknown hypercall", calls[3].result, -ENOSYS);
    check_eq("  map read-only", calls[4].result, 0);
    check_eq("  the entries are as they were", (long)calls[4].args[0], (long)va);
    check_eq("  the page is mapped", *(volatile u8 *)va, 0x77);
    TRY("movb $1, (%0)", : : "r"(va) : "memory");
    check_eq("  and by the last call read-only", (long)fault.vector, VECTOR_PF);

    static struct mmu_update updates[2];
    static u32 done[2];
    updates[0] = (struct mmu_update){machine_address(&r->t1[2]), entry(page, PTE_KERNEL)};
    updates[1] = (struct mmu_update){machine_address(&r->t1[2]), 0};
    calls[0] = (struct call){HC_mmu_update, 0, {(u64)&updates[0], 1, (u64)&done[0], DOMID_SELF}};
    calls[1] = (struct call){HC_mmu_update, 0, {(u64)&updates[1], 1, (u64)&done[1], DOMID_SELF}};
    check_eq("  two mmu_updates", run(2), 0);
    check_eq("  both done", done[0] + done[1], 2);
    check_eq("  the second is the last", (long)r->t1[2], 0);
    for (u64 i = 0; i < 64; i++)
        calls[i] = (struct call){HC_xen_version, 0, {0}};
    check_eq("  sixty-four", run(64), 0);
    check_eq("  the last one's result", calls[63].result, HYPERCALL(HC_xen_version, 0, 0));
    update_va(va, 0, UVMF_INVLPG);
}

static void nesting(void)
{
    static struct call inner[1];
    print("# what may be in it\n");
    inner[0] = (struct call){HC_xen_version, 0x5555, {0}};
    calls[0] = (struct call){HC_multicall, 0, {(u64)inner, 1}};
    calls[1] = (struct call){HC_xen_version, 0, {0}};
    check_eq("  a multicall in a multicall", run(2), 0);
    check_eq("  is refused", calls[0].result, -EINVAL);
    check_eq("  its call was not made", inner[0].result, 0x5555);
    check_eq("  the next one was", calls[1].result, HYPERCALL(HC_xen_version, 0, 0));
    calls[0] = (struct call){~0ul, 0, {0}};
    calls[1] = (struct call){1ul << 32 | HC_xen_version, 0, {0}};
    check_eq("  numbers that are too great", run(2), 0);
    check_eq("  are unknown hypercalls", calls[0].result, -ENOSYS);
    check_eq("  also in their upper half", calls[1].result, -ENOSYS);
    calls[0] = (struct call){HC_sched_op, 0, {SCHEDOP_yield, 0}};
    check_eq("  a yield", run(1), 0);
    check_eq("  is allowed", calls[0].result, 0);
    calls[0] = (struct call){HC_stack_switch, 0, {FLAT_RING3_SS, builder_stack}};
    check_eq("  a stack switch", run(1), 0);
    check_eq("  is allowed", calls[0].result, 0);
    calls[0] = (struct call){HC_set_segment_base, 0, {0, 0x123456}};
    check_eq("  a segment base", run(1), 0);
    check_eq("  is allowed", calls[0].result, 0);
}

static void bad_lists(void)
{
    u8 *page = page_alloc(), *read_only = page_alloc();
    struct call *at_end = (struct call *)(page + PAGE_SIZE) - 1;
    print("# bad lists\n");
    check_eq("  a wild one", HYPERCALL(HC_multicall, WILD, 1), -EFAULT);
    check_eq("  one in Xen's memory", HYPERCALL(HC_multicall, 0xffff830000000000, 1), -EFAULT);
    check_eq("  a non-canonical one", HYPERCALL(HC_multicall, 1ul << 63, 1), -EFAULT);
    check_eq("  the count has 32 bits: this is none", HYPERCALL(HC_multicall, calls, 1ul << 60), 0);

    *at_end = (struct call){HC_xen_version, 0x5555, {0}};
    update_va(read_only, 0, UVMF_INVLPG); /* the page behind it in the image's pool */
    check_eq("  the pages follow one another", read_only - page, PAGE_SIZE);
    check_eq("  one that runs out of its page", HYPERCALL(HC_multicall, at_end, 2), -EFAULT);
    check_eq("  what was readable was done", at_end->result, HYPERCALL(HC_xen_version, 0, 0));
    at_end->result = 0x5555;
    set_read_only(page);
    check_eq("  one that cannot be written to", HYPERCALL(HC_multicall, at_end, 1), -EFAULT);
    set_writable(page);
}

int main(void)
{
    traps_install();
    struct region region = region_build(32);
    order(&region);
    nesting();
    bad_lists();
    check_eq("the tables go", region_take_down(&region), 0);
    return 0;
}
