/*
 * Random hypercalls with random arguments, half of them structured so that they get past the first
 * check. Afterwards the kernel must be sane: its image unchanged, faults and events delivered, page
 * tables obeyed. Reproducible: xorshift64*, seeded from the command line (seed=S calls=N).
 *
 * What a call may do is limited only so that the guest does not end itself, for Xen lets a guest do
 * that in many ways: no shutdown, no waiting, no iret, no closing of the console, no writes to its own
 * image or page tables by machine address. All that Xen may write goes to the arena and the scratch
 * pages. Faults would be fatal (the trap table is garbage in between), so upcalls stay masked.
 */
#include "events.h"
#include "paging.h"
#include "timing.h"
#include "traps.h"

#define WILD 0x700000000000ul
#define ARENA_PAGES 24
#define SCRATCH_WORDS 64

static struct region region;
static u8 *arena[ARENA_PAGES];   /* frames to be abused in every way */
static u64 arena_mfn[ARENA_PAGES];
static u64 *scratch;             /* arguments; the page behind it is not mapped */
static u64 *read_only;           /* a page that no result may appear in */
static u64 least_mfn, greatest_mfn, foreign, m2p_mfn, l4_mfn, m2p_address;
static u64 state;

static u64 next(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
}

static u64 below(u64 bound) { return (next() >> 33) % bound; }
static bool one_in(u64 n) { return below(n) == 0; }
static u64 arena_frame(void) { return arena_mfn[below(ARENA_PAGES)]; }

static bool is_arena(u64 mfn)
{
    for (int i = 0; i < ARENA_PAGES; i++)
        if (arena_mfn[i] == mfn)
            return true;
    return false;
}

/* Would this word, read as an mfn or as a machine address, name a frame of the kernel's own? */
static bool names_the_kernel(u64 word)
{
    u64 mfns[2] = {word, PTE_MFN(word)};
    for (int i = 0; i < 2; i++)
        if (mfns[i] >= least_mfn && mfns[i] <= greatest_mfn && !is_arena(mfns[i]))
            return true;
    return false;
}

static u64 any_mfn(void)
{
    switch (below(8)) {
    case 0: return foreign;
    case 1: return m2p_mfn;
    case 2: return ~0ul >> below(64);
    case 3: return next() >> 24;
    default: return arena_frame();
    }
}

static u64 random_address(void)
{
    switch (below(12)) {
    case 0: return 0;
    case 1: return WILD;
    case 2: return 0xffff830000000000 + below(1ul << 31);
    case 3: return m2p_address + below(4096);
    case 4: return 1ul << 63;
    case 5: return ~0ul - below(4096);
    case 6: return (u64)scratch + PAGE_SIZE - below(128); /* runs into the hole */
    case 7: return (u64)read_only + below(4096 - 64); /* no array's first answer is behind it: those end the guest */
    case 8: return region.base + below(4) * PAGE_SIZE + below(64);
    default: return (u64)scratch + 8 * below(8);
    }
}

static u64 bad_address(void) { return (u64[]){0, WILD, 0xffff830000000000, 1ul << 63, ~0ul}[below(5)]; }

/* Where the page-table operations may put things: never the kernel's own half. */
static u64 random_target_address(void)
{
    switch (below(6)) {
    case 0: return next();
    case 1: return 0xffff800000000000 + (next() >> 17);
    case 2: return WILD;
    default: return region.base + (1 + below(500)) * PAGE_SIZE + (one_in(8) ? below(4096) : 0);
    }
}

static u64 random_entry(void)
{
    u64 flags = one_in(4) ? next() & 0xfff : (u64[]){PTE_KERNEL, PTE_KERNEL_RO, PTE_TABLE, 0}[below(4)];
    if (one_in(8))
        flags |= 1ul << (52 + below(12));
    u64 mfn = one_in(6) ? l4_mfn : one_in(6) ? va_to_mfn(region.t2) : any_mfn();
    return (mfn & 0xffffffffff) << PAGE_SHIFT | flags;
}

static u64 random_word(void)
{
    switch (below(10)) {
    case 0: return next();
    case 1: return next() >> below(64);
    case 2: return random_address();
    case 3: return random_entry();
    case 4: return any_mfn();
    case 5: return ~below(64);
    case 6: return 1ul << below(64);
    case 7: return DOMID_SELF;
    default: return below(40);
    }
}

