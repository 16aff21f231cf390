/*
 * The domain's memory reservation: giving frames back, asking for them again, exchanging them, and what
 * the domain may learn of memory (public memory.h, memory_op).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul
#define XENMEM_increase_reservation 0
#define XENMEM_decrease_reservation 1
#define XENMEM_maximum_ram_page 2
#define XENMEM_current_reservation 3
#define XENMEM_maximum_reservation 4
#define XENMEM_machphys_mfn_list 5
#define XENMEM_populate_physmap 6
#define XENMEM_memory_map 9
#define XENMEM_machine_memory_map 10
#define XENMEM_exchange 11

struct reservation {
    u64 *extents;
    u64 nr_extents;
    u32 order, mem_flags;
    u16 domid;
};

#define PAGES 16
static u8 *pages[PAGES];
static u64 mfns[PAGES], pfns[PAGES];
static volatile u64 *m2p;

static long op(u32 command, u64 *extents, u64 count, u32 order)
{
    struct reservation r = {extents, count, order, 0, DOMID_SELF};
    return HYPERCALL(HC_memory_op, command, &r);
}

static long current_pages(void)
{
    u16 self = DOMID_SELF;
    return HYPERCALL(HC_memory_op, XENMEM_current_reservation, &self);
}

/* The page's mapping, in the initial mapping and in the p2m that we keep. */
static void map(int i, u64 mfn)
{
    check_eq("    map it", update_va(pages[i], mfn << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), 0);
}

static void less_and_more(void)
{
    long before = current_pages();
    print("# less and more\n");
    check_eq("  current_reservation is what start_info says", before, (long)start_info->nr_pages);
    for (int i = 0; i < PAGES; i++) {
        pages[i] = page_alloc();
        pages[i][0] = (u8)(i + 1);
        pfns[i] = va_to_pfn(pages[i]);
        mfns[i] = va_to_mfn(pages[i]);
        update_va(pages[i], 0, UVMF_INVLPG);
    }
    u64 first = mfns[0];
    check_eq("  decrease by 16", op(XENMEM_decrease_reservation, mfns, PAGES, 0), PAGES);
    check_eq("  current_reservation", current_pages(), before - PAGES);
    check_eq("  a frame given back may not be mapped", update_va(pages[0], first << PAGE_SHIFT | PTE_KERNEL, 0), -EBUSY);
    check_eq("  nor given back again", op(XENMEM_decrease_reservation, &first, 1, 0), 0);

    for (int i = 0; i < PAGES; i++)
        mfns[i] = pfns[i];
    check_eq("  populate_physmap with 8", op(XENMEM_populate_physmap, mfns, 8, 0), 8);
    check_eq("  current_reservation", current_pages(), before - 8);
    check_eq("  the pfns have become mfns; the machine-to-physical table knows them", (long)m2p[mfns[3]], (long)pfns[3]);
    map(0, mfns[0]);
    for (int i = 8; i < PAGES; i++)
        mfns[i] = 0;
    check_eq("  increase by 8", op(XENMEM_increase_reservation, mfns + 8, 8, 0), 8);
    check_eq("  current_reservation", current_pages(), before);
    check_eq("  it gave frames", mfns[8] != 0 && mfns[15] != 0 && mfns[8] != mfns[15], 1);
    map(8, mfns[8]);
    pages[8][0] = 0x99;
    check_eq("  and use it", pages[8][0], 0x99);
    u64 surplus[4] = {0, 0, 0, 0};
    u16 self = DOMID_SELF;
    long room = HYPERCALL(HC_memory_op, XENMEM_maximum_reservation, &self) - before;
    check_eq("  maximum_reservation is not less than the current one", room >= 0, 1);
    long got = 0;
    while (got < 1000 && op(XENMEM_increase_reservation, surplus, 1, 0) == 1)
        got++;
    check_eq("  no more than the maximum can be had", got, room);
}

