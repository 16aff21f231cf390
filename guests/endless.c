/*
 * Hypercalls that would never end, one after the other, by the mode on the command line: pins (batches that pin and unpin
 * a whole tree), exchange (XENMEM_exchange of 2**32 frames whose list of what goes in is that of what came out), multicall
 * (a batch of such batches), grants (2**31 grant operations). For a test that pauses and destroys the domain meanwhile.
 */
#include "events.h"
#include "grants.h"
#include "paging.h"
#include "traps.h"

#define TREE 64 /* L1 tables */
#define XENMEM_exchange 11

static struct mmuext_op pins[512];
static struct {
    u64 number, result, arguments[6];
} calls[64];
static struct {
    struct {
        u64 *extents, count;
        u32 order, flags;
        u16 domid;
    } in, out;
    u64 exchanged;
} exchange;

/* An L4 table (not loaded) above `TREE` L1 tables that map one page over and over. */
static u64 grow_tree(void)
{
    u64 *t4 = page_alloc(), *t3 = page_alloc(), *t2 = page_alloc(), *page = page_alloc();
    long refused = 0;
    for (int i = 0; i < TREE; i++) {
        u64 *t1 = page_alloc();
        for (int j = 0; j < 512; j++)
            t1[j] = entry(page, PTE_KERNEL);
        t2[i] = entry(t1, PTE_TABLE);
        refused |= set_read_only(t1);
    }
    t3[0] = entry(t2, PTE_TABLE);
    t4[0] = entry(t3, PTE_TABLE);
    refused |= set_read_only(t2) | set_read_only(t3) | set_read_only(t4);
    check_eq("the tables of the tree are read-only", refused, 0);
    return va_to_mfn(t4);
}

/* The lowest address of a region, all of whose 64 GiB are one page: enough for the list of 2**32 frames. */
static u64 repeat_page(u64 *page)
{
    u64 *t4 = (u64 *)start_info->pt_base, *t3 = page_alloc(), *t2 = page_alloc(), *t1 = page_alloc();
    for (int i = 0; i < 512; i++) {
        t1[i] = entry(page, PTE_KERNEL);
        t2[i] = entry(t1, PTE_TABLE);
        t3[i] = i < 64 ? entry(t2, PTE_TABLE) : 0;
    }
    check_eq("the tables of the region are read-only", set_read_only(t3) | set_read_only(t2) | set_read_only(t1), 0);
    check_eq("it is linked", mmu_update(machine_address(&t4[40]), entry(t3, PTE_TABLE)), 0);
    return 40ul << 39;
}

static void begin(void)
{
    print("endless: begin\n");
    console_drain();
}

int main(void)
{
    traps_install();
    events_quiet();
    if (option("exchange") || option("grants")) {
        u64 *page = page_alloc(), *free = page_alloc(), base = repeat_page(page);
        page[0] = va_to_mfn(free);
        check_eq("a frame that nothing maps", update_va(free, 0, UVMF_INVLPG), 0);
        begin();
        if (option("grants"))
            for (;;)
                HYPERCALL(HC_grant_table_op, GNTTABOP_unmap_grant_ref, base, 0x7fffffff);
        exchange.in.extents = (u64 *)base;
        exchange.out.extents = (u64 *)(base + 8);
        exchange.in.count = exchange.out.count = 0xffffffff;
        exchange.in.domid = exchange.out.domid = DOMID_SELF;
        check_eq("an exchange of 2**32 frames ends", HYPERCALL(HC_memory_op, XENMEM_exchange, &exchange), 1);
        return 0;
    }
    u64 l4 = grow_tree();
    for (int i = 0; i < 512; i++)
        pins[i] = (struct mmuext_op){i & 1 ? MMUEXT_UNPIN_TABLE : MMUEXT_PIN_L4_TABLE, l4, 0};
    begin();
    for (;;) {
        if (option("pins"))
            HYPERCALL(HC_mmuext_op, pins, 512, 0, DOMID_SELF);
        for (int i = 0; i < 64; i++) {
            calls[i].number = HC_mmuext_op;
            calls[i].arguments[0] = (u64)pins;
            calls[i].arguments[1] = 512;
            calls[i].arguments[2] = 0;
            calls[i].arguments[3] = DOMID_SELF;
        }
        if (option("multicall"))
            HYPERCALL(HC_multicall, calls, 64);
    }
}
