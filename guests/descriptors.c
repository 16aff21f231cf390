/*
 * Segment descriptors: a GDT and an LDT of the guest's own, which Xen checks descriptor by descriptor,
 * so that no segment ever gives the guest a privilege (public arch-x86/xen.h, set_gdt,
 * update_descriptor and MMUEXT_SET_LDT; Intel SDM volume 3, section 3.4.5).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul
#define DATA_DPL3 0x00cff3000000fffful
#define CODE_DPL3 0x00affb000000fffful
#define DATA_DPL0 0x00cf93000000fffful
#define CODE_DPL0 0x00af9b000000fffful
#define DATA_BASE(base, dpl) \
    (0x00c013000000fffful | 0x800000000000ul | (dpl) << 45 | ((base) & 0xfffffful) << 16 | ((base) >> 24 & 0xff) << 56)
#define DPL(descriptor) ((descriptor) >> 45 & 3)
#define SYSTEM(type) (0x0000e00000000067ul | (u64)(type) << 40) /* DPL 3, present */
#define SELECTOR_GDT(index) ((u64)(index) << 3 | 3)
#define SELECTOR_LDT(index) ((u64)(index) << 3 | 7)

static u64 *gdt, *ldt;

static long set_gdt(u64 mfn, u64 entries)
{
    u64 frames[1] = {mfn};
    return HYPERCALL(HC_set_gdt, frames, entries);
}

static long update_descriptor(const u64 *at, u64 descriptor)
{
    return HYPERCALL(HC_update_descriptor, machine_address(at), descriptor);
}

static u64 load(u64 selector)
{
    TRY("mov %w0, %%ds", : : "r"(selector) : "memory");
    __asm__ volatile("mov %w0, %%ds" : : "r"(0));
    return fault.vector;
}

static void global_table(void)
{
    print("# the GDT\n");
    gdt[1] = DATA_DPL3;
    gdt[2] = CODE_DPL3;
    check_eq("  a page that is mapped writable", set_gdt(va_to_mfn(gdt), 512), -EINVAL);
    set_read_only(gdt);
    check_eq("  a page of good descriptors", set_gdt(va_to_mfn(gdt), 512), 0);
    check_eq("  its data segment can be loaded", (long)load(SELECTOR_GDT(1)), NO_FAULT);
    check_eq("  a null descriptor cannot", (long)load(SELECTOR_GDT(3)), VECTOR_GP);
    check_eq("  the error code is the selector", (long)fault.error, 3 << 3);
    check_eq("  a writable mapping of the GDT", set_writable(gdt), -EBUSY);
    check_eq("  pinning it as a page table", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(gdt), 0), -EINVAL);
    u64 seen;
    __asm__ volatile("mov $0, %%eax\n lar %w1, %%eax\n mov %%rax, %0" : "=r"(seen) : "r"(SELECTOR_GDT(2)) : "rax", "cc");
    check_eq("  lar sees the code segment", (long)(seen & 0xff00), 0xfb00);

    check_eq("  update_descriptor", update_descriptor(&gdt[4], DATA_DPL3), 0);
    check_eq("  it took effect", (long)gdt[4], (long)DATA_DPL3);
    check_eq("  and can be loaded", (long)load(SELECTOR_GDT(4)), NO_FAULT);
    check_eq("  to zero", update_descriptor(&gdt[4], 0), 0);
    check_eq("  and can be loaded no more", (long)load(SELECTOR_GDT(4)), VECTOR_GP);
    check_eq("  a code segment of ring 0", update_descriptor(&gdt[5], CODE_DPL0), 0);
    check_eq("  becomes one of ring 3", (long)DPL(gdt[5]), 3);
    check_eq("  a data segment of ring 0", update_descriptor(&gdt[6], DATA_DPL0), 0);
    check_eq("  becomes one of ring 3", (long)DPL(gdt[6]), 3);
    check_eq("  a segment that is not present keeps its DPL", update_descriptor(&gdt[7], CODE_DPL0 & ~(1ul << 47)), 0);
    check_eq("  as it is", (long)gdt[7], (long)(CODE_DPL0 & ~(1ul << 47)));
    check_eq("  a TSS", update_descriptor(&gdt[8], SYSTEM(9)), -EINVAL);
    check_eq("  an LDT", update_descriptor(&gdt[8], SYSTEM(2)), -EINVAL);
    check_eq("  an interrupt gate", update_descriptor(&gdt[8], SYSTEM(14)), -EINVAL);
    check_eq("  a trap gate", update_descriptor(&gdt[8], SYSTEM(15)), -EINVAL);
    check_eq("  a task gate", update_descriptor(&gdt[8], SYSTEM(5)), -EINVAL);
    check_eq("  a call gate to Xen's code", update_descriptor(&gdt[8], SYSTEM(12) | 0xe008ul << 16), -EINVAL);
    check_eq("  nothing was stored", (long)gdt[8], 0);
    check_eq("  a place that is not aligned", HYPERCALL(HC_update_descriptor, machine_address(gdt) + 4, DATA_DPL3), -EINVAL);
    check_eq("  a frame that is not ours", HYPERCALL(HC_update_descriptor, foreign_mfn() << PAGE_SHIFT, DATA_DPL3), -EINVAL);
    check_eq("  a page table", HYPERCALL(HC_update_descriptor, machine_address((void *)start_info->pt_base), DATA_DPL3), -EINVAL);
    check_eq("  an mfn beyond all memory", HYPERCALL(HC_update_descriptor, 0xffffffffff000, DATA_DPL3), -EINVAL);
    TRY("movq $0, (%0)", : : "r"(&gdt[1]) : "memory");
    check_eq("  a store to it: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  mmu_update of it", mmu_update(machine_address(&gdt[1]), 0), -EINVAL);

    print("# other GDTs\n");
    u64 *bad = page_alloc();
    bad[100] = SYSTEM(9);
    set_read_only(bad);
    check_eq("  a page with a TSS in it", set_gdt(va_to_mfn(bad), 512), -EINVAL);
    check_eq("  even where the table is said to end before it", set_gdt(va_to_mfn(bad), 8), -EINVAL);
    check_eq("  a frame that is not ours", set_gdt(foreign_mfn(), 512), -EINVAL);
    check_eq("  a page table", set_gdt(va_to_mfn((void *)start_info->pt_base), 512), -EINVAL);
    check_eq("  more entries than 14 pages have", set_gdt(va_to_mfn(gdt), 14 * 512 + 1), -EINVAL);
    check_eq("  a wild list", HYPERCALL(HC_set_gdt, WILD, 512), -EFAULT);
    check_eq("  the old one is still in force", (long)load(SELECTOR_GDT(1)), NO_FAULT);
    check_eq("  none", set_gdt(0, 0), 0);
    check_eq("  the segment is gone", (long)load(SELECTOR_GDT(1)), VECTOR_GP);
    check_eq("  the page is free", set_writable(gdt), 0);
    check_eq("  the refused page too", set_writable(bad), 0);
    gdt[10] = CODE_DPL0;
    set_read_only(gdt);
    check_eq("  a page with a ring 0 segment in it", set_gdt(va_to_mfn(gdt), 512), 0);
    check_eq("  becomes one of ring 3", (long)DPL(gdt[10]), 3);
    check_eq("  a new GDT in place of the old", set_gdt(va_to_mfn(gdt), 16), 0);
    check_eq("  its last entry", (long)load(SELECTOR_GDT(15)), VECTOR_GP);
}

