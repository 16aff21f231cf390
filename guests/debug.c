/*
 * Breakpoints on data: a write, a read, parts of a range, instructions that access memory twice, string instructions; in
 * the kernel.  And values that MXCSR cannot have.  What is expected is the SDM's: Xen on QEMU's emulated processor does not get
 * through this, whose breakpoints on data keep hitting within Xen.
 */
#include "events.h"
#include "traps.h"

#define DR7_WRITES(n, bytes) (3ul << (n) * 2 | (1 | ((bytes) - 1ul) << 2) << (16 + (n) * 4))
#define DR7_WRITES8(n) DR7_WRITES(n, 3) /* eight bytes have the number that three would have */
#define DR7_ACCESSES8(n) (DR7_WRITES8(n) | 3ul << (16 + (n) * 4))
#define DR6_STEP 0x4000ul
#define DR6_HITS 0xful

static struct {
    u64 before, words[2], behind;
} watched __attribute__((aligned(64)));
static u64 source = 0x1122334455667788;
static struct {
    u64 count, rip, dr6, rflags;
} volatile hit; /* which only traps change */

static bool on_debug(struct regs *regs)
{
    if (regs->vector != VECTOR_DB)
        return false;
    hit.count++;
    hit.rip = regs->rip;
    hit.rflags = regs->rflags;
    hit.dr6 = (u64)HYPERCALL(HC_get_debugreg, 6);
    HYPERCALL(HC_set_debugreg, 6, 0xffff0ff0);
    regs->rflags &= ~0x100ul;
    return true;
}

static void watch(u64 address, u64 dr7)
{
    check_eq("  an address", HYPERCALL(HC_set_debugreg, 0, address), 0);
    check_eq("  armed", HYPERCALL(HC_set_debugreg, 7, dr7), 0);
    hit.count = hit.dr6 = hit.rip = 0;
}

static void disarm(void)
{
    HYPERCALL(HC_set_debugreg, 7, 0x400);
}

#define FOUND(what, hits)                                     \
    do {                                                      \
        check_eq(what, (long)(hit.dr6 & DR6_HITS), hits);     \
        check_eq(what ": times", (long)hit.count, (hits) != 0); \
        hit.count = hit.dr6 = 0;                              \
    } while (0)

static void writes(void)
{
    u64 value;
    extern char stored[];
    print("# writes\n");
    watch((u64)&watched.words[0], DR7_WRITES(0, 4));
    __asm__ volatile("movl $1, %0\nstored:" : "=m"(watched.words[0]));
    check_eq("  #DB behind the instruction", (long)(hit.rip - (u64)stored), 0);
    check_eq("  which has stored", (long)(watched.words[0] & 0xffffffff), 1);
    FOUND("  a write", 1);
    __asm__ volatile("mov %1, %0" : "=r"(value) : "m"(watched.words[0]));
    FOUND("  a read", 0);
    __asm__ volatile("movb $2, %0" : "=m"(*((char *)&watched.words[0] + 3)));
    FOUND("  its last byte", 1);
    __asm__ volatile("movb $2, %0" : "=m"(*((char *)&watched.words[0] + 4)));
    FOUND("  the byte behind", 0);
    __asm__ volatile("movq $2, %0" : "=m"(*(u64 *)((char *)&watched.words[0] - 7)));
    FOUND("  eight bytes that end in it", 1);
    __asm__ volatile("movq $2, %0" : "=m"(watched.before));
    FOUND("  eight bytes before it", 0);
    __asm__ volatile("lock incl %0" : "+m"(watched.words[0]));
    FOUND("  a locked instruction", 1);
    __asm__ volatile("lock cmpxchg %%rax, %0" : "+m"(watched.words[0]) : : "rax");
    FOUND("  one that writes back what it read", 1);
    __asm__ volatile("movdqu %%xmm0, %0" : "=m"(watched.before));
    FOUND("  a vector register", 1);
    __asm__ volatile("pushf\n pop %0" : "=r"(value));
    check_eq("  pushf shows no TF", (long)(value & 0x100), 0);
    FOUND("  nothing", 0);
    disarm();
    __asm__ volatile("movl $1, %0" : "=m"(watched.words[0]));
    FOUND("  disarmed", 0);
}