/* Where a page-table entry may be written: our region's tables, the arena, or what is not ours at all. */
static u64 random_entry_address(void)
{
    u64 *tables[] = {region.t1 + 1, region.t2 + 1, region.t3 + 1};
    switch (below(8)) {
    case 0: return machine_address(region.l4 + 33 + below(6)) | below(8);
    case 1: return machine_address(region.l4 + 256 + below(16)) | below(8);
    case 2: return (any_mfn() & 0xffffffffff) << PAGE_SHIFT | below(4096);
    case 3: return (any_mfn() & 0xffffffffff) << PAGE_SHIFT | MMU_MACHPHYS_UPDATE;
    case 4: return arena_frame() << PAGE_SHIFT | (below(512) * 8);
    default: return machine_address(tables[below(3)] + below(511)) | (one_in(4) ? below(4) : 0);
    }
}

/* Random words in the scratch page, none of which names a frame of the kernel's, nor its two ports. */
static void fill_scratch(void)
{
    for (u64 i = 0; i < SCRATCH_WORDS; i++) {
        u64 word = random_word();
        if (names_the_kernel(word))
            word = WILD;
        scratch[i] = word;
        u32 *halves = (u32 *)&scratch[i];
        for (int half = 0; half < 2; half++)
            if (halves[half] == start_info->console_evtchn || halves[half] == start_info->store_evtchn)
                halves[half] += 64;
    }
}

struct call {
    u64 number, args[5];
};

static struct call structured(void);

static struct call mmu_updates(void)
{
    u64 count = 1 + below(6);
    for (u64 i = 0; i < count; i++) {
        scratch[2 * i] = random_entry_address();
        scratch[2 * i + 1] = random_entry();
    }
    memset(scratch + 2 * count, 0, (SCRATCH_WORDS - 2 * count) * 8);
    return (struct call){HC_mmu_update, {(u64)scratch, one_in(10) ? random_word() : count, one_in(3) ? random_address() : 0,
                                         one_in(10) ? random_word() : DOMID_SELF}};
}

static struct call mmuext_ops(void)
{
    u64 count = 1 + below(4);
    for (u64 i = 0; i < count; i++) {
        u64 cmd = below(22);
        scratch[3 * i] = cmd;
        /* The base pointer may not become an empty L4 of the arena's: that would be the end. */
        scratch[3 * i + 1] = cmd == MMUEXT_NEW_BASEPTR ? (one_in(2) ? l4_mfn : foreign)
                           : cmd == MMUEXT_SET_LDT     ? random_target_address()
                           : cmd >= MMUEXT_TLB_FLUSH_LOCAL && cmd < MMUEXT_SET_LDT ? random_address()
                                                       : any_mfn();
        scratch[3 * i + 2] = cmd == MMUEXT_COPY_PAGE ? any_mfn() : random_word();
    }
    memset(scratch + 3 * count, 0xff, (SCRATCH_WORDS - 3 * count) * 8);
    return (struct call){HC_mmuext_op, {(u64)scratch, one_in(10) ? random_word() : count, one_in(3) ? random_address() : 0,
                                        one_in(10) ? random_word() : DOMID_SELF}};
}

static struct call reservations(void)
{
    u64 *list = scratch + 16;
    fill_scratch();
    for (int i = 0; i < 8; i++)
        list[i] = one_in(2) ? arena_frame() : below(start_info->nr_pages);
    for (int i = 0; i < 8; i += 4) { /* in, and for an exchange out */
        scratch[i] = one_in(8) ? random_address() : (u64)list;
        scratch[i + 1] = one_in(8) ? random_word() : below(4);
        scratch[i + 2] = one_in(8) ? random_word() : 0;
        scratch[i + 3] = one_in(8) ? random_word() : DOMID_SELF;
    }
    scratch[8] = one_in(4) ? random_word() : 0;
    for (int i = 16; i < 24; i++)
        if (names_the_kernel(list[i - 16]))
            list[i - 16] = arena_frame();
    u64 command = one_in(8) ? random_word() : below(30);
    return (struct call){HC_memory_op, {command, (u64)scratch}};
}

