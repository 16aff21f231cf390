/*
 * Every rule of direct paging, broken on purpose. Each attempt must be refused with Xen's errno and
 * change nothing; at the end every frame must still be free of references, which shows that no refused
 * attempt left one behind.
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul
#define PTE_PAT PTE_PS /* in an L1 entry */

static struct region region;
static u8 *victim; /* an ordinary page that is mapped writable */
static u64 foreign, max_mfn, m2p_mfn;
static volatile u64 *m2p;

static void refused(const char *what, u64 *table, int index, u64 value, long expected)
{
    u64 before = table[index];
    check_eq(what, mmu_update(machine_address(&table[index]), value), expected);
    if (table[index] != before && expected != 0)
        check(false, "  it changed the entry all the same");
    if (expected == 0)
        mmu_update(machine_address(&table[index]), before);
}

static u64 of(u64 mfn, u64 flags) { return mfn << PAGE_SHIFT | flags; }

static void mappings(void)
{
    u64 *t1 = region.t1;
    print("# entries of an L1\n");
    refused("  a writable mapping of an L1", t1, 1, entry(region.t1, PTE_KERNEL), -EBUSY);
    refused("  a writable mapping of an L2", t1, 1, entry(region.t2, PTE_KERNEL), -EBUSY);
    refused("  a writable mapping of an L3", t1, 1, entry(region.t3, PTE_KERNEL), -EBUSY);
    refused("  a writable mapping of an L4", t1, 1, entry(region.l4, PTE_KERNEL), -EBUSY);
    refused("  a read-only mapping of an L1 is allowed", t1, 1, entry(region.t1, PTE_KERNEL_RO), 0);
    refused("  a read-only mapping of an L4 is allowed", t1, 1, entry(region.l4, PTE_KERNEL_RO), 0);
    refused("  a frame that is not ours", t1, 1, of(foreign, PTE_KERNEL), -EBUSY);
    refused("  ... read-only", t1, 1, of(foreign, PTE_KERNEL_RO), -EBUSY);
    refused("  the frame of the local APIC", t1, 1, of(0xfee00, PTE_KERNEL), -EPERM);
    refused("  a frame of the machine-to-physical table", t1, 1, of(m2p_mfn, PTE_KERNEL), -EBUSY);
    refused("  ... read-only", t1, 1, of(m2p_mfn, PTE_KERNEL_RO), -EBUSY);
    refused("  a frame beyond the machine's memory", t1, 1, of(max_mfn + 0x100000, PTE_KERNEL), -EPERM);
    refused("  the greatest mfn there can be", t1, 1, of(0xffffffffff, PTE_KERNEL), -EINVAL);
    refused("  the shared-info page once more is allowed", t1, 1, start_info->shared_info | PTE_KERNEL, 0);
    refused("  bit 52 is allowed", t1, 1, entry(victim, PTE_KERNEL | 1ul << 52), 0);
    refused("  bit 58 is allowed", t1, 1, entry(victim, PTE_KERNEL | 1ul << 58), 0);
    refused("  bit 62 is allowed", t1, 1, entry(victim, PTE_KERNEL | 1ul << 62), 0);
    refused("  write-through", t1, 1, entry(victim, PTE_KERNEL | PTE_PWT), -EINVAL);
    refused("  uncached", t1, 1, entry(victim, PTE_KERNEL | PTE_PCD), -EINVAL);
    refused("  PAT", t1, 1, entry(victim, PTE_KERNEL | PTE_PAT), -EINVAL);
    refused("  the three bits for the guest's use are allowed", t1, 1, entry(victim, PTE_KERNEL | 7 * PTE_AVL0), 0);
}

