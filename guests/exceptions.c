/*
 * Exceptions in guest-kernel mode: which vector, error code, address and frame each one brings, and
 * how the iret hypercall ends them (Xen's bounce frames; Intel SDM volume 3, chapter 6).
 *
 * Values as observed on Xen 4.17. The word "emulated-int" on the command line says that the machine
 * below is one whose INT n reports n*16+2 where the SDM says n*8+2.
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define WILD 0x0000700000000000ul /* mapped nowhere */
#define KERNEL_CS 0xe030
#define KERNEL_SS 0xe02b
#define FLAG_CF 1
#define FLAG_IF 0x200
#define FLAG_DF 0x400
#define FLAG_NT 0x4000
#define FLAG_AC 0x40000
#define FLAGS_SEEN (FLAG_CF | 2 | FLAG_IF | FLAG_DF | 0x3000 | FLAG_NT | FLAG_AC) /* leaving out what arithmetic sets */

static u8 page[PAGE_SIZE] PAGE_ALIGNED;
static volatile u64 scratch;

static void expect(const char *what, u64 vector, long error)
{
    print("# %s\n", what);
    check_eq("  vector", (long)fault.vector, (long)vector);
    if (vector == VECTOR_PF || vector == VECTOR_GP || error)
        check_eq("  error code", (long)fault.error, error);
}

static void arithmetic_and_traps(void)
{
    u64 here;
    TRY("lea 1f(%%rip), %0\n xor %%ecx, %%ecx\n xor %%edx, %%edx\n mov $1, %%eax\n1: div %%ecx",
        : "=&r"(here)::"rax", "rcx", "rdx", "memory");
    expect("division by zero", VECTOR_DE, 0);
    check_eq("  rip is the instruction", (long)fault.rip, (long)here);

    TRY("lea 1f(%%rip), %0\n int3\n1:", : "=r"(here)::"memory");
    expect("int3", VECTOR_BP, 0);
    check_eq("  rip is behind the instruction", (long)fault.rip, (long)here);

    TRY("lea 1f(%%rip), %0\n int $4\n1:", : "=r"(here)::"memory");
    expect("int $4", VECTOR_OF, 0);
    check_eq("  rip is behind the instruction", (long)fault.rip, (long)here);

    TRY("lea 1f(%%rip), %0\n1: ud2", : "=r"(here)::"memory");
    expect("ud2", VECTOR_UD, 0);
    check_eq("  rip is the instruction", (long)fault.rip, (long)here);
    check_eq("  cs in the frame has RPL 0 and no saved mask yet", (long)fault.cs, KERNEL_CS | 1l << 32);

    /* One single step: TF is set by popf, and the trap comes after the instruction behind it. */
    TRY("lea 1f(%%rip), %0\n pushf\n orl $0x100, (%%rsp)\n popf\n nop\n1: nop", : "=r"(here)::"memory", "cc");
    expect("single step", VECTOR_DB, 0);
    check_eq("  rip is behind the stepped instruction", (long)fault.rip, (long)here);
    u64 dr6;
    __asm__ volatile("mov %%dr6, %0" : "=r"(dr6));
    check_eq("  dr6 says single step", (long)dr6 & 0x400f, 0x4000);
    __asm__ volatile("mov %0, %%dr6" : : "r"(0xffff0ff0ul));
}