static void accesses(void)
{
    u64 value;
    print("# reads and writes\n");
    watch((u64)&watched.words[0], DR7_ACCESSES8(0));
    __asm__ volatile("movb %1, %b0" : "=r"(value) : "m"(*((char *)&watched.words[0] + 7)));
    FOUND("  a read of its last byte", 1);
    __asm__ volatile("movb %1, %b0" : "=r"(value) : "m"(watched.words[1]));
    FOUND("  a read of the byte behind", 0);
    __asm__ volatile("movb $1, %0" : "=m"(watched.words[0]));
    FOUND("  a write", 1);
    __asm__ volatile("cmp %%rax, %0" : : "m"(watched.words[0]));
    FOUND("  a comparison", 1);
    TRY("addq $1, (%1)\n mov %0, %%rcx", : : "m"(watched.words[0]), "r"(0x10ul) : "rcx", "memory");
    check_eq("  a fault before it", (long)fault.vector, VECTOR_PF);
    FOUND("  is none", 0);
    check_eq("  set_debugreg 1", HYPERCALL(HC_set_debugreg, 1, (u64)&watched.words[1]), 0);
    check_eq("  two armed", HYPERCALL(HC_set_debugreg, 7, DR7_ACCESSES8(0) | DR7_WRITES8(1)), 0);
    __asm__ volatile("mov %1, %%rsi\n lea %0, %%rdi\n movsq" : "=m"(watched.words[1]) : "r"(&watched.words[0]) : "rsi", "rdi");
    FOUND("  an instruction that meets both", 3);
    disarm();
}

static void pushes(void)
{
    static u64 stack[512];
    print("# a stack\n");
    watch((u64)&stack[511], DR7_WRITES8(0));
    __asm__ volatile("mov %%rsp, %%rbx\n mov %0, %%rsp\n push %%rcx\n mov %%rbx, %%rsp" : : "r"(stack + 512) : "rbx", "memory");
    FOUND("  push", 1);
    disarm();
}

static void strings(void)
{
    extern char copied[], copying[];
    u64 left;
    print("# string instructions\n");
    watch((u64)&watched.words[1], DR7_WRITES(0, 1));
    __asm__ volatile("copying: rep movsq\ncopied:" : "=c"(left)
                     : "c"(4), "S"(&source), "D"(&watched.before) : "memory");
    check_eq("  all were copied", (long)left, 0);
    check(hit.rip == (u64)copied || hit.rip == (u64)copying, "  #DB within or behind");
    FOUND("  an element", 1);
    disarm();
}

static void steps(void)
{
    print("# and single steps\n");
    watch((u64)&watched.words[0], DR7_WRITES(0, 4));
    __asm__ volatile("pushf\n orl $0x100, (%%rsp)\n popf\n movl $5, %0" : "=m"(watched.words[0]));
    check_eq("  both in one", (long)(hit.dr6 & (DR6_STEP | DR6_HITS)), DR6_STEP | 1);
    check_eq("  once", (long)hit.count, 1);
    disarm();
}

static void mxcsr(void)
{
    static struct {
        u8 bytes[512];
    } image __attribute__((aligned(64)));
    u32 value = 0x1f80, read;
    print("# MXCSR\n");
    TRY("ldmxcsr %0", : : "m"(value) : "memory");
    check_eq("  ldmxcsr of 1f80", (long)fault.vector, NO_FAULT);
    __asm__ volatile("fxsave %0" : "=m"(image));
    u32 mask = *(u32 *)(image.bytes + 28);
    value = mask ? mask : 0xffbf;
    TRY("ldmxcsr %0", : : "m"(value) : "memory");
    check_eq("  ldmxcsr of all that fxsave says can be", (long)fault.vector, NO_FAULT);
    value = 0x1f80;
    TRY("ldmxcsr %0", : : "m"(value) : "memory");
    for (unsigned bit = 18; bit < 32; bit++) {
        value = 0x1f80 | 1u << bit;
        TRY("ldmxcsr %0", : : "m"(value) : "memory");
        if (fault.vector != VECTOR_GP)
            check_eq("  ldmxcsr of a reserved bit", (long)bit, -1);
    }
    check_eq("  ldmxcsr of reserved bits: #GP", (long)fault.vector, VECTOR_GP);
    check_eq("  error code", (long)fault.error, 0);
    __asm__ volatile("stmxcsr %0" : "=m"(read));
    check_eq("  MXCSR is as it was", (long)read, 0x1f80);
    *(u32 *)(image.bytes + 24) = 0x80001f80;
    TRY("fxrstor %0", : : "m"(image) : "memory");
    check_eq("  fxrstor of a reserved bit: #GP", (long)fault.vector, VECTOR_GP);
    *(u32 *)(image.bytes + 24) = 0x1f80;
    TRY("fxrstor %0", : : "m"(image) : "memory");
    check_eq("  fxrstor of none", (long)fault.vector, NO_FAULT);
}

int main(void)
{
    traps_install();
    events_quiet();
    trap_hook = on_debug;
    writes();
    accesses();
    pushes();
    strings();
    steps();
    mxcsr();
    return 0;
}