static void tables_below_tables(void)
{
    u64 *good = page_alloc(), *bad = page_alloc(), *writable = page_alloc();
    good[3] = entry(victim, PTE_KERNEL);
    bad[3] = of(foreign, PTE_KERNEL);
    set_read_only(good), set_read_only(bad);

    print("# entries of an L2\n");
    refused("  a good L1 is allowed", region.t2, 1, entry(good, PTE_TABLE), 0);
    refused("  ... with NX too", region.t2, 1, entry(good, PTE_TABLE | PTE_NX), 0);
    refused("  ... without the write bit too", region.t2, 1, entry(good, PTE_P | PTE_U | PTE_A), 0);
    refused("  an L1 that maps a frame that is not ours", region.t2, 1, entry(bad, PTE_TABLE), -EBUSY);
    refused("  an L1 that is mapped writable", region.t2, 1, entry(writable, PTE_TABLE), -EINVAL);
    refused("  an L2", region.t2, 1, entry(region.t2, PTE_TABLE), -EINVAL);
    refused("  an L3", region.t2, 1, entry(region.t3, PTE_TABLE), -EINVAL);
    refused("  an L4", region.t2, 1, entry(region.l4, PTE_TABLE), -EINVAL);
    refused("  a frame that is not ours", region.t2, 1, of(foreign, PTE_TABLE), -EINVAL);
    refused("  a frame beyond the machine's memory", region.t2, 1, of(max_mfn + 0x100000, PTE_TABLE), -EINVAL);
    refused("  a frame of the machine-to-physical table", region.t2, 1, of(m2p_mfn, PTE_TABLE), -EINVAL);
    refused("  a 2 MiB page", region.t2, 1, of(va_to_mfn(victim) & ~511ul, PTE_TABLE | PTE_PS), -EINVAL);
    refused("  the global bit", region.t2, 1, entry(good, PTE_TABLE | PTE_G), -EINVAL);
    refused("  bit 52 is allowed", region.t2, 1, entry(good, PTE_TABLE | 1ul << 52), 0);
    refused("  bit 62 is allowed", region.t2, 1, entry(good, PTE_TABLE | 1ul << 62), 0);
    refused("  write-through", region.t2, 1, entry(good, PTE_TABLE | PTE_PWT), -EINVAL);
    refused("  itself, read-only: a linear map of the L2", region.t2, 1, entry(region.t2, PTE_P | PTE_U | PTE_A), 0);

    print("# entries of an L3\n");
    refused("  an L1", region.t3, 1, entry(region.t1, PTE_TABLE), -EINVAL);
    refused("  an L3", region.t3, 1, entry(region.t3, PTE_TABLE), -EINVAL);
    refused("  an L4", region.t3, 1, entry(region.l4, PTE_TABLE), -EINVAL);
    refused("  an L2 that has an L1 too few levels down", region.t3, 1, entry(good, PTE_TABLE), -EINVAL);
    refused("  a 1 GiB page", region.t3, 1, of(va_to_mfn(victim) & ~0x3fffful, PTE_TABLE | PTE_PS), -EINVAL);
    refused("  the global bit", region.t3, 1, entry(region.t2, PTE_TABLE | PTE_G), -EINVAL);
    refused("  bit 62 is allowed", region.t3, 1, entry(region.t2, PTE_TABLE | 1ul << 62), 0);
    refused("  the same L2 twice is allowed", region.t3, 1, entry(region.t2, PTE_TABLE), 0);

    print("# entries of an L4\n");
    refused("  an L1", region.l4, 33, entry(region.t1, PTE_TABLE), -EINVAL);
    refused("  an L2", region.l4, 33, entry(region.t2, PTE_TABLE), -EINVAL);
    refused("  itself, writable", region.l4, 33, entry(region.l4, PTE_TABLE), -EINVAL);
    refused("  a frame that is not ours", region.l4, 33, of(foreign, PTE_TABLE), -EINVAL);
    refused("  the PS bit", region.l4, 33, entry(region.t3, PTE_TABLE | PTE_PS), -EINVAL);
    refused("  the global bit", region.l4, 33, entry(region.t3, PTE_TABLE | PTE_G), -EINVAL);
    refused("  bit 62 is allowed", region.l4, 33, entry(region.t3, PTE_TABLE | 1ul << 62), 0);
    refused("  a mapped page as L3", region.l4, 33, entry(writable, PTE_TABLE), -EINVAL);
    for (int slot = 256; slot < 272; slot++)
        if (mmu_update(machine_address(&region.l4[slot]), entry(region.t3, PTE_TABLE)) != -EINVAL ||
            mmu_update(machine_address(&region.l4[slot]), 0) != -EINVAL)
            check_eq("  a slot of Xen's may not be written", slot, 0);
    check(true, "  Xen's slots 256 to 271");
    refused("  slot 255 is ours", region.l4, 255, entry(region.t3, PTE_TABLE), 0);
    refused("  slot 272 is ours", region.l4, 272, entry(region.t3, PTE_TABLE), 0);
    check_eq("the good L1 is free again", set_writable(good), 0);
    check_eq("the bad L1 is no page table", set_writable(bad), 0);
}