static struct call grant_operations(void)
{
    static const u64 sizes[] = {4, 3, 2, 1, 3, 5, 2, 4, 1, 2, 1, 1, 3};
    u64 op = below(13), count = 1 + below(3);
    fill_scratch();
    if (op == 0) /* map_grant_ref: where, how, which reference, whose */
        for (u64 i = 0; i < count; i++) {
            scratch[4 * i] = random_target_address();
            scratch[4 * i + 1] = below(32) | below(16) << 32;
            scratch[4 * i + 2] = one_in(4) ? random_word() : below(4);
        }
    if (op == 1 || op == 7)
        for (u64 i = 0; i < count * sizes[op]; i += sizes[op])
            scratch[i] = random_target_address(), scratch[i + 1] = op == 7 ? random_target_address() : 0;
    return (struct call){HC_grant_table_op, {op, (u64)scratch, count}};
}

static bool would_lose_the_console(u64 op)
{
    return (u32)op == EVTCHNOP_reset || (u32)op == EVTCHNOP_reset_cont || (u32)op == EVTCHNOP_init_control;
}

static struct call event_operations(void)
{
    u64 op = below(16);
    fill_scratch();
    if (would_lose_the_console(op))
        op = 99;
    for (int i = 0; i < 2; i++)
        if (one_in(2))
            scratch[i] = 4 + below(60) + (below(60) << 32) + (4ul << 32);
    return (struct call){HC_event_channel_op, {op, one_in(10) ? bad_address() : (u64)scratch}};
}

static struct call one_of_a_kind(void)
{
    struct call c = {0, {random_address(), random_word(), random_word(), random_word(), random_word()}};
    fill_scratch();
    switch (below(14)) {
    case 0: c.number = HC_update_va_mapping, c.args[0] = random_target_address(), c.args[1] = random_entry(), c.args[2] = one_in(3) ? random_word() : below(8); break;
    case 1: c.number = HC_update_va_mapping_otherdomain, c.args[0] = random_target_address(), c.args[1] = random_entry(), c.args[2] = below(8); break;
    case 2: c.number = HC_update_va_mapping, c.args[0] = (u64)arena[below(ARENA_PAGES)], c.args[1] = entry((void *)c.args[0], one_in(2) ? PTE_KERNEL : PTE_KERNEL_RO), c.args[2] = UVMF_INVLPG | UVMF_ALL; break;
    case 3: c.number = HC_update_descriptor, c.args[0] = any_mfn() << PAGE_SHIFT | below(4096), c.args[1] = next() | below(2) << 47; break;
    case 4: c.number = HC_set_gdt, c.args[1] = one_in(2) ? below(600) : random_word(); for (int i = 0; i < 14; i++) scratch[i] = arena_frame(); break;
    case 5: c.number = HC_vcpu_op, c.args[0] = below(16), c.args[1] = one_in(4) ? random_word() : 0, c.args[2] = random_address();
        if (c.args[0] == VCPUOP_down || c.args[0] == VCPUOP_register_vcpu_info || c.args[0] == VCPUOP_send_nmi)
            c.args[0] = 99;
        break;
    case 6: c.number = HC_set_debugreg, c.args[0] = below(4); break;
    case 7: c.number = HC_sched_op, c.args[0] = one_in(2) ? SCHEDOP_yield : SCHEDOP_watchdog + 1 + below(100); break;
    case 8: c.number = HC_physdev_op, c.args[0] = below(34), c.args[1] = random_address(); break;
    case 9: c.number = HC_console_io, c.args[0] = 1 + below(10), c.args[2] = random_address(); break;
    case 10: c.number = HC_set_timer_op; break;
    case 11: c.number = HC_xen_version, c.args[0] = below(14), c.args[1] = random_address(); break;
    case 12: c.number = HC_callback_op, c.args[0] = below(4), c.args[1] = random_address(); break;
    default: c.number = HC_vm_assist, c.args[0] = below(3), c.args[1] = below(10); break;
    }
    return c;
}

