/*
 * Grant table version 2: entries of 16 bytes, status frames, parts of a page, grants of grants; and mappings for devices
 * (public grant_table.h). Everything is granted by us to ourselves. `cost=N`: N of each instead, and how long they took.
 */
#include "events.h"

#include "grants.h"
#include "paging.h"
#include "timing.h"
#include "traps.h"

#define GTF_transitive 3
#define GTF_sub_page 0x100

#define WILD_ADDRESS 0x700000000000ul

union entry_v2 {
    struct {
        u16 flags, domid;
    } hdr;
    struct {
        u16 flags, domid;
        u32 pad;
        u64 frame;
    } full;
    struct {
        u16 flags, domid, offset, length;
        u64 frame;
    } sub;
    struct {
        u16 flags, domid, trans_domid, pad;
        u32 gref;
    } transitive;
};

static u8 table_window[PAGE_SIZE] PAGE_ALIGNED, status_window[PAGE_SIZE] PAGE_ALIGNED;
static volatile struct grant *v1 = (void *)table_window;
static volatile union entry_v2 *v2 = (void *)table_window;
static volatile u16 *status = (void *)status_window;
static u16 self;
static struct region region;
static u8 *page;
static u64 status_frame;

static long version_op(u32 op, u32 *version)
{
    struct {
        u16 dom;
        u32 version;
    } get = {DOMID_SELF, 0};
    long result = op == GNTTABOP_set_version ? HYPERCALL(HC_grant_table_op, op, version, 1) : HYPERCALL(HC_grant_table_op, op, &get, 1);
    if (op == GNTTABOP_get_version)
        *version = get.version;
    return result;
}

static long set_version(u32 version)
{
    return version_op(GNTTABOP_set_version, &version);
}

static u32 get_version(void)
{
    u32 version = 99;
    version_op(GNTTABOP_get_version, &version);
    return version;
}

static s16 status_frames(u16 dom, u32 count, u64 *list)
{
    struct {
        u32 count;
        u16 dom;
        s16 status;
        u64 *list;
    } op = {count, dom, 99, list};
    HYPERCALL(HC_grant_table_op, GNTTABOP_get_status_frames, &op, 1);
    return op.status;
}

static void grant(u32 ref, u16 flags, u64 frame)
{
    v2[ref].full.domid = self;
    v2[ref].full.frame = frame;
    barrier();
    v2[ref].full.flags = flags;
}

static void changing_over(void)
{
    u64 frame = 0, frames[8] = {0};
    struct grant_setup setup = {DOMID_SELF, 1, 99, &frame};
    print("# the version changes\n");
    check_eq("  setup_table", HYPERCALL(HC_grant_table_op, GNTTABOP_setup_table, &setup, 1) | setup.status, 0);
    check_eq("  map the table", update_va(table_window, frame << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), 0);
    check_eq("  it is version 1", get_version(), 1);
    check_eq("  which has no status frames", status_frames(DOMID_SELF, 1, frames), GNTST_general_error);
    check_eq("  nor none", status_frames(DOMID_SELF, 0, frames), GNTST_okay);
    check_eq("  set_version 1", set_version(1), 0);
    check_eq("  set_version 3", set_version(3), -EINVAL);
    check_eq("  set_version 0", set_version(0), -EINVAL);
    page = page_alloc();
    v1[FIRST_REF].domid = self, v1[FIRST_REF].frame = (u32)va_to_mfn(page);
    barrier();
    v1[FIRST_REF].flags = GTF_permit_access;
    struct grant_map m = grant_map(FIRST_REF, region.base, GNTMAP_host_map, self);
    check_eq("  while a grant is mapped", set_version(2), -EBUSY);
    check_eq("  unmap", grant_unmap(m.handle, region.base, 0), GNTST_okay);
    u16 console_flags = v1[0].flags;
    check_eq("  the console's entry in version 1", console_flags & 3, GTF_permit_access);
    check_eq("  set_version 2", set_version(2), 0);
    check_eq("  it is version 2", get_version(), 2);
    check_eq("  set_version 2 again", set_version(2), 0);
    check_eq("  entries of ours are gone", v2[FIRST_REF].hdr.flags | v2[FIRST_REF / 2].hdr.flags, 0);
    check_eq("  the console's is there", v2[0].full.flags, GTF_permit_access);
    check_eq("  with its frame", (long)v2[0].full.frame, (long)start_info->console_mfn);
    check_eq("  the store's too", (long)v2[1].full.frame, (long)start_info->store_mfn);
    check_eq("  more status frames than there are", status_frames(DOMID_SELF, 8, frames), GNTST_general_error);
    check_eq("  a wild list", status_frames(DOMID_SELF, 1, (u64 *)WILD_ADDRESS), GNTST_bad_virt_addr);
    check_eq("  domain 0's", status_frames(0, 1, frames), GNTST_permission_denied);
    check_eq("  of a domain that does not exist", status_frames(999, 1, frames), GNTST_bad_domain);
    check_eq("  one status frame", status_frames(DOMID_SELF, 1, frames), GNTST_okay);
    status_frame = frames[0];
    check_eq("  map it writable", update_va(status_window, status_frame << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), 0);
    check_eq("  the console's entry is in use there", status[0] & (GTF_reading | GTF_writing), console_flags & (GTF_reading | GTF_writing));
}