static void pins(void)
{
    u64 *table = page_alloc(), *bad = page_alloc();
    u64 mfn = va_to_mfn(table);
    bad[511] = of(foreign, PTE_TABLE);
    set_read_only(bad);
    print("# pins\n");
    check_eq("  of a page that is mapped writable", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), -EINVAL);
    set_read_only(table);
    check_eq("  of an L1", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), 0);
    check_eq("  twice", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), -EINVAL);
    check_eq("  as another level", mmuext(MMUEXT_PIN_L2_TABLE, mfn, 0), -EINVAL);
    check_eq("  a writable mapping while pinned", set_writable(table), -EBUSY);
    check_eq("  unpin", mmuext(MMUEXT_UNPIN_TABLE, mfn, 0), 0);
    check_eq("  unpin twice", mmuext(MMUEXT_UNPIN_TABLE, mfn, 0), -EINVAL);
    check_eq("  unpin of a table that was only linked", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(region.t1), 0), -EINVAL);
    check_eq("  unpin of an ordinary page", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(victim), 0), -EINVAL);
    check_eq("  of a linked L1 as L1", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(region.t1), 0), 0);
    check_eq("  unpin", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(region.t1), 0), 0);
    check_eq("  of a linked L1 as L4", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(region.t1), 0), -EINVAL);
    check_eq("  of a linked L3 as L2", mmuext(MMUEXT_PIN_L2_TABLE, va_to_mfn(region.t3), 0), -EINVAL);
    check_eq("  of an L1 with a frame that is not ours", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(bad), 0), -EBUSY);
    for (u32 cmd = MMUEXT_PIN_L2_TABLE; cmd <= MMUEXT_PIN_L4_TABLE; cmd++)
        check_eq("  of a higher table with a frame that is not ours", mmuext(cmd, va_to_mfn(bad), 0), -EINVAL);
    check_eq("  which is no page table then", set_writable(bad), 0);
    check_eq("  of a frame that is not ours", mmuext(MMUEXT_PIN_L1_TABLE, foreign, 0), -EINVAL);
    check_eq("  of a frame of Xen's", mmuext(MMUEXT_PIN_L1_TABLE, m2p_mfn, 0), -EINVAL);
    check_eq("  of a frame beyond the machine's memory", mmuext(MMUEXT_PIN_L4_TABLE, max_mfn + 0x100000, 0), -EINVAL);
    check_eq("  unpin of a frame that is not ours", mmuext(MMUEXT_UNPIN_TABLE, foreign, 0), -EINVAL);
    check_eq("  unpin of a frame beyond the machine's memory", mmuext(MMUEXT_UNPIN_TABLE, ~0ul, 0), -EINVAL);

    /* One page as L1 and at the same time as L2: the second use must wait for the end of the first. */
    check_eq("  as L1", mmuext(MMUEXT_PIN_L1_TABLE, mfn, 0), 0);
    refused("  an L1 in the place of an L2", region.t3, 1, entry(table, PTE_TABLE), -EINVAL);
    check_eq("  unpin", mmuext(MMUEXT_UNPIN_TABLE, mfn, 0), 0);
    refused("  then it may be an L2", region.t3, 1, entry(table, PTE_TABLE), 0);
    check_eq("  and then an ordinary page", set_writable(table), 0);

    print("# base pointers\n");
    check_eq("  to an ordinary page", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(victim), 0), -EINVAL);
    check_eq("  to an L1", mmuext(MMUEXT_NEW_BASEPTR, va_to_mfn(region.t1), 0), -EINVAL);
    check_eq("  to a frame that is not ours", mmuext(MMUEXT_NEW_BASEPTR, foreign, 0), -EINVAL);
    check_eq("  to a frame beyond the machine's memory", mmuext(MMUEXT_NEW_BASEPTR, max_mfn + 0x100000, 0), -EINVAL);
    check_eq("  the user's to an ordinary page", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(victim), 0), -EINVAL);
    check_eq("  the user's to an L3", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(region.t3), 0), -EINVAL);
    check_eq("  the user's to a frame that is not ours", mmuext(MMUEXT_NEW_USER_BASEPTR, foreign, 0), -EINVAL);
    TRY("mov %0, %%cr3", : : "r"(foreign << PAGE_SHIFT) : "memory");
    check_eq("  mov to cr3 of a frame that is not ours", (long)fault.vector, VECTOR_GP);
}