static void page_faults(void)
{
    volatile u64 *wild = (u64 *)(WILD + 0x123000);
    TRY("mov (%0), %%rax", : : "r"(wild) : "rax", "memory");
    expect("read of an unmapped page: the user bit is hidden from the kernel", VECTOR_PF, 0);
    check_eq("  cr2", (long)fault.cr2, (long)wild);
    TRY("mov %%rax, 8(%0)", : : "r"(wild) : "memory");
    expect("write to an unmapped page", VECTOR_PF, 2);
    check_eq("  cr2", (long)fault.cr2, (long)wild + 8);
    u64 cr2;
    __asm__ volatile("mov %%cr2, %0" : "=r"(cr2));
    check_eq("  mov from cr2 is emulated", (long)cr2, (long)wild + 8);

    check_eq("make a page read-only", set_read_only(page), 0);
    TRY("movb $1, 5(%0)", : : "r"(page) : "memory");
    expect("write to a read-only page", VECTOR_PF, 3);
    check_eq("  cr2", (long)fault.cr2, (long)page + 5);
    TRY("lock xaddl %%eax, 64(%0)", : : "r"(page) : "rax", "memory", "cc");
    expect("locked read-modify-write of a read-only page", VECTOR_PF, 3);

    check_eq("make a page no-execute", update_va(page, va_to_mfn(page) << 12 | PTE_KERNEL | PTE_NX, UVMF_INVLPG), 0);
    page[0] = 0xc3; /* ret */
    fault.vector = NO_FAULT;
    __asm__ volatile("lea 1f(%%rip), %%rax\n mov %%rax, fault_elsewhere(%%rip)\n mov %%rsp, %%rbx\n call *%0\n"
                     "1: mov %%rbx, %%rsp" : : "r"(page) : "rax", "rbx", "memory");
    fault_elsewhere = 0;
    expect("instruction fetch from a no-execute page", VECTOR_PF, 0x11);
    check_eq("  cr2", (long)fault.cr2, (long)page);
    check_eq("  rip", (long)fault.rip, (long)page);
    check_eq("make it executable", set_writable(page), 0);
    TRY("call *%0", : : "r"(page) : "memory");
    expect("the same call", NO_FAULT, 0);

    fault.vector = NO_FAULT;
    __asm__ volatile("lea 1f(%%rip), %%rax\n mov %%rax, fault_elsewhere(%%rip)\n mov %%rsp, %%rbx\n call *%0\n"
                     "1: mov %%rbx, %%rsp" : : "r"(wild) : "rax", "rbx", "memory");
    fault_elsewhere = 0;
    expect("instruction fetch from an unmapped page", VECTOR_PF, 0x10);
}

static void protection_faults(void)
{
    TRY("mov (%0), %%rax", : : "r"(0x8000000000000000ul) : "rax", "memory");
    expect("non-canonical address", VECTOR_GP, 0);
    TRY("wrmsr", : : "a"(0), "d"(0), "c"(0x12345) : "memory");
    expect("wrmsr of an unknown register", VECTOR_GP, 0);
    TRY("rdmsr", : : "c"(0x12345) : "rax", "rdx", "memory");
    expect("rdmsr of an unknown register", VECTOR_GP, 0);
    TRY("lgdt (%0)", : : "r"(page) : "memory");
    expect("lgdt", VECTOR_GP, 0);
    TRY("ltr %w0", : : "r"(0x40) : "memory");
    expect("ltr", VECTOR_GP, 0);
    TRY("mov %w0, %%ds", : : "r"(0xfff3) : "memory");
    expect("a selector beyond the GDT", VECTOR_GP, 0xfff0);
    TRY("mov %w0, %%ds", : : "r"(0x53) : "memory");
    expect("a selector of a GDT page that the guest has not set", VECTOR_GP, 0x50);
    TRY("mov %w0, %%ds", : : "r"(0x0f) : "memory");
    expect("a selector of an absent LDT", VECTOR_GP, 0x0c);
    TRY("mov %w0, %%ds", : : "r"(0) : "memory");
    expect("the null selector", NO_FAULT, 0);
    TRY("mov %w0, %%ds", : : "r"(FLAT_RING3_SS) : "memory");
    expect("Xen's flat data selector", NO_FAULT, 0);
    __asm__ volatile("mov %w0, %%ds" : : "r"(0));
}