/* Xen maps a page of the LDT when a selector first needs it; if it cannot, the guest sees a page fault there. */
static void not_mapped(const char *what, u64 address)
{
    check_eq(what, (long)load(SELECTOR_LDT(1)), VECTOR_PF);
    check_eq("    error code", (long)fault.error, 0);
    check_eq("    cr2 is where the descriptor would be", (long)fault.cr2, (long)address + 8);
}

static void local_table(void)
{
    static u64 marker[2] = {0x1234, 0x5678};
    u64 value;
    print("# the LDT\n");
    ldt[1] = DATA_BASE(0ul, 3ul);
    ldt[2] = SYSTEM(2);
    set_read_only(ldt);
    check_eq("  SET_LDT", mmuext(MMUEXT_SET_LDT, (u64)ldt, 4), 0);
    not_mapped("  a page with a bad descriptor in it cannot be used", (u64)ldt);
    check_eq("  it stays an ordinary page", set_writable(ldt), 0);
    ldt[2] = 0;
    not_mapped("  nor one that is mapped writable", (u64)ldt);
    set_read_only(ldt);
    check_eq("  a good one can", (long)load(SELECTOR_LDT(1)), NO_FAULT);
    check_eq("  and is a descriptor page from then on", set_writable(ldt), -EBUSY);
    check_eq("  an entry beyond its end", (long)load(SELECTOR_LDT(4)), VECTOR_GP);
    check_eq("  the error code is the selector", (long)fault.error, 4 << 3 | 4);
    check_eq("  update_descriptor", update_descriptor(&ldt[3], DATA_DPL0), 0);
    check_eq("  the segment can be loaded", (long)load(SELECTOR_LDT(3)), NO_FAULT);
    check_eq("  and is one of ring 3", (long)DPL(ldt[3]), 3);
    check_eq("  a TSS", update_descriptor(&ldt[3], SYSTEM(9)), -EINVAL);

    /* A base that the LDT gives is a real base: FS reads 8 bytes further on. */
    check_eq("  a data segment with base 8", update_descriptor(&ldt[3], DATA_BASE(8ul, 3ul)), 0);
    TRY("mov %w1, %%fs\n mov %%fs:(%2), %0\n", : "=&r"(value) : "r"(SELECTOR_LDT(3)), "r"(&marker[0]) : "memory");
    check_eq("  its base counts in FS", (long)value, 0x5678);
    __asm__ volatile("mov %w0, %%fs" : : "r"(0));

    check_eq("  SET_LDT: not aligned", mmuext(MMUEXT_SET_LDT, (u64)ldt + 8, 4), -EINVAL);
    check_eq("  SET_LDT: too many entries", mmuext(MMUEXT_SET_LDT, (u64)ldt, 8193), -EINVAL);
    check_eq("  SET_LDT: a non-canonical address", mmuext(MMUEXT_SET_LDT, 1ul << 63, 4), -EINVAL);
    check_eq("  SET_LDT: a wild address is not looked at yet", mmuext(MMUEXT_SET_LDT, WILD, 4), 0);
    not_mapped("  but when a selector is loaded", WILD);
    check_eq("  SET_LDT: none", mmuext(MMUEXT_SET_LDT, 0, 0), 0);
    check_eq("  the segments are gone", (long)load(SELECTOR_LDT(1)), VECTOR_GP);
    check_eq("  the page is free", set_writable(ldt), 0);
}

int main(void)
{
    traps_install();
    gdt = page_alloc();
    ldt = page_alloc();
    global_table();
    local_table();
    check_eq("the GDT goes", set_gdt(0, 0), 0);
    check_eq("its page is free", set_writable(gdt), 0);
    return 0;
}