static void the_calls(void)
{
    struct mmu_update update = {machine_address(&region.t1[1]), 0};
    struct mmuext_op op = {MMUEXT_TLB_FLUSH_LOCAL, 0, 0};
    print("# mmu_update itself\n");
    check_eq("  sub-command 4", mmu_update(machine_address(&region.t1[1]) + 4, 0), -ENOSYS);
    check_eq("  sub-command 7", mmu_update(machine_address(&region.t1[1]) + 7, 0), -ENOSYS);
    check_eq("  a table that is not ours", mmu_update(of(foreign, 8), 0), -EINVAL);
    check_eq("  a table beyond the machine's memory", mmu_update(of(max_mfn + 0x100000, 8), 0), -EINVAL);
    check_eq("  the machine-to-physical table", mmu_update(of(m2p_mfn, 8), 0), -EINVAL);
    check_eq("  machphys of a frame that is not ours", mmu_update(of(foreign, MMU_MACHPHYS_UPDATE), 1), -EINVAL);
    check_eq("  machphys of a frame of Xen's", mmu_update(of(m2p_mfn, MMU_MACHPHYS_UPDATE), 1), -EINVAL);
    check_eq("  machphys beyond the machine's memory", mmu_update(of(max_mfn + 0x100000, MMU_MACHPHYS_UPDATE), 1), -EINVAL);
    check_eq("  a wild list", HYPERCALL(HC_mmu_update, WILD, 1, 0, DOMID_SELF), -EFAULT);
    check_eq("  a list in Xen's memory", HYPERCALL(HC_mmu_update, 0xffff830000000000, 1, 0, DOMID_SELF), -EFAULT);
    check_eq("  a wild done pointer", HYPERCALL(HC_mmu_update, &update, 1, WILD, DOMID_SELF), 0);
    check_eq("  domain 0's tables", HYPERCALL(HC_mmu_update, &update, 1, 0, 0), -EPERM);
    check_eq("  a domain that does not exist", HYPERCALL(HC_mmu_update, &update, 1, 0, 999), -ESRCH);
    check_eq("  DOMID_IO, whose frames anybody may name", HYPERCALL(HC_mmu_update, &update, 1, 0, DOMID_IO), 0);
    check_eq("  DOMID_XEN", HYPERCALL(HC_mmu_update, &update, 1, 0, DOMID_XEN), -EPERM);
    check_eq("  DOMID_INVALID", HYPERCALL(HC_mmu_update, &update, 1, 0, DOMID_INVALID), -ESRCH);
    check_eq("  a page-table owner in the upper half", HYPERCALL(HC_mmu_update, &update, 1, 0, DOMID_SELF | 1000ul << 16), -ESRCH);
    check_eq("  ... domain 0", HYPERCALL(HC_mmu_update, &update, 1, 0, DOMID_SELF | 1ul << 16), -EPERM);
    print("# mmuext_op itself\n");
    check_eq("  a wild list", HYPERCALL(HC_mmuext_op, WILD, 1, 0, DOMID_SELF), -EFAULT);
    check_eq("  a wild done pointer", HYPERCALL(HC_mmuext_op, &op, 1, WILD, DOMID_SELF), 0);
    check_eq("  domain 0", HYPERCALL(HC_mmuext_op, &op, 1, 0, 0), -EPERM);
    check_eq("  a domain that does not exist", HYPERCALL(HC_mmuext_op, &op, 1, 0, 999), -ESRCH);
    check_eq("  CLEAR_PAGE of a frame that is not ours", mmuext(MMUEXT_CLEAR_PAGE, foreign, 0), -EINVAL);
    check_eq("  CLEAR_PAGE of a frame of Xen's", mmuext(MMUEXT_CLEAR_PAGE, m2p_mfn, 0), -EINVAL);
    check_eq("  COPY_PAGE from a frame that is not ours", mmuext(MMUEXT_COPY_PAGE, va_to_mfn(victim), foreign), -EINVAL);
    check_eq("  COPY_PAGE to a frame that is not ours", mmuext(MMUEXT_COPY_PAGE, foreign, va_to_mfn(victim)), -EINVAL);
    print("# update_va_mapping\n");
    void *va = (void *)(region.base + PAGE_SIZE);
    check_eq("  a frame that is not ours", update_va(va, of(foreign, PTE_KERNEL), 0), -EBUSY);
    check_eq("  a writable mapping of a page table", update_va(va, entry(region.t1, PTE_KERNEL), 0), -EBUSY);
    check_eq("  a non-canonical address", update_va((void *)(1ul << 63), 0, 0), -EINVAL);
    check_eq("  _otherdomain: ourselves", HYPERCALL(HC_update_va_mapping_otherdomain, va, 0, 0, DOMID_SELF), 0);
    check_eq("  _otherdomain: domain 0", HYPERCALL(HC_update_va_mapping_otherdomain, va, 0, 0, 0), -EPERM);
    check_eq("  _otherdomain: a domain that does not exist", HYPERCALL(HC_update_va_mapping_otherdomain, va, 0, 0, 999), -ESRCH);
}