static struct call several(void)
{
    struct {
        u64 op, result, args[6];
    } *list = (void *)(scratch + SCRATCH_WORDS);
    u64 count = 1 + below(5);
    memset(list, 0xff, PAGE_SIZE - SCRATCH_WORDS * 8); /* hypercalls that do not exist */
    for (u64 i = 0; i < count; i++) {
        struct call c = one_of_a_kind();
        list[i].op = c.number;
        memcpy(list[i].args, c.args, sizeof c.args);
    }
    return (struct call){HC_multicall, {(u64)list, one_in(6) ? random_word() : count}};
}

static struct call structured(void)
{
    switch (below(10)) {
    case 0: case 1: case 2: return mmu_updates();
    case 3: case 4: return mmuext_ops();
    case 5: return reservations();
    case 6: return grant_operations();
    case 7: return event_operations();
    case 8: return several();
    default: return one_of_a_kind();
    }
}

/* Any hypercall at all, with garbage. The few that are excluded or bent would end the guest. */
static struct call garbage(void)
{
    struct call c = {one_in(10) ? next() >> below(64) : below(64), {0}};
    fill_scratch();
    for (int i = 0; i < 5; i++)
        c.args[i] = one_in(3) ? random_address() : random_word();
    switch ((u32)c.number) {
    case HC_iret: case HC_sched_op_compat:
        c.number = 63;
        break;
    case HC_multicall: /* the list must not be scratch: it would be hypercalls that nothing has looked at */
        c.args[0] = one_in(2) ? WILD : 0xffff830000000000;
        break;
    case HC_mmu_update: case HC_mmuext_op: case HC_memory_op: case HC_set_gdt: case HC_grant_table_op:
        break;
    case HC_update_va_mapping: case HC_update_va_mapping_otherdomain:
        c.args[0] = random_target_address();
        break;
    case HC_update_descriptor:
        if (names_the_kernel(c.args[0]))
            c.args[0] = WILD;
        break;
    case HC_event_channel_op:
        if (would_lose_the_console(c.args[0]))
            c.args[0] = 99;
        c.args[1] = one_in(2) ? bad_address() : (u64)scratch; /* words that fill_scratch has looked at */
        break;
    case HC_event_channel_op_compat:
        c.args[0] = WILD;
        break;
    case HC_sched_op:
        if ((u32)c.args[0] < 7 && (u32)c.args[0] != SCHEDOP_yield)
            c.args[0] = 99;
        break;
    case HC_vcpu_op:
        if ((u32)c.args[0] == VCPUOP_down || (u32)c.args[0] == VCPUOP_register_vcpu_info || (u32)c.args[0] == VCPUOP_send_nmi)
            c.args[0] = 99;
        break;
    case HC_set_debugreg: /* a breakpoint that is armed would fault */
        c.args[0] = 8 + below(100);
        break;
    case HC_console_io: /* it would write garbage between our lines, where it is allowed */
        c.args[0] |= 2;
        break;
    }
    return c;
}

static u64 sum(const void *from, const void *to)
{
    u64 hash = 14695981039346656037ul;
    for (const u64 *at = from; at < (const u64 *)to; at++)
        hash = (hash ^ *at) * 1099511628211ul;
    return hash;
}

static void prepare(void)
{
    region = region_build(32);
    for (int i = 0; i < ARENA_PAGES; i++) {
        arena[i] = page_alloc();
        arena_mfn[i] = va_to_mfn(arena[i]);
        if (i & 1)
            set_read_only(arena[i]);
    }
    scratch = page_alloc();
    update_va(page_alloc(), 0, UVMF_INVLPG); /* the hole behind scratch */
    read_only = page_alloc();
    memset(read_only, 0x3c, PAGE_SIZE);
    set_read_only(read_only);
    foreign = foreign_mfn();
    struct m2p m2p = machphys_mapping();
    m2p_address = m2p.v_start;
    m2p_mfn = PTE_MFN(region.l4[m2p.v_start >> 39 & 511]);
    l4_mfn = va_to_mfn(region.l4);
    least_mfn = ~0ul;
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++) {
        if (pfn_to_mfn(pfn) < least_mfn)
            least_mfn = pfn_to_mfn(pfn);
        if (pfn_to_mfn(pfn) > greatest_mfn)
            greatest_mfn = pfn_to_mfn(pfn);
    }
}

