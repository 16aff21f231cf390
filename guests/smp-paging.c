/*
 * Two vCPUs that change page tables and use them at the same time. vCPU 0 makes a frame a page table again and again
 * while vCPU 1 stores into it, through a mapping that it may still have in its TLB, entries that are not present and now
 * and then one that Xen must not let come into force; and both move pages about in one L1 table, each in its own half, and look at what they moved.
 *
 * Needs two vCPUs. rounds=N
 */
#include "paging.h"
#include "vcpus.h"

#define SLOT 32
#define PAGES 8
#define HALF 256
#define STORED 7 /* the word that vCPU 1 stores to */

static struct vcpu_context context;
static u8 stack1[8192] __attribute__((aligned(16)));
static struct region region;
static u8 *pages[PAGES];
static u64 hostile;
static volatile u64 up, finish, stores, faults, moved1, wrong1, failed1, done1;

void vcpu1_main(void), vcpu1_entry(void);
__asm__(".text\nvcpu1_entry: cld\n call vcpu1_main\n ud2\n");

static u8 *at(u64 page) { return (u8 *)region.base + page * PAGE_SIZE; }

/* Map one of the pages in this half of the table, by each way that there is, and look whether it is there. */
static void move_page(u64 half, u64 turn, volatile u64 *wrong, volatile u64 *failed)
{
    u64 page = half * HALF + 8 + turn % 5, which = turn % PAGES, value = entry(pages[which], PTE_KERNEL_RO);
    long status;
    if (turn % 3 == 0)
        status = update_va(at(page), value, UVMF_INVLPG);
    else {
        status = mmu_update(machine_address(&region.t1[page]), value);
        status |= turn % 3 == 1 ? mmuext(MMUEXT_INVLPG_LOCAL, (u64)at(page), 0) : mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0, 0);
    }
    *failed += status != 0;
    *wrong += *(volatile u64 *)at(page) != 0x7000 + which;
}

void vcpu1_main(void)
{
    up = 1;
    for (u64 turn = 0; !finish; turn++) {
        /* Page 0 is the frame that becomes a table: there or not, stale or not, as vCPU 0 has it now. */
        for (int i = 0; i < 100000; i += fault.vector == NO_FAULT ? 1 : 10000) {
            u64 value = ++stores % 8 ? stores << 1 : hostile;
            TRY("mov %0, (%1)", : : "r"(value), "r"(at(0) + 8 * STORED) : "memory");
            faults += fault.vector != NO_FAULT;
        }
        move_page(1, turn, &wrong1, &failed1);
        moved1++;
    }
    done1 = 1;
    for (;;)
        HYPERCALL(HC_vcpu_op, VCPUOP_down, 1, 0);
}

static u8 *copy, *spare;

/* Make a frame an L1 table, and at once a copy of it.  The operations after that give vCPU 1 time to store before this one
   comes back to the guest, and so before any flush that is left until then. */
static long pin(u64 mfn)
{
    struct mmuext_op operations[9] = {{MMUEXT_PIN_L1_TABLE, mfn, 0}, {MMUEXT_COPY_PAGE, va_to_mfn(copy), mfn}};
    for (u64 i = 2; i < LENGTH(operations); i++)
        operations[i] = (struct mmuext_op){MMUEXT_CLEAR_PAGE, va_to_mfn(spare), 0};
    return HYPERCALL(HC_mmuext_op, operations, LENGTH(operations), 0, DOMID_SELF);
}

/* Whether the frame is as it was when it became a table. */
static bool is_as_copied(u64 *frame)
{
    u64 now = *(volatile u64 *)&frame[STORED];
    return now == ((u64 *)copy)[STORED] && !(now & PTE_P);
}

/* Let vCPU 1 store so often. */
static void let_it_store(u64 count)
{
    u64 from = stores, start = now_ns();
    while (stores - from < count && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
}

int main(void)
{
    u64 rounds = option_value("rounds", 150), tables = 0, refused = 0, changed = 0, odd = 0, wrong = 0, failed = 0;
    traps_install();
    events_quiet();
    region = region_build(SLOT);
    u64 *frame = (u64 *)page_alloc();
    copy = page_alloc(), spare = page_alloc();
    for (u64 i = 0; i < PAGES; i++) {
        pages[i] = page_alloc();
        *(u64 *)pages[i] = 0x7000 + i;
    }
    hostile = foreign_mfn() << PAGE_SHIFT | PTE_KERNEL | PTE_U;
    u64 window = machine_address(&region.t1[0]);
    check_eq("map the frame for vCPU 1", mmu_update(window, entry(frame, PTE_KERNEL)), 0);
    vcpu_context_fill(&context, (u64)vcpu1_entry, stack1 + sizeof stack1);
    context.event_callback = (u64)trap_256;
    check_eq("initialise vCPU 1", vcpu_op(VCPUOP_initialise, 1, &context), 0);
    check_eq("up", vcpu_op(VCPUOP_up, 1, NULL), 0);
    check_eq("it runs", wait_until(&up, 1), 1);

    for (u64 round = 0; round < rounds; round++) {
        let_it_store(3);
        failed += mmu_update(window, 0) != 0; /* a flush is asked for in half of the rounds */
        if (round % 4 == 0)
            failed += mmuext(MMUEXT_TLB_FLUSH_ALL, 0, 0) != 0;
        *(volatile u64 *)&frame[STORED] = 0;
        failed += update_va(frame, entry(frame, PTE_KERNEL_RO), round % 4 == 1 ? UVMF_INVLPG : UVMF_NONE) != 0;
        long status = pin(va_to_mfn(frame));
        if (status == 0) {
            tables++;
            changed += !is_as_copied(frame);
            let_it_store(50); /* it tries, and must not succeed */
            changed += !is_as_copied(frame);
            failed += mmuext(MMUEXT_UNPIN_TABLE, va_to_mfn(frame), 0) != 0;
        } else if (status == -EBUSY && *(volatile u64 *)&frame[STORED] == hostile)
            refused++; /* it came before the flush */
        else
            odd++;
        failed += set_writable(frame) != 0;
        failed += mmu_update(window, entry(frame, PTE_KERNEL)) != 0;
        for (u64 i = 0; i < 4; i++)
            move_page(0, 4 * round + i, &wrong, &failed);
    }
    finish = 1;
    check_eq("vCPU 1 ends", wait_until(&done1, 1), 1);
    print("# %lu times a table, %lu times refused; %lu stores, of which %lu faulted; %lu pages moved\n", tables, refused,
          stores, faults, moved1);
    check_eq("the frame became a table or had a mapping to be refused", (long)odd, 0);
    check_eq("it became a table", tables > 0, 1);
    check_eq("while it was one nothing was stored in it", (long)changed, 0);
    check_eq("vCPU 1 was kept from it by faults", faults > 0, 1);
    check_eq("but not always", faults < stores, 1);
    check_eq("vCPU 1 moved pages", moved1 > 0, 1);
    check_eq("each saw the page that it had put there", (long)(wrong + wrong1), 0);
    check_eq("no hypercall failed", (long)(failed + failed1), 0);
    return 0;
}