static void writes_to_xens_memory(void)
{
    print("# stores to memory of Xen's\n");
    TRY("movq $0, (%0)", : : "r"(&m2p[va_to_mfn(victim)]) : "memory");
    check_eq("  the machine-to-physical table: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  error code", (long)fault.error, 3);
    check_eq("  it still knows our frame", (long)m2p[va_to_mfn(victim)], (long)va_to_pfn(victim));
    TRY("movq $0, (%0)", : : "r"(0xffff830000000000) : "memory");
    check_eq("  the hypervisor's area: #PF", (long)fault.vector, VECTOR_PF);
    TRY("movq $0, (%0)", : : "r"(0xffff82d040200000) : "memory");
    check_eq("  the hypervisor's code: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  a hypercall's result there", HYPERCALL(HC_memory_op, 12, 0xffff830000000000), -EFAULT);
    check_eq("  a hypercall's result in the machine-to-physical table", HYPERCALL(HC_memory_op, 12, m2p), -EFAULT);
}

/* decrease_reservation of one frame: how many were taken (0 or 1). */
static long give_back(u64 mfn)
{
    struct {
        u64 *extent_start;
        u64 nr_extents;
        u32 extent_order, mem_flags;
        u16 domid;
    } op = {&mfn, 1, 0, 0, DOMID_SELF};
    return HYPERCALL(HC_memory_op, 1, &op);
}