static void calls(u64 n)
{
    u64 succeeded = 0, refused = 0;
    for (u64 i = 0; i < n; i++) {
        if (n >= 10 && i % (n / 10) == 0)
            print("# %ld of %ld calls made\n", i, n);
        u64 before = state;
        struct call c = one_in(3) ? garbage() : structured();
        if (option("trace"))
            print("# %ld state %lx: %ld(%lx, %lx, %lx, %lx)\n", i, before, c.number, c.args[0], c.args[1], c.args[2], c.args[3]);
        long result = hypercall((long)c.number, (long)c.args[0], (long)c.args[1], (long)c.args[2], (long)c.args[3], (long)c.args[4]);
        if (result < 0 && result > -4096)
            refused++;
        else
            succeeded++;
    }
    print("# %ld calls succeeded, %ld were refused\n", succeeded, refused);
    check_eq("a good part succeeded", succeeded > n / 10, 1);
    check_eq("and a good part was refused", refused > n / 10, 1);
}

static void sanity(void)
{
    print("# afterwards\n");
    check_eq("set_trap_table", HYPERCALL(HC_set_trap_table, trap_table), 0);
    TRY("ud2", : : : "memory");
    check_eq("a fault comes to its handler", (long)fault.vector, VECTOR_UD);
    TRY("mov (%0), %%al", : : "r"(WILD) : "rax", "memory");
    check_eq("a page fault too", (long)fault.vector, VECTOR_PF);
    check_eq("cr2", (long)fault.cr2, (long)WILD);
    HYPERCALL(HC_vm_assist, 1, 2); /* no stores to page tables through Xen */
    TRY("movb $1, (%0)", : : "r"(region.t1) : "memory");
    check_eq("our page table is still read-only", (long)fault.vector, VECTOR_PF);
    TRY("movb $1, (%0)", : : "r"(m2p_address) : "memory");
    check_eq("so is the machine-to-physical table", (long)fault.vector, VECTOR_PF);
    u64 wrong = 0;
    for (int i = 0; i < 512; i++)
        wrong += read_only[i] != 0x3c3c3c3c3c3c3c3c;
    check_eq("nothing was written to a read-only page", (long)wrong, 0);

    u8 *page = page_alloc();
    void *va = (void *)region.base;
    page[0] = 0x66;
    check_eq("link our tables again", mmu_update(machine_address(&region.t2[0]), entry(region.t1, PTE_TABLE))
             | mmu_update(machine_address(&region.t3[0]), entry(region.t2, PTE_TABLE))
             | mmu_update(machine_address(&region.l4[32]), entry(region.t3, PTE_TABLE)), 0);
    check_eq("a page can be mapped", update_va(va, entry(page, PTE_KERNEL), UVMF_INVLPG), 0);
    check_eq("and is there", *(volatile u8 *)va, 0x66);
    check_eq("a writable mapping of a page table is refused", update_va(va, entry(region.t1, PTE_KERNEL), UVMF_INVLPG), -EBUSY);
    check_eq("a frame that is not ours is refused", update_va(va, foreign << PAGE_SHIFT | PTE_KERNEL, UVMF_INVLPG), -EBUSY);

    events_quiet();
    upcalls_install();
    long port = evtchn_bind_ipi(0);
    if (port == -ENOSPC) {
        for (u32 p = 1; p < 4096; p++)
            if (p != start_info->console_evtchn && p != start_info->store_evtchn)
                evtchn_close(p);
        port = evtchn_bind_ipi(0);
    }
    check_eq("an event channel can be made", port > 0, 1);
    evtchn_unmask((u32)port);
    upcalls_enable();
    u64 count = upcall_count;
    evtchn_send((u32)port);
    check_eq("its event comes", (long)(upcall_count - count), 1);
    upcalls_disable();
    check_eq("the console's channel is still there", evtchn_send(start_info->console_evtchn), 0);
    u64 before = now_ns();
    while (now_ns() == before)
        ;
    check_eq("time goes on", now_ns() > before, 1);
}

int main(void)
{
    extern char fixups_end[];
    traps_install();
    state = option_value("seed", 1) * 0x9e3779b97f4a7c15 | 1;
    prepare();
    u64 image = sum(image_start, fixups_end);
    calls(option_value("calls", 2000));
    sanity();
    check_eq("our code is unchanged", sum(image_start, fixups_end) == image, 1);
    return 0;
}