static void mapping(void)
{
    u64 va = region.base;
    volatile u8 *there = (u8 *)va;
    print("# map and unmap\n");
    page[7] = 0x77;
    grant(FIRST_REF, GTF_permit_access, va_to_mfn(page));
    struct grant_map m = grant_map(FIRST_REF, va, GNTMAP_host_map, self);
    check_eq("  map", m.status, GNTST_okay);
    check_eq("  the page is there", there[7], 0x77);
    check_eq("  its status says reading and writing", status[FIRST_REF], GTF_reading | GTF_writing);
    check_eq("  the entry is as it was", v2[FIRST_REF].hdr.flags, GTF_permit_access);
    check_eq("  set_version 1 meanwhile", set_version(1), -EBUSY);
    check_eq("  unmap", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  its status says neither", status[FIRST_REF], 0);
    m = grant_map(FIRST_REF, va, GNTMAP_host_map | GNTMAP_readonly, self);
    check_eq("  map read-only", m.status | status[FIRST_REF], GTF_reading);
    check_eq("  unmap", grant_unmap(m.handle, va, 0), GNTST_okay);
    grant(FIRST_REF + 1, GTF_permit_access | GTF_readonly, va_to_mfn(page));
    check_eq("  a read-only grant mapped writable", grant_map(FIRST_REF + 1, va, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  leaves no trace", status[FIRST_REF + 1], 0);
    grant(FIRST_REF + 2, GTF_permit_access | GTF_sub_page, va_to_mfn(page));
    check_eq("  a part of a page cannot be mapped", grant_map(FIRST_REF + 2, va, GNTMAP_host_map, self).status, GNTST_general_error);
    grant(FIRST_REF + 2, GTF_transitive, va_to_mfn(page));
    check_eq("  nor a grant of a grant", grant_map(FIRST_REF + 2, va, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  the last reference of a frame", grant_map(255, va, GNTMAP_host_map, self).status, GNTST_general_error);
    check_eq("  one beyond it", grant_map(256, va, GNTMAP_host_map, self).status, GNTST_bad_gntref);
}

static void copying(void)
{
    u8 *from = page_alloc(), *to = page_alloc();
    for (int i = 0; i < 4096; i++)
        from[i] = (u8)(i * 7);
    memset(to, 0, PAGE_SIZE);
    struct grant_end source = {FIRST_REF + 3, self, 0}, dest = {va_to_mfn(to), DOMID_SELF, 0};
    print("# copy\n");
    grant(FIRST_REF + 3, GTF_permit_access | GTF_readonly, va_to_mfn(from));
    check_eq("  a whole page", grant_copy(source, dest, 4096, GNTCOPY_source_gref), GNTST_okay);
    check_eq("  it copied", memcmp(from, to, 4096), 0);
    check_eq("  its status says nothing afterwards", status[FIRST_REF + 3], 0);
    v2[FIRST_REF + 4].sub.domid = self, v2[FIRST_REF + 4].sub.frame = va_to_mfn(from);
    v2[FIRST_REF + 4].sub.offset = 100, v2[FIRST_REF + 4].sub.length = 50;
    v2[FIRST_REF + 4].sub.flags = GTF_permit_access | GTF_sub_page;
    source.ref_or_mfn = FIRST_REF + 4, source.offset = 100;
    memset(to, 0, PAGE_SIZE);
    check_eq("  a part that is granted", grant_copy(source, dest, 50, GNTCOPY_source_gref), GNTST_okay);
    check_eq("  it copied", memcmp(from + 100, to, 50) | to[50], 0);
    check_eq("  a byte more", grant_copy(source, dest, 51, GNTCOPY_source_gref), GNTST_general_error);
    source.offset = 99;
    check_eq("  a byte before", grant_copy(source, dest, 2, GNTCOPY_source_gref), GNTST_general_error);
    v2[FIRST_REF + 4].sub.offset = 4000, v2[FIRST_REF + 4].sub.length = 4000;
    source.offset = 4000;
    check_eq("  a part that ends behind its page", grant_copy(source, dest, 96, GNTCOPY_source_gref), GNTST_okay);
    check_eq("  as far as the page goes", grant_copy(source, dest, 97, GNTCOPY_source_gref), GNTST_bad_copy_arg);
    source.offset = 0;

    v2[FIRST_REF + 5].transitive.domid = self, v2[FIRST_REF + 5].transitive.trans_domid = self;
    v2[FIRST_REF + 5].transitive.gref = FIRST_REF + 3;
    v2[FIRST_REF + 5].hdr.flags = GTF_transitive;
    source.ref_or_mfn = FIRST_REF + 5;
    check_eq("  a grant of our own grant", grant_copy(source, dest, 64, GNTCOPY_source_gref), GNTST_general_error);
    check_eq("  leaves no trace", status[FIRST_REF + 5], 0);
    v2[FIRST_REF + 5].transitive.trans_domid = 999;
    check_eq("  a grant of a domain's that does not exist", grant_copy(source, dest, 64, GNTCOPY_source_gref), GNTST_general_error);
    v2[FIRST_REF + 5].transitive.trans_domid = 0;
    check_eq("  a grant of domain 0's that is none", grant_copy(source, dest, 64, GNTCOPY_source_gref), GNTST_general_error);
    v2[FIRST_REF + 5].transitive.gref = 100000000;
    check_eq("  one that cannot be", grant_copy(source, dest, 64, GNTCOPY_source_gref), GNTST_bad_gntref);
    check_eq("  no trace of any", status[FIRST_REF + 5], 0);
    struct grant_end from_mfn = {va_to_mfn(to), DOMID_SELF, 100}, to_ref = {FIRST_REF + 4, self, 4000};
    check_eq("  to a part", grant_copy(from_mfn, to_ref, 96, GNTCOPY_dest_gref), GNTST_okay);
    check_eq("  it copied", memcmp(from + 4000, to + 100, 96), 0);
}

static void swapping(void)
{
    struct {
        u32 a, b;
        s16 status;
    } op = {FIRST_REF + 3, FIRST_REF + 4, 99};
    print("# swap\n");
    u64 frame = v2[FIRST_REF + 3].full.frame;
    HYPERCALL(HC_grant_table_op, GNTTABOP_swap_grant_ref, &op, 1);
    check_eq("  two entries", op.status, GNTST_okay);
    check_eq("  all of them", v2[FIRST_REF + 4].full.frame == frame && v2[FIRST_REF + 3].sub.length == 4000, 1);
}

static void devices(void)
{
    u64 va = region.base;
    print("# device mappings\n");
    struct grant_map m = grant_map(FIRST_REF, va, GNTMAP_host_map | GNTMAP_device_map, self);
    check_eq("  with a host mapping", m.status, GNTST_okay);
    check_eq("  unmap of the host's alone", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  it is still in use", status[FIRST_REF], GTF_reading | GTF_writing);
    check_eq("  unmap of the host's again", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  unmap of the device's with another address", grant_unmap(m.handle, 0, m.dev_bus_addr + PAGE_SIZE), GNTST_bad_dev_addr);
    check_eq("  unmap of the device's", grant_unmap(m.handle, 0, m.dev_bus_addr), GNTST_okay);
    check_eq("  it is not in use any more", status[FIRST_REF], 0);
    check_eq("  the handle is gone", grant_unmap(m.handle, 0, m.dev_bus_addr), GNTST_bad_handle);
    m = grant_map(FIRST_REF, va, GNTMAP_host_map | GNTMAP_device_map | GNTMAP_readonly, self);
    check_eq("  both at once", m.status, GNTST_okay);
    check_eq("  unmap with a wrong device address", grant_unmap(m.handle, va, m.dev_bus_addr + 8), GNTST_bad_dev_addr);
    check_eq("  unmap of both", grant_unmap(m.handle, va, m.dev_bus_addr), GNTST_okay);
    check_eq("  nothing is in use", status[FIRST_REF], 0);
    m = grant_map(FIRST_REF, WILD_ADDRESS, GNTMAP_device_map, self);
    check_eq("  without a host mapping", m.status, GNTST_okay);
    check_eq("  which has an address", m.dev_bus_addr != 0, 1);
    check_eq("  unmap of nothing", grant_unmap(m.handle, 0, 0), GNTST_okay);
    check_eq("  unmap of a host mapping that is not there", grant_unmap(m.handle, va, 0), GNTST_okay);
    check_eq("  it is in use", status[FIRST_REF], GTF_reading | GTF_writing);
    check_eq("  unmap", grant_unmap(m.handle, 0, m.dev_bus_addr), GNTST_okay);
    m = grant_map(FIRST_REF, va, GNTMAP_host_map, self);
    check_eq("  a device address for a host mapping is not looked at", grant_unmap(m.handle, va, 0x123000), GNTST_okay);
}

static void domain0(void)
{
    u64 va = region.base;
    print("# domain 0's table\n");
    check_eq("  a reference that grants nothing", grant_map(500, va, GNTMAP_host_map, 0).status, GNTST_general_error);
    check_eq("  a reference beyond all", grant_map(100000000, va, GNTMAP_host_map, 0).status, GNTST_bad_gntref);
}

static void physmap(void)
{
    struct {
        u16 dom, size;
        u32 space;
        u64 idx, gpfn;
    } op = {DOMID_SELF, 0, 1, 0, 100};
    print("# XENMEM_add_to_physmap is not for us\n");
    check_eq("  a grant frame", HYPERCALL(HC_memory_op, 7, &op), -EACCES);
    op.idx = 1ul << 63;
    check_eq("  a status frame", HYPERCALL(HC_memory_op, 7, &op), -EACCES);
    op.dom = 999;
    check_eq("  of a domain that does not exist", HYPERCALL(HC_memory_op, 7, &op), -ESRCH);
    check_eq("  a wild argument", HYPERCALL(HC_memory_op, 7, WILD_ADDRESS), -EFAULT);
}

static void changing_back(void)
{
    print("# back to version 1\n");
    check_eq("  set_version 1 while its status frame is mapped", set_version(1), -EBUSY);
    update_va(status_window, 0, UVMF_INVLPG);
    check_eq("  and when it is not", set_version(1), 0);
    check_eq("  it is version 1", get_version(), 1);
    check_eq("  the console's entry is there", v1[0].flags & 3, GTF_permit_access);
    check_eq("  with its frame", v1[0].frame, (long)start_info->console_mfn);
    check_eq("  ours are gone", v1[FIRST_REF].flags, 0);
    check_eq("  and so is the status frame", update_va(status_window, status_frame << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG) < 0, 1);
    v1[1].flags = 0x55;
    check_eq("  set_version 2 once more", set_version(2), 0);
    check_eq("  whatever an entry says", v2[1].hdr.flags, 0x45);
}

#define BATCH 32
/* ns for each of `count` maps, unmaps and copies of a page, by entries of version 1. */
static void costs(u64 count)
{
    static struct grant_map maps[BATCH];
    static struct grant_unmap unmaps[BATCH];
    static struct grant_copy copies[BATCH];
    u64 mapping = 0, unmapping = 0, copying_ns = 0, wrong = 0;
    check(grants_open(), "the table is there");
    u8 *to = page_alloc();
    for (u32 i = 0; i < BATCH; i++)
        grant_to(FIRST_REF + i, self, va_to_mfn(page_alloc()), 0);
    for (u64 done = 0; done < count; done += BATCH) {
        for (u32 i = 0; i < BATCH; i++)
            maps[i] = (struct grant_map){region.base + i * PAGE_SIZE, GNTMAP_host_map, FIRST_REF + i, self, 99, 0, 0};
        u64 begin = now_ns();
        HYPERCALL(HC_grant_table_op, GNTTABOP_map_grant_ref, maps, BATCH);
        mapping += now_ns() - begin;
        for (u32 i = 0; i < BATCH; i++) {
            wrong += maps[i].status != GNTST_okay;
            unmaps[i].host_addr = maps[i].host_addr, unmaps[i].dev_bus_addr = 0, unmaps[i].handle = maps[i].handle;
        }
        begin = now_ns();
        HYPERCALL(HC_grant_table_op, GNTTABOP_unmap_grant_ref, unmaps, BATCH);
        unmapping += now_ns() - begin;
        for (u32 i = 0; i < BATCH; i++) {
            wrong += unmaps[i].status != GNTST_okay;
            copies[i].source = (struct grant_end){FIRST_REF + i, self, 0}, copies[i].dest = (struct grant_end){va_to_mfn(to), DOMID_SELF, 0};
            copies[i].len = PAGE_SIZE, copies[i].flags = GNTCOPY_source_gref;
        }
        begin = now_ns();
        HYPERCALL(HC_grant_table_op, GNTTABOP_copy, copies, BATCH);
        copying_ns += now_ns() - begin;
        for (u32 i = 0; i < BATCH; i++)
            wrong += copies[i].status != GNTST_okay;
    }
    print("cost map %lu unmap %lu copy %lu\n", mapping / count, unmapping / count, copying_ns / count);
    check_eq("all were carried out", (long)wrong, 0);
}

int main(void)
{
    traps_install();
    region = region_build(32);
    self = own_domid();
    if (option_value("cost", 0)) {
        costs(option_value("cost", 0));
        return 0;
    }
    changing_over();
    mapping();
    copying();
    swapping();
    devices();
    domain0();
    physmap();
    changing_back();
    return 0;
}
