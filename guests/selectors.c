/*
 * CS and SS: what a kernel that loads them by itself, by IRETQ, LRETQ, far jumps and calls, finds in them, with Xen's
 * flat selectors and with a GDT of its own (public arch-x86/xen-x86_64.h, FLAT_RING3_*; Intel SDM volume 2, IRET).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define CODE_DPL3 0x00affb000000fffful
#define DATA_DPL3 0x00cff3000000fffful
#define MINE 0x13      /* code of our own */
#define MY_DATA 0x1b   /* data of our own */
#define ABSENT 0x23    /* code that is not present */
#define NOTHING 0x2b   /* no descriptor */
#define XENS_DATA 0xe02b
#define FLAGS_IOPL 0x3000ul
#define FLAGS_IF 0x200ul

u64 saved_sp;
/* TRY with the stack put back: a frame of which nothing was popped stays behind. */
#define TRY_STACK(text, ...)                                           \
    do {                                                               \
        __asm__ volatile("mov %%rsp, saved_sp" : : : "memory");        \
        TRY(text, ##__VA_ARGS__);                                      \
        __asm__ volatile("mov saved_sp, %%rsp" : : : "memory");        \
    } while (0)

static u64 cs, ss; /* as they were read before a check made a hypercall */

static void look(void)
{
    __asm__ volatile("mov %%cs, %0\n mov %%ss, %1" : "=r"(cs), "=r"(ss));
}

#define IRETQ(cs_, ss_, flags)                                                                      \
    TRY_STACK("mov %%rsp, %%rax\n push %1\n push %%rax\n push %2\n push %0\n lea 1f(%%rip), %%rax\n" \
              "push %%rax\n iretq\n1:", : : "r"((u64)(cs_)), "r"((u64)(ss_)), "r"((u64)(flags)) : "rax", "memory", "cc")
#define LRETQ(cs_) \
    TRY_STACK("push %0\n lea 1f(%%rip), %%rax\n push %%rax\n lretq\n1:", : : "r"((u64)(cs_)) : "rax", "memory")

static void returns(void)
{
    IRETQ(FLAT_RING3_CS64, XENS_DATA, 2);
    look();
    check_eq("iretq to Xen's flat selectors", fault.vector, NO_FAULT);
    check_eq("  cs", cs, FLAT_RING3_CS64);
    check_eq("  ss", ss, XENS_DATA);
    LRETQ(FLAT_RING3_CS64);
    look();
    check_eq("lretq to Xen's flat cs", fault.vector, NO_FAULT);
    IRETQ(MINE, MY_DATA, 2);
    look();
    check_eq("iretq to selectors of our own", fault.vector, NO_FAULT);
    check_eq("  cs", cs, MINE);
    check_eq("  ss", ss, MY_DATA);
    TRY("mov %w0, %%ss", : : "r"(ss) : "memory");
    check_eq("ss can be loaded with what was read", fault.vector, NO_FAULT);
    LRETQ(MINE);
    look();
    check_eq("lretq to cs of our own", fault.vector, NO_FAULT);
    check_eq("  cs", cs, MINE);
    HYPERCALL(HC_xen_version, 0, 0);
    look();
    check_eq("after a hypercall by SYSCALL cs is Xen's", cs, FLAT_RING3_CS64);
    check_eq("  ss too", ss, XENS_DATA);
    LRETQ(MINE);
    TRY("ud2", );
    check_eq("a fault there shows our cs, with RPL 0", fault.cs & 0xffff, MINE & ~3);

    u64 before = 0, after = 0;
    TRY_STACK("mov %%rsp, %0\n sub $24, %%rsp\n push %2\n lea 1f(%%rip), %%rax\n push %%rax\n lretq $24\n1: mov %%rsp, %1",
              : "=&r"(before), "=&r"(after) : "r"((u64)FLAT_RING3_CS64) : "rax", "memory");
    check_eq("lretq $24 releases that much more", before - after, 0);
}

static void flags(void)
{
    u64 seen;
    IRETQ(FLAT_RING3_CS64, XENS_DATA, 2 | 0x8d5 | 0x400);
    __asm__ volatile("pushf\n pop %0\n cld" : "=r"(seen));
    check_eq("iretq loads the status flags and DF", seen & 0xcd5, 0xcd5 & seen);
    IRETQ(FLAT_RING3_CS64, XENS_DATA, 2 | FLAGS_IOPL);
    check_eq("iretq with IOPL and without IF", fault.vector, NO_FAULT);
    check_eq("  changes neither", read_flags() & (FLAGS_IOPL | FLAGS_IF), FLAGS_IF);
    IRETQ(FLAT_RING3_CS64, XENS_DATA, 2 | 1ul << 17);
    check_eq("iretq with VM", fault.vector, NO_FAULT);
    check_eq("  leaves 64-bit code as it is", read_flags() & 1ul << 17, 0);
    __asm__ volatile("pushf\n orq $0x4000, (%%rsp)\n popf" : : : "memory", "cc");
    IRETQ(FLAT_RING3_CS64, XENS_DATA, 2);
    __asm__ volatile("pushf\n andq $~0x4000, (%%rsp)\n popf" : : : "memory", "cc");
    check_eq("iretq under NT: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, 0);
}

static void refused(void)
{
    IRETQ(FLAT_RING3_CS64 & ~3, XENS_DATA, 2);
    check_eq("iretq to cs with RPL 0: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, FLAT_RING3_CS64 & ~3);
    IRETQ(NOTHING, XENS_DATA, 2);
    check_eq("iretq to a cs that there is not: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, NOTHING & ~3);
    IRETQ(ABSENT, XENS_DATA, 2);
    check_eq("iretq to a cs that is not present: #NP", fault.vector, 11);
    check_eq("  error code", fault.error, ABSENT & ~3);
    IRETQ(XENS_DATA, XENS_DATA, 2);
    check_eq("iretq to data: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, XENS_DATA & ~3);
    IRETQ(FLAT_RING3_CS64, MINE, 2);
    check_eq("iretq with a stack of code: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, MINE & ~3);
    IRETQ(0, XENS_DATA, 2);
    check_eq("iretq to null: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, 0);
    LRETQ(NOTHING);
    check_eq("lretq to a cs that there is not: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, NOTHING & ~3);
}

extern u8 jump_landed[];

static void jumps(void)
{
    static struct {
        u32 offset;
        u16 selector;
    } __attribute__((packed)) target = {0x7000, MINE};
    /* The offset has 32 bits and is not extended: our addresses are out of its reach, and nothing is mapped there. */
    fault_elsewhere = (u64)jump_landed;
    TRY_STACK("ljmp *%0\n jump_landed:", : : "m"(target) : "memory");
    check_eq("a far jump with a 32-bit offset goes there: #PF", fault.vector, VECTOR_PF);
    check_eq("  rip", fault.rip, 0x7000);
    check_eq("  with the new cs", fault.cs & 0xffff, MINE & ~3);
    target.selector = NOTHING;
    TRY_STACK("ljmp *%0", : : "m"(target) : "memory");
    check_eq("a far jump to a cs that there is not: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, NOTHING & ~3);
    TRY_STACK("lcall *%0", : : "m"(target) : "memory");
    check_eq("a far call: #GP", fault.vector, VECTOR_GP);
    check_eq("  error code", fault.error, NOTHING & ~3);
    TRY_STACK("ljmp *(%0)", : : "r"(0x700000000000ul) : "memory");
    check_eq("a far jump through nothing: #PF", fault.vector, VECTOR_PF);
    check_eq("  cr2", fault.cr2, 0x700000000000ul);
}

int main(void)
{
    traps_install();
    events_quiet();
    u64 *gdt = page_alloc();
    gdt[MINE >> 3] = CODE_DPL3;
    gdt[MY_DATA >> 3] = DATA_DPL3;
    gdt[ABSENT >> 3] = CODE_DPL3 & ~(1ul << 47);
    set_read_only(gdt);
    u64 frames[1] = {va_to_mfn(gdt)};
    check_eq("set_gdt", HYPERCALL(HC_set_gdt, frames, 512), 0);
    returns();
    flags();
    refused();
    jumps();
    return 0;
}
