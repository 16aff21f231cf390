/*
 * Grant tables, version 1: a page granted, mapped, copied from and given up again, and every way to
 * get it wrong (public grant_table.h). The domain grants to itself, so that one guest can be both ends.
 */
#include "events.h"
#include "grants.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul

static volatile struct grant *table;
static u16 self;
static struct region region;
static u8 *page;

static void grant(u32 ref, u64 mfn, u16 flags)
{
    table[ref].domid = self;
    table[ref].frame = (u32)mfn;
    barrier();
    table[ref].flags = flags;
}

static void the_table(void)
{
    static u64 frames[4];
    static u8 window[PAGE_SIZE] PAGE_ALIGNED;
    struct {
        u16 dom;
        u32 nr, max;
        s16 status;
    } size = {DOMID_SELF, 0, 0, 99};
    struct grant_setup setup = {DOMID_SELF, 1, 99, frames};
    struct {
        u16 dom, pad;
        u32 version;
    } version = {DOMID_SELF, 0, 0};

    print("# the table\n");
    check_eq("  query_size", HYPERCALL(HC_grant_table_op, GNTTABOP_query_size, &size, 1), 0);
    check_eq("  status", size.status, GNTST_okay);
    check_eq("  it may have four frames at least", size.max >= 4, 1);
    check_eq("  setup_table", HYPERCALL(HC_grant_table_op, GNTTABOP_setup_table, &setup, 1), 0);
    check_eq("  status", setup.status, GNTST_okay);
    check_eq("  it gave a frame", frames[0] != 0, 1);
    check_eq("  map it", update_va(window, frames[0] << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), 0);
    table = (void *)window;
    check_eq("  the console's page is granted to domain 0", table[0].flags & 3, GTF_permit_access);
    check_eq("  by its frame", table[0].frame, (long)start_info->console_mfn);
    check_eq("  the store's too", table[1].frame, (long)start_info->store_mfn);
    check_eq("  the others are empty", table[FIRST_REF].flags | table[100].flags, 0);
    check_eq("  get_version", HYPERCALL(HC_grant_table_op, GNTTABOP_get_version, &version, 1), 0);
    check_eq("  version 1", version.version, 1);
    setup.nr = size.max + 1;
    check_eq("  setup_table with too many frames", HYPERCALL(HC_grant_table_op, GNTTABOP_setup_table, &setup, 1), 0);
    check_eq("  status", setup.status, GNTST_general_error);
    setup.nr = 1, setup.dom = 0;
    check_eq("  setup_table of domain 0's", HYPERCALL(HC_grant_table_op, GNTTABOP_setup_table, &setup, 1), 0);
    check_eq("  status", setup.status, GNTST_permission_denied);
    setup.dom = 999;
    check_eq("  setup_table of a domain's that does not exist", HYPERCALL(HC_grant_table_op, GNTTABOP_setup_table, &setup, 1), 0);
    check_eq("  status", setup.status, GNTST_bad_domain);

    /* Of all domain numbers, only our own lets us ask. */
    for (self = 1; self < 1000; self++) {
        size.dom = self, size.status = 99;
        HYPERCALL(HC_grant_table_op, GNTTABOP_query_size, &size, 1);
        if (size.status == GNTST_okay)
            break;
    }
    check_eq("  we know our own number", self < 1000, 1);
}