static void floating_point(void)
{
    check_eq("fpu_taskswitch(1)", HYPERCALL(HC_fpu_taskswitch, 1), 0);
    TRY("fninit", : : : "memory");
    expect("x87 with TS set", VECTOR_NM, 0);
    /* The bounce of #NM clears TS, so that the handler may use the FPU at once. */
    TRY("fninit", : : : "memory");
    expect("the next x87 instruction", NO_FAULT, 0);
    check_eq("fpu_taskswitch(1)", HYPERCALL(HC_fpu_taskswitch, 1), 0);
    TRY("pxor %%xmm0, %%xmm0", : : : "memory");
    expect("SSE with TS set", VECTOR_NM, 0);
    check_eq("fpu_taskswitch(1)", HYPERCALL(HC_fpu_taskswitch, 1), 0);
    check_eq("fpu_taskswitch(0)", HYPERCALL(HC_fpu_taskswitch, 0), 0);
    TRY("fninit", : : : "memory");
    expect("x87 with TS clear", NO_FAULT, 0);

    static const u16 unmask_zero_divide = 0x37b;
    TRY("fldcw %0\n fld1\n fldz\n fdivrp\n fwait", : : "m"(unmask_zero_divide) : "memory");
    expect("an unmasked x87 exception", VECTOR_MF, 0);
    __asm__ volatile("fninit");
}

static void software_interrupts(void)
{
    bool emulated = option("emulated-int");
    u64 here;
    TRY("lea 1f(%%rip), %0\n int $0x80\n1:", : "=r"(here)::"memory");
    expect("int $0x80 with a gate for the kernel", 0x80, 0);
    check_eq("  rip is behind the instruction", (long)fault.rip, (long)here);
    TRY("lea 1f(%%rip), %0\n int $0x21\n1:", : "=r"(here)::"memory");
    expect("int $0x21 with a gate for the kernel", emulated ? 0x42 : 0x21, 0);
    check_eq("  rip is behind the instruction", (long)fault.rip, (long)here);
    TRY("lea 1f(%%rip), %0\n1: int $0x22", : "=r"(here)::"memory");
    expect("int $0x22 without a gate", VECTOR_GP, emulated ? 0x222 : 0x112);
    check_eq("  rip is the instruction", (long)fault.rip, (long)here);
    TRY("int $14", : : : "memory");
    expect("int $14 cannot forge a page fault: its gate has DPL 0", VECTOR_GP, emulated ? 0xe2 : 0x72);
}

/* Fault with these flags set, on a stack that is not aligned; the frame is left in raw_frame. */
static void fault_with_flags(u64 flags, u64 *rip, u64 *rsp)
{
    __asm__ volatile("lea 2f(%%rip), %%rax\n mov %%rax, fault_elsewhere(%%rip)\n lea 1f(%%rip), %0\n"
                     "mov %%rsp, %%rbx\n sub $128, %%rsp\n and $-16, %%rsp\n sub $24, %%rsp\n mov %%rsp, %1\n"
                     "push %2\n popf\n mov $0x1111, %%ecx\n mov $0x2222, %%r11d\n"
                     "1: ud2\n"
                     "2: mov %%rbx, %%rsp\n push $2\n popf"
                     : "=&r"(*rip), "=&r"(*rsp) : "r"(flags) : "rax", "rbx", "rcx", "r11", "memory", "cc");
}