static void mistakes(void)
{
    u64 extents[4] = {0xffffffffff, 1, 2, 3};
    struct reservation r = {extents, 1, 0, 0, DOMID_SELF};
    u16 domid = 0;
    print("# mistakes\n");
    check_eq("  current_reservation of domain 0", HYPERCALL(HC_memory_op, XENMEM_current_reservation, &domid), -EPERM);
    domid = 999;
    check_eq("  current_reservation of a domain that does not exist", HYPERCALL(HC_memory_op, XENMEM_current_reservation, &domid), -ESRCH);
    check_eq("  maximum_reservation of a domain that does not exist", HYPERCALL(HC_memory_op, XENMEM_maximum_reservation, &domid), -ESRCH);
    check_eq("  current_reservation, a wild pointer", HYPERCALL(HC_memory_op, XENMEM_current_reservation, WILD), -EFAULT);
    check_eq("  decrease of none", op(XENMEM_decrease_reservation, extents, 0, 0), 0);
    check_eq("  decrease of an mfn beyond all", op(XENMEM_decrease_reservation, extents, 1, 0), 0);
    check_eq("  decrease, a wild list", op(XENMEM_decrease_reservation, (u64 *)WILD, 1, 0), 0);
    check_eq("  decrease, a list in Xen's memory", op(XENMEM_decrease_reservation, (u64 *)0xffff830000000000, 1, 0), 0);
    check_eq("  decrease, an order beyond all", op(XENMEM_decrease_reservation, extents, 1, 40), 0);
    check_eq("  decrease, more extents than can be", op(XENMEM_decrease_reservation, extents, 1ul << 60, 0), 0);
    check_eq("  populate, an order beyond all", op(XENMEM_populate_physmap, extents, 1, 40), 0);
    check_eq("  populate, a wild list", op(XENMEM_populate_physmap, (u64 *)WILD, 1, 0), 0);
    r.domid = 0;
    check_eq("  decrease of domain 0's", HYPERCALL(HC_memory_op, XENMEM_decrease_reservation, &r), 0);
    r.domid = 999;
    check_eq("  decrease of a domain's that does not exist", HYPERCALL(HC_memory_op, XENMEM_decrease_reservation, &r), 0);
    check_eq("  decrease, a wild argument", HYPERCALL(HC_memory_op, XENMEM_decrease_reservation, WILD), 0);
    check_eq("  an unknown operation", HYPERCALL(HC_memory_op, 60, &r), -ENOSYS);
}

static void exchange(void)
{
    struct {
        struct reservation in, out;
        u64 nr_exchanged;
    } x;
    u8 *page = page_alloc();
    u64 in = va_to_mfn(page), out = va_to_pfn(page);
    print("# exchange\n");
    x.in = (struct reservation){&in, 1, 0, 0, DOMID_SELF};
    x.out = (struct reservation){&out, 1, 0, 0, DOMID_SELF};
    x.nr_exchanged = 0;
    long before = current_pages();
    check_eq("  of a page that is mapped", HYPERCALL(HC_memory_op, XENMEM_exchange, &x), -EINVAL);
    check_eq("  none exchanged", (long)x.nr_exchanged, 0);
    update_va(page, 0, UVMF_INVLPG);
    check_eq("  of a page that is mapped nowhere", HYPERCALL(HC_memory_op, XENMEM_exchange, &x), 0);
    check_eq("  one exchanged", (long)x.nr_exchanged, 1);
    check_eq("  the machine-to-physical table knows the new frame", (long)m2p[out], (long)va_to_pfn(page));
    check_eq("  the reservation is as before", current_pages(), before);
    check_eq("  the new frame can be mapped", update_va(page, out << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), 0);
    check_eq("  the old one cannot", update_va(pages[1], in << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), -EBUSY);
    u64 none = foreign_mfn();
    x.in.extents = &none;
    x.nr_exchanged = 0;
    check_eq("  of a frame that is not ours", HYPERCALL(HC_memory_op, XENMEM_exchange, &x), -EINVAL);
    x.nr_exchanged = 2;
    check_eq("  more exchanged than there are", HYPERCALL(HC_memory_op, XENMEM_exchange, &x), -EINVAL);
    x.nr_exchanged = 0;
    x.in.nr_extents = 2;
    check_eq("  two for one", HYPERCALL(HC_memory_op, XENMEM_exchange, &x), -EINVAL);
    x.in.nr_extents = 1;
    x.in.domid = 0;
    check_eq("  of domain 0's", HYPERCALL(HC_memory_op, XENMEM_exchange, &x), -EINVAL);
    check_eq("  a wild argument", HYPERCALL(HC_memory_op, XENMEM_exchange, WILD), -EFAULT);
    check_eq("  the reservation is still as before", current_pages(), before);
}

static void maps(void)
{
    static struct {
        u64 base, size;
        u32 type;
    } __attribute__((packed)) e820[32];
    struct {
        u32 nr;
        void *buffer;
    } request = {32, e820};
    static u64 list[64];
    struct {
        u32 max;
        u64 *extents;
        u32 nr;
    } m2p_list = {64, list, 0};
    print("# maps\n");
    check_eq("  maximum_ram_page", HYPERCALL(HC_memory_op, XENMEM_maximum_ram_page, 0) >= (long)mfns[0], 1);
    check_eq("  memory_map", HYPERCALL(HC_memory_op, XENMEM_memory_map, &request), 0);
    check_eq("  its first entry is RAM from 0", e820[0].base == 0 && e820[0].type == 1, 1);
    check_eq("  as much as we have", e820[0].size >= start_info->nr_pages << PAGE_SHIFT, 1);
    check_eq("  machine_memory_map is not for a domU", HYPERCALL(HC_memory_op, XENMEM_machine_memory_map, &request), -EPERM);
    check_eq("  machphys_mfn_list", HYPERCALL(HC_memory_op, XENMEM_machphys_mfn_list, &m2p_list), 0);
    check_eq("  it has at least one extent", m2p_list.nr > 0 && list[0] != 0, 1);
}

int main(void)
{
    traps_install();
    m2p = (u64 *)machphys_mapping().v_start;
    less_and_more();
    mistakes();
    exchange();
    maps();
    return 0;
}