static void giving_back(void)
{
    u8 *page = page_alloc();
    u64 mfn = va_to_mfn(page), region_mfn = va_to_mfn(region.t1);
    print("# decrease_reservation\n");
    check_eq("  of a frame that is not ours", give_back(foreign), 0);
    check_eq("  of a frame of Xen's", give_back(m2p_mfn), 0);
    check_eq("  of a frame beyond the machine's memory", give_back(max_mfn + 0x100000), 0);
    page[0] = 0x42;
    check_eq("  of a frame that is mapped: taken once its mappings are gone", give_back(mfn), 1);
    check_eq("  until then it is there", page[0], 0x42);
    page[0] = 0x43;
    check_eq("  and writable", page[0], 0x43);
    check_eq("  a second time, which takes nothing more", give_back(mfn), 1);
    check_eq("  another mapping of it is still allowed", update_va((void *)(region.base + PAGE_SIZE), of(mfn, PTE_KERNEL), UVMF_INVLPG), 0);
    check_eq("  remove that", update_va((void *)(region.base + PAGE_SIZE), 0, UVMF_INVLPG), 0);
    check_eq("  remove the first", update_va(page, 0, UVMF_INVLPG), 0);
    check_eq("  now it cannot be mapped again", update_va(page, of(mfn, PTE_KERNEL), UVMF_INVLPG), -EBUSY);

    /* A page table in use: the frame is lost to us, but stays a page table as long as it is linked. */
    check_eq("  of a page table in use", give_back(region_mfn), 1);
    check_eq("  it still maps what it mapped", *(volatile u8 *)region.base, 0x5a);
    check_eq("  it may not be mapped writable", set_writable(region.t1), -EBUSY);
    check_eq("  it can still be changed", mmu_update(machine_address(&region.t1[1]), entry(victim, PTE_KERNEL)), 0);
    check_eq("  and back", mmu_update(machine_address(&region.t1[1]), 0), 0);
}

static void afterwards(void)
{
    print("# afterwards\n");
    check_eq("the region still works", *(volatile u8 *)region.base, 0x5a);
    check_eq("unlink it", mmu_update(machine_address(&region.l4[region.base >> 39]), 0), 0);
    check_eq("the L3 is an ordinary page again", set_writable(region.t3), 0);
    check_eq("so is the L2", set_writable(region.t2), 0);
    check_eq("the L1, given back before, lives on through its read-only mapping", set_read_only(region.t1), 0);
    check_eq("remove that", update_va(region.t1, 0, UVMF_INVLPG), 0);
    memset(victim, 0, PAGE_SIZE);
    set_read_only(victim);
    check_eq("the victim can become a page table: no reference was left", mmuext(MMUEXT_PIN_L2_TABLE, va_to_mfn(victim), 0), 0);
    check_eq("and an ordinary page again", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(victim), 0) | set_writable(victim), 0);
}

int main(void)
{
    traps_install();
    region = region_build(32);
    victim = page_alloc();
    foreign = foreign_mfn();
    struct m2p where = machphys_mapping();
    m2p = (u64 *)where.v_start;
    max_mfn = where.max_mfn;
    /* Xen's L3 of the machine-to-physical table, as far as its entry in our L4 shows it. */
    m2p_mfn = PTE_MFN(region.l4[where.v_start >> 39 & 511]);
    check_eq("Xen's slot in our L4 shows a frame of Xen's", m2p_mfn != 0 && mfn_to_pfn(m2p_mfn) == ~0ul, 1);

    mappings();
    tables_below_tables();
    pins();
    the_calls();
    writes_to_xens_memory();
    giving_back();
    afterwards();
    return 0;
}