static void bounce_frame(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    u64 rip, rsp, flags = FLAG_NT | FLAG_AC | FLAG_DF | FLAG_CF | 2;

    print("# frame of a fault in the kernel, upcalls masked\n");
    trap_set(VECTOR_UD, 0, trap_6_raw);
    fault_with_flags(flags, &rip, &rsp);
    check_eq("  it begins seven words below the stack pointer, aligned to 16", (long)raw_rsp, (long)(rsp & ~15ul) - 56);
    check_eq("  rcx", (long)raw_frame[0], 0x1111);
    check_eq("  r11", (long)raw_frame[1], 0x2222);
    check_eq("  rip", (long)raw_frame[2], (long)rip);
    check_eq("  cs with RPL 0, and the upcall mask", (long)raw_frame[3], KERNEL_CS | 1l << 32);
    check_eq("  rflags, IF clear as upcalls are masked", (long)raw_frame[4] & FLAGS_SEEN, (long)flags);
    check_eq("  rsp", (long)raw_frame[5], (long)rsp);
    check_eq("  ss", (long)raw_frame[6], KERNEL_SS);
    check_eq("  the handler runs without NT and AC, but with DF", (long)entry_rflags & (FLAG_NT | FLAG_AC | FLAG_DF), FLAG_DF);
    check_eq("  ... with hardware interrupts on", (long)entry_rflags & FLAG_IF, FLAG_IF);
    /* Not which selectors they are: an engine may run all guests with selectors of its own. */
    check_eq("  ... in ring 3: cs", (long)raw_cs & 3, 3);
    check_eq("  ... ss", (long)raw_ss & 3, 3);

    print("# frame of a fault in the kernel, upcalls not masked\n");
    vcpu->upcall_mask = 0;
    fault_with_flags(2, &rip, &rsp);
    check_eq("  cs", (long)raw_frame[3], KERNEL_CS);
    check_eq("  rflags, IF set", (long)raw_frame[4] & FLAGS_SEEN, FLAG_IF | 2);
    check_eq("  a gate without flag 4 leaves the mask alone", (long)entry_upcall_mask, 0);
    check_eq("  iret gives the mask back from IF", vcpu->upcall_mask, 0);
    trap_set(VECTOR_UD, TRAP_MASKS_UPCALLS, trap_6_raw);
    fault_with_flags(2, &rip, &rsp);
    check_eq("  a gate with flag 4 sets the mask", (long)entry_upcall_mask, 1);
    check_eq("  ... and the frame has the mask of before", (long)raw_frame[3], KERNEL_CS);
    check_eq("  ... which iret gives back from IF", vcpu->upcall_mask, 0);
    vcpu->upcall_mask = 1;
    trap_set(VECTOR_UD, TRAP_MASKS_UPCALLS, trap_6);
}

static u8 iret_stack[1024] __attribute__((aligned(16)));

static long iret_to(u64 flags, u64 rip, u64 cs, u64 rflags, u64 ss)
{
    u64 frame[9] = {0x1111, 0x2222, 0x3333, flags, rip, cs, rflags, (u64)(iret_stack + sizeof iret_stack) - 8, ss};
    return iret_raw(frame);
}

/* Xen's own iretq fails: the fault is the guest's, at the place it was to return to. */
static void iret_faults(const char *what, u64 rip, u64 cs, u64 ss, u64 vector, u64 error)
{
    shared_info->vcpu[0].upcall_mask = 0;
    print("# iret to %s\n", what);
    fault.vector = NO_FAULT;
    fault_elsewhere = (u64)iret_raw_faulted;
    check_eq("  it does not land", iret_to(0, rip, cs, FLAG_IF | 2, ss), 1);
    check_eq("  vector", (long)fault.vector, (long)vector);
    check_eq("  error code", (long)fault.error, (long)error);
    check_eq("  rip", (long)fault.rip, (long)rip);
    check_eq("  cs", (long)fault.cs, (long)cs);
    check_eq("  rsp", (long)fault.rsp, (long)(iret_stack + sizeof iret_stack) - 8);
    fault_elsewhere = 0;
}

