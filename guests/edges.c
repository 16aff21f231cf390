/*
 * The ends of the address space: instructions, stacks and operands that go on behind the last address, and the addresses
 * in the middle that are not canonical (Intel SDM volume 1, 3.3.7.1).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define LAST_PAGE 0xfffffffffffff000ul
#define VECTOR_SS 12
#define HOLE 0x800000000000ul /* the first address that is not canonical */

static u8 *page; /* what is mapped at LAST_PAGE */
u64 saved_rsp, saved_rbp;

static void map_last_page(void)
{
    u64 *t3 = table_va(PTE_MFN(((u64 *)start_info->pt_base)[511]));
    u64 *t2 = page_alloc(), *t1 = page_alloc();
    page = page_alloc();
    t1[511] = entry(page, PTE_KERNEL), t2[511] = entry(t1, PTE_TABLE);
    check_eq("tables of our own", set_read_only(t2) | set_read_only(t1), 0);
    check_eq("  linked", mmu_update(machine_address(&t3[511]), entry(t2, PTE_TABLE)), 0);
}

/* Jump there; it faults, and we come back. */
extern u8 back_here[];

static void jump_to(u64 rip, u64 rax)
{
    fault.vector = NO_FAULT;
    fault_elsewhere = (u64)back_here;
    __asm__ volatile("push %%rbx\n push %%rbp\n mov %%rsp, saved_rsp(%%rip)\n jmp *%%rcx\n"
                     ".globl back_here\nback_here: mov saved_rsp(%%rip), %%rsp\n pop %%rbp\n pop %%rbx"
                     : "+a"(rax), "+c"(rip)
                     :
                     : "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
}

static void instructions(void)
{
    page[4094] = 0xcd, page[4095] = 0x80; /* int $0x80 */
    jump_to(LAST_PAGE + 4094, 0);
    check_eq("INT in the last two bytes", (long)fault.vector, 0x80);
    check_eq("  goes on at 0", (long)fault.rip, 0);
    page[4095] = 0xcc; /* int3 */
    jump_to(LAST_PAGE + 4095, 0);
    check_eq("INT3 in the last byte", (long)fault.vector, VECTOR_BP);
    check_eq("  goes on at 0", (long)fault.rip, 0);
    page[4094] = 0x0f, page[4095] = 0x05; /* syscall: xen_version */
    jump_to(LAST_PAGE + 4094, HC_xen_version);
    check_eq("a hypercall in the last two bytes goes on at 0: #PF", (long)fault.vector, VECTOR_PF);
    check_eq("  rip", (long)fault.rip, 0);
    check_eq("  it was an instruction fetch", (long)(fault.error & 16), 16);
    page[4094] = 0x0f, page[4095] = 0x0b; /* ud2 */
    jump_to(LAST_PAGE + 4094, 0);
    check_eq("UD2 in the last two bytes", (long)fault.vector, VECTOR_UD);
    check_eq("  rip", (long)fault.rip, (long)(LAST_PAGE + 4094));
    page[4095] = 0xf4; /* hlt */
    jump_to(LAST_PAGE + 4095, 0);
    check_eq("HLT in the last byte: #GP", (long)fault.vector, VECTOR_GP);
    jump_to(HOLE, 0);
    check_eq("a jump to an address that is not canonical: #GP", (long)fault.vector, VECTOR_GP);
}

static void stacks(void)
{
    memset(page, 0, PAGE_SIZE);
    TRY("mov %%rsp, saved_rsp(%%rip)\n xor %%esp, %%esp\n ud2", : : : "memory");
    __asm__ volatile("mov saved_rsp(%%rip), %%rsp" : : : "memory");
    check_eq("a fault with a stack at 0", (long)fault.vector, VECTOR_UD);
    check_eq("  shows that stack", (long)fault.rsp, 0);
    check_eq("  its frame lies at the end of the address space", (long)((u64 *)page)[511], 0xe02b);
}

static void operands(void)
{
    static u8 area[4096] __attribute__((aligned(64)));
    memset(area, 0x11, sizeof area);
    memset(page, 0x22, PAGE_SIZE);
    for (u64 at = LAST_PAGE + 4096 - 64; at > LAST_PAGE + 4096 - 640; at -= 64) {
        TRY("xor %%edx, %%edx\n mov $3, %%eax\n xsave64 (%0)", : : "r"(at) : "rax", "rdx", "memory");
        if (at > LAST_PAGE + 4096 - 576 && fault.vector != VECTOR_PF)
            check_eq("XSAVE beyond the end: #PF", (long)fault.vector, VECTOR_PF);
        if (at <= LAST_PAGE + 4096 - 576 && fault.vector != NO_FAULT)
            check_eq("XSAVE up to the end", (long)fault.vector, NO_FAULT);
        TRY("xor %%edx, %%edx\n mov $3, %%eax\n xrstor64 (%0)", : : "r"(at) : "rax", "rdx", "memory");
    }
    u64 changed = 0;
    for (int i = 0; i < 4096; i++)
        changed += area[i] != 0x11;
    check_eq("XSAVE and XRSTOR around the end change nothing else", (long)changed, 0);
    TRY("mov (%0), %%rax", : : "b"(LAST_PAGE + 4092) : "rax", "memory");
    check_eq("a load around the end: #PF at 0", (long)fault.vector, VECTOR_PF);
    check_eq("  cr2", (long)fault.cr2, 0);
    TRY("mov (%0), %%rax", : : "b"(HOLE) : "rax", "memory");
    check_eq("a load from an address that is not canonical: #GP", (long)fault.vector, VECTOR_GP);
    check_eq("  error code", (long)fault.error, 0);
    bool emulated = option("emulated-end"); /* an emulator makes no difference */
    TRY("mov %%rbp, saved_rbp(%%rip)\n mov %0, %%rbp\n mov (%%rbp), %%rax", : : "c"(HOLE) : "rax", "memory");
    __asm__ volatile("mov saved_rbp(%%rip), %%rbp" : : : "memory");
    check_eq("by way of RBP: #SS", (long)fault.vector, emulated ? VECTOR_GP : VECTOR_SS);
    check_eq("  error code", (long)fault.error, 0);
    TRY("mov (%0), %%rax", : : "b"(HOLE - 4) : "rax", "memory");
    check_eq("a load that reaches into the hole: #GP or #PF", fault.vector == VECTOR_GP || fault.vector == VECTOR_PF, 1);
}

static void hypercalls(void)
{
    check_eq("a hypercall's argument that goes around the end", HYPERCALL(HC_xen_version, 1, LAST_PAGE + 4092), -EFAULT);
    check_eq("  and in the hole", HYPERCALL(HC_xen_version, 1, HOLE), -EFAULT);
    check_eq("  and around into the hole", HYPERCALL(HC_xen_version, 1, HOLE - 4), -EFAULT);
    struct mmu_update *updates = (void *)(LAST_PAGE + 4096 - 16);
    updates->ptr = machine_address(pte_of(page, 1)), updates->val = *pte_of(page, 1);
    check_eq("requests that go on behind the end", HYPERCALL(HC_mmu_update, updates, 2, 0, DOMID_SELF), -EFAULT);
    check_eq("stack_switch to the end", HYPERCALL(HC_stack_switch, 0xe02b, 0), 0);
    check_eq("set_trap_table there", HYPERCALL(HC_set_trap_table, LAST_PAGE + 4096 - 8), -EFAULT);
}

int main(void)
{
    traps_install();
    events_quiet();
    map_last_page();
    if (!option("emulated-end")) /* an emulator's translator may end there itself */
        instructions();
    stacks();
    operands();
    hypercalls();
    return 0;
}