static void mapping(void)
{
    u64 va = region.base + PAGE_SIZE;
    volatile u8 *there = (u8 *)va;
    struct grant_map m;
    page = page_alloc();
    page[7] = 0x77;

    print("# map and unmap\n");
    grant(FIRST_REF, va_to_mfn(page), GTF_permit_access);
    m = grant_map(FIRST_REF, va, GNTMAP_host_map, self);
    check_eq("  map", m.status, GNTST_okay);
    check_eq("  the page is there", there[7], 0x77);
    there[8] = 0x88;
    check_eq("  and is the page that was granted", page[8], 0x88);
    check_eq("  the entry says reading and writing", table[FIRST_REF].flags, GTF_permit_access | GTF_reading | GTF_writing);
    check_eq("  a page that is mapped writable is no page table", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(page), 0), -EINVAL);
    check_eq("  unmap with another address", grant_unmap(m.handle, va + PAGE_SIZE, 0), GNTST_general_error);
    check_eq("  unmap", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  the entry says neither", table[FIRST_REF].flags, GTF_permit_access);
    TRY("mov (%0), %%al", : : "r"(va) : "rax", "memory");
    check_eq("  the page is gone", (long)fault.vector, VECTOR_PF);
    check_eq("  unmap twice", grant_unmap(m.handle, va, 0), GNTST_bad_handle);

    m = grant_map(FIRST_REF, va, GNTMAP_host_map | GNTMAP_readonly, self);
    check_eq("  map read-only", m.status, GNTST_okay);
    check_eq("  the entry says reading", table[FIRST_REF].flags, GTF_permit_access | GTF_reading);
    TRY("movb $1, (%0)", : : "r"(va) : "memory");
    check_eq("  a store: #PF", (long)fault.vector, VECTOR_PF);
    struct grant_map second = grant_map(FIRST_REF, va + PAGE_SIZE, GNTMAP_host_map | GNTMAP_readonly, self);
    check_eq("  map a second time", second.status, GNTST_okay);
    check_eq("  another handle", second.handle != m.handle, 1);
    check_eq("  unmap the first", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  the entry still says reading", table[FIRST_REF].flags, GTF_permit_access | GTF_reading);
    check_eq("  unmap the second", grant_unmap(second.handle, va + PAGE_SIZE, 0), GNTST_okay);
    check_eq("  the entry says neither", table[FIRST_REF].flags, GTF_permit_access);

    print("# wrong maps\n");
    grant(FIRST_REF + 1, va_to_mfn(page), GTF_permit_access | GTF_readonly);
    check_eq("  a read-only grant mapped writable", grant_map(FIRST_REF + 1, va, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  its entry is as it was", table[FIRST_REF + 1].flags, GTF_permit_access | GTF_readonly);
    check_eq("  a reference that grants nothing", grant_map(FIRST_REF + 2, va, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  a reference beyond the table", grant_map(1000000, va, GNTMAP_host_map, self).status, GNTST_bad_gntref);
    check_eq("  a reference that is not for us", grant_map(0, va, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  a domain that does not exist", grant_map(FIRST_REF, va, GNTMAP_host_map, 999).status, GNTST_bad_domain);
    check_eq("  DOMID_SELF", grant_map(FIRST_REF, va, GNTMAP_host_map, DOMID_SELF).status, GNTST_bad_domain);
    check_eq("  neither a host nor a device map", grant_map(FIRST_REF, va, 0, self).status, GNTST_bad_gntref);
    check_eq("  an address without page tables", grant_map(FIRST_REF, WILD, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  an address of Xen's", grant_map(FIRST_REF, 0xffff830000000000, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  the entry is as it was", table[FIRST_REF].flags, GTF_permit_access);
    grant(FIRST_REF + 3, foreign_mfn(), GTF_permit_access);
    check_eq("  a frame that is not the granter's", grant_map(FIRST_REF + 3, va, GNTMAP_host_map, self).status, GNTST_bad_page);
    grant(FIRST_REF + 4, va_to_mfn(region.t1), GTF_permit_access);
    check_eq("  a page table, writable", grant_map(FIRST_REF + 4, va, GNTMAP_host_map, self).status, GNTST_general_error);
    m = grant_map(FIRST_REF + 4, va, GNTMAP_host_map | GNTMAP_readonly, self);
    check_eq("  a page table, read-only", m.status, GNTST_okay);
    check_eq("  unmap", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  unmap of a handle that never was", grant_unmap(12345, va, 0), GNTST_bad_handle);
    check_eq("  unmap of a handle beyond all", grant_unmap(0xffffffff, va, 0), GNTST_bad_handle);
    check_eq("  map, a wild argument", HYPERCALL(HC_grant_table_op, GNTTABOP_map_grant_ref, WILD, 1), -EFAULT);
    check_eq("  map of none", HYPERCALL(HC_grant_table_op, GNTTABOP_map_grant_ref, WILD, 0), 0);
    check_eq("  an unknown operation", HYPERCALL(HC_grant_table_op, 99, &m, 1), -ENOSYS);
}

static void copying(void)
{
    u8 *from = page_alloc(), *to = page_alloc();
    for (int i = 0; i < 4096; i++)
        from[i] = (u8)(i * 7);
    struct grant_end source = {FIRST_REF + 5, self, 0}, dest = {va_to_mfn(to), DOMID_SELF, 0};
    print("# copy\n");
    grant(FIRST_REF + 5, va_to_mfn(from), GTF_permit_access | GTF_readonly);
    check_eq("  from a grant to a page of ours", grant_copy(source, dest, 4096, GNTCOPY_source_gref), GNTST_okay);
    check_eq("  it copied", memcmp(from, to, 4096), 0);
    memset(to, 0, 4096);
    source.offset = 100, dest.offset = 200;
    check_eq("  a part", grant_copy(source, dest, 50, GNTCOPY_source_gref), GNTST_okay);
    check_eq("  it copied that", memcmp(from + 100, to + 200, 50), 0);
    check_eq("  and nothing else", to[199] | to[250], 0);
    check_eq("  the entry is as it was", table[FIRST_REF + 5].flags, GTF_permit_access | GTF_readonly);
    struct grant_end from_mfn = {va_to_mfn(to), DOMID_SELF, 0}, to_ref = {FIRST_REF, self, 0};
    grant(FIRST_REF, va_to_mfn(page), GTF_permit_access);
    check_eq("  from a page of ours to a grant", grant_copy(from_mfn, to_ref, 4096, GNTCOPY_dest_gref), GNTST_okay);
    check_eq("  it copied", memcmp(to, page, 4096), 0);
    to_ref.ref_or_mfn = FIRST_REF + 5;
    check_eq("  to a read-only grant", grant_copy(from_mfn, to_ref, 64, GNTCOPY_dest_gref), GNTST_general_error);
    source.offset = 4000;
    check_eq("  over the end of the source", grant_copy(source, dest, 200, GNTCOPY_source_gref), GNTST_bad_copy_arg);
    source.offset = 0, dest.offset = 4095;
    check_eq("  over the end of the destination", grant_copy(source, dest, 2, GNTCOPY_source_gref), GNTST_bad_copy_arg);
    dest.offset = 0;
    source.ref_or_mfn = FIRST_REF + 2;
    check_eq("  a reference that grants nothing", grant_copy(source, dest, 64, GNTCOPY_source_gref), GNTST_general_error);
    source.ref_or_mfn = 1000000;
    check_eq("  a reference beyond the table", grant_copy(source, dest, 64, GNTCOPY_source_gref), GNTST_bad_gntref);
    source = (struct grant_end){foreign_mfn(), DOMID_SELF, 0};
    check_eq("  a frame that is not ours", grant_copy(source, dest, 64, 0), GNTST_bad_page);
    source = (struct grant_end){va_to_mfn(from), DOMID_SELF, 0};
    dest.ref_or_mfn = va_to_mfn(region.t1);
    check_eq("  to a page table", grant_copy(source, dest, 64, 0), GNTST_general_error);
    dest = (struct grant_end){va_to_mfn(to), 999, 0};
    check_eq("  to a domain that does not exist", grant_copy(source, dest, 64, GNTCOPY_dest_gref), GNTST_bad_domain);
    dest = (struct grant_end){va_to_mfn(to), 0, 0};
    check_eq("  to domain 0 without a grant", grant_copy(source, dest, 64, 0), GNTST_permission_denied);
}

int main(void)
{
    traps_install();
    region = region_build(32);
    the_table();
    mapping();
    copying();
    memset(page, 0, PAGE_SIZE);
    set_read_only(page);
    check_eq("no reference was left at the granted page: it can be a page table", mmuext(MMUEXT_PIN_L1_TABLE, va_to_mfn(page), 0), 0);
    check_eq("unpin", mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(page), 0), 0);
    check_eq("the tables go", region_take_down(&region), 0);
    return 0;
}