static void iret(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    u64 there = (u64)iret_raw_landed;

    print("# iret within the kernel\n");
    check_eq("  it lands", iret_to(0, there, KERNEL_CS, FLAG_IF | FLAG_DF | FLAG_CF | 2, KERNEL_SS), 0);
    check_eq("  rax is the frame's", (long)iret_landed_rax, 0x1111);
    check_eq("  r11 is the frame's", (long)iret_landed_r11, 0x2222);
    check_eq("  rcx is the frame's", (long)iret_landed_rcx, 0x3333);
    check_eq("  rsp is the frame's", (long)iret_landed_rsp, (long)(iret_stack + sizeof iret_stack) - 8);
    check_eq("  so are the flags", (long)iret_landed_rflags & FLAGS_SEEN, FLAG_IF | FLAG_DF | FLAG_CF | 2);
    check_eq("  IF set: upcalls are unmasked", vcpu->upcall_mask, 0);
    check_eq("iret with IF clear lands", iret_to(0, there, KERNEL_CS, 2, KERNEL_SS), 0);
    check_eq("  upcalls are masked", vcpu->upcall_mask, 1);
    check_eq("  but hardware interrupts stay on", (long)iret_landed_rflags & FLAG_IF, FLAG_IF);
    check_eq("iret with IOPL 3 lands", iret_to(0, there, KERNEL_CS, 0x3002, KERNEL_SS), 0);
    check_eq("  IOPL stays 0", (long)iret_landed_rflags & 0x3000, 0);
    check_eq("iret with flag in_syscall lands", iret_to(0x100, there, KERNEL_CS, 2, KERNEL_SS), 0);
    check_eq("  rax is the frame's", (long)iret_landed_rax, 0x1111);
    check_eq("  rcx is the target, as after sysret", (long)iret_landed_rcx, (long)there);

    iret_faults("an ss of a GDT page that is not there", there, KERNEL_CS, 0x53, VECTOR_GP, 0x50);
    iret_faults("a null ss", there, KERNEL_CS, 0, VECTOR_GP, 0);
    iret_faults("a cs of a GDT page that is not there", there, 0x60, KERNEL_SS, VECTOR_GP, 0x60);
    iret_faults("a data segment as cs", there, 0xe028, KERNEL_SS, VECTOR_GP, 0xe028);
    iret_faults("a code segment as ss", there, KERNEL_CS, 0xe033, VECTOR_GP, 0xe030);
    iret_faults("Xen's own cs", there, 0xe008, KERNEL_SS, VECTOR_GP, 0xe008);
    iret_faults("a non-canonical rip", 1ul << 63, KERNEL_CS, KERNEL_SS, VECTOR_GP, 0);
    shared_info->vcpu[0].upcall_mask = 1;
}

static void callback_op(void)
{
    struct {
        u16 type, flags;
        u64 address;
    } callback = {CALLBACKTYPE_event, 0, 1ul << 63};
    check_eq("callback_op register: a non-canonical address", HYPERCALL(HC_callback_op, CALLBACKOP_register, &callback), -EINVAL);
    callback.type = 99;
    callback.address = (u64)trap_256;
    check_eq("callback_op register: an unknown type", HYPERCALL(HC_callback_op, CALLBACKOP_register, &callback), -ENOSYS);
    check_eq("callback_op: an unknown command", HYPERCALL(HC_callback_op, 7, &callback), -ENOSYS);
    check_eq("callback_op: a wild pointer", HYPERCALL(HC_callback_op, CALLBACKOP_register, WILD), -EFAULT);
    callback.type = CALLBACKTYPE_event;
    check_eq("callback_op unregister: event", HYPERCALL(HC_callback_op, CALLBACKOP_unregister, &callback), -EINVAL);
    callback.type = CALLBACKTYPE_nmi;
    check_eq("callback_op unregister: NMI", HYPERCALL(HC_callback_op, CALLBACKOP_unregister, &callback), 0);
    callback.type = CALLBACKTYPE_failsafe;
    check_eq("callback_op unregister: failsafe", HYPERCALL(HC_callback_op, CALLBACKOP_unregister, &callback), -EINVAL);
    check_eq("set_callbacks, the old form", HYPERCALL(HC_set_callbacks, trap_256, trap_256, trap_258), 0);
    check_eq("set_callbacks: a non-canonical address", HYPERCALL(HC_set_callbacks, 1ul << 63, trap_256, trap_258), 0);
    check_eq("set_trap_table: a wild pointer", HYPERCALL(HC_set_trap_table, WILD), -EFAULT);
    struct trap_info one[2] = {{VECTOR_UD, 0, FLAT_RING3_CS64, 1ul << 63}, {0, 0, 0, 0}};
    check_eq("set_trap_table: a non-canonical address", HYPERCALL(HC_set_trap_table, one), -EINVAL);
    TRY("ud2", : : : "memory");
    expect("  the entry of before is still there", VECTOR_UD, 0);
}

int main(void)
{
    traps_install();
    arithmetic_and_traps();
    page_faults();
    protection_faults();
    floating_point();
    software_interrupts();
    events_quiet();
    upcalls_install(); /* before anything clears the upcall mask */
    bounce_frame();
    iret();
    callback_op();
    return 0;
}
