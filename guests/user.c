/*
 * User mode: a page-table base of its own, entered by the iret hypercall and left by system calls,
 * faults and events, with the GS bases exchanged on the way (public arch-x86/xen-x86_64.h).
 */
#include "events.h"
#include "paging.h"
#include "traps.h"

#define USER_CODE 0x400000ul
#define USER_DATA 0x401000ul
#define USER_STACK 0x402000ul
#define USER_CS FLAT_RING3_CS64
#define USER_SS FLAT_RING3_SS
#define FLAG_IF 0x200ul
#define FLAG_TF 0x100ul
#define FLAG_DF 0x400ul

#define SEGBASE_FS 0
#define SEGBASE_GS_USER 1
#define SEGBASE_GS_KERNEL 2
#define SEGBASE_GS_USER_SEL 3
#define PHYSDEVOP_set_iopl 6

/* The user's code: pieces that end in a trap, each at a label of its own; copied to a page before use. */
extern u8 user_code[], user_code_end[], u_syscall[], u_syscall_end[], u_read[], u_write[], u_cli[], u_sti[], u_in[], u_int3[], u_int80[],
    u_int80_end[], u_int21[], u_int21_end[], u_gs[], u_fs[], u_fninit[], u_ud2[], u_nop[], u_sysenter[], u_32[], u_32_end[],
    u_jump[], u_rdtsc[], u_hlt[], u_cpuid[], u_popf[];
__asm__(".pushsection .rodata.user, \"a\", @progbits\nuser_code:\n"
        "u_syscall: syscall\nu_syscall_end: ud2\n"
        "u_read: mov (%rdi), %rax\n syscall\n"
        "u_write: mov %rax, (%rdi)\n syscall\n"
        "u_cli: cli\n syscall\n"
        "u_sti: sti\n syscall\n"
        "u_in: in $0x61, %al\n syscall\n"
        "u_int3: int3\n ud2\n"
        "u_int80: int $0x80\nu_int80_end: ud2\n"
        "u_int21: int $0x21\nu_int21_end: ud2\n"
        "u_gs: mov %gs:0, %rax\n syscall\n"
        "u_fs: mov %fs:0, %rax\n syscall\n"
        "u_fninit: fninit\n syscall\n"
        "u_ud2: ud2\n"
        "u_nop: nop\n nop\n syscall\n"
        "u_sysenter: sysenter\n ud2\n"
        "u_jump: jmp *%rdi\n"
        "u_rdtsc: rdtsc\n syscall\n"
        "u_hlt: hlt\n syscall\n"
        "u_popf: push %rdi\n popf\n pushf\n pop %rax\n syscall\n"
        ".code32\n"
        "u_32: mov %esp, %ebx\n push %eax\n pop %ecx\n int $0x80\nu_32_end: ud2\n"
        ".code64\nuser_code_end:\n .popsection");

static u8 *data;
static u8 kernel_stack[4096] __attribute__((aligned(16)));
static struct regs user; /* the user's registers, before and after a run */

static u64 at(const u8 *label) { return USER_CODE + (u64)(label - user_code); }

/* A user address space of three pages, and nothing of the kernel in it. */
static void build_user_tables(void)
{
    u64 *t4 = page_alloc(), *t3 = page_alloc(), *t2 = page_alloc(), *t1 = page_alloc();
    u8 *code = page_alloc();
    memcpy(code, user_code, (u64)(user_code_end - user_code));
    data = page_alloc();
    t4[0] = va_to_mfn(t3) << PAGE_SHIFT | PTE_TABLE;
    t3[0] = va_to_mfn(t2) << PAGE_SHIFT | PTE_TABLE;
    t2[USER_CODE >> 21] = va_to_mfn(t1) << PAGE_SHIFT | PTE_TABLE;
    t1[0] = va_to_mfn(code) << PAGE_SHIFT | PTE_KERNEL_RO | PTE_U;
    t1[1] = va_to_mfn(data) << PAGE_SHIFT | PTE_KERNEL | PTE_U | PTE_NX;
    set_read_only(t4), set_read_only(t3), set_read_only(t2), set_read_only(t1);
    check_eq("pin the user's L4", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(t4), 0), 0);
    check_eq("NEW_USER_BASEPTR", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(t4), 0), 0);
    check_eq("stack_switch", HYPERCALL(HC_stack_switch, FLAT_RING3_SS, kernel_stack + sizeof kernel_stack), 0);
}

/* Run user code from a label with upcalls masked, until it traps. */
static void run(const u8 *label, u64 rdi)
{
    user.rip = at(label);
    user.rdi = rdi;
    user.rsp = USER_STACK;
    user.cs = USER_CS;
    user.ss = USER_SS;
    user.rflags = 2;
    run_user(&user);
}

static void left_by(const char *what, u64 vector)
{
    print("# %s\n", what);
    check_eq("  vector", (long)user.vector, (long)vector);
}

static void faulted(const char *what, u64 vector, u64 error)
{
    left_by(what, vector);
    check_eq("  error code", (long)user.error, (long)error);
}

static void system_calls(void)
{
    run(u_syscall, 0);
    left_by("a system call with no callback registered", VECTOR_UD);
    check_eq("  rip is the instruction", (long)user.rip, (long)at(u_syscall));

    check_eq("register the syscall callback", callback_register(CALLBACKTYPE_syscall, CALLBACKF_mask_events, trap_258), 0);
    user.rax = 0x1234, user.rsi = 0x5678, user.r8 = 0x9abc, user.r15 = 0xdef0, user.rbx = 0x1111;
    run(u_syscall, 0x2222);
    left_by("a system call", VECTOR_SYSCALL);
    check_eq("  rip is behind the instruction", (long)user.rip, (long)at(u_syscall_end));
    check_eq("  rcx is too", (long)user.rcx, (long)at(u_syscall_end));
    check_eq("  r11 is rflags, IF set", (long)user.r11, FLAG_IF | 2);
    check_eq("  rflags in the frame, IF clear as upcalls are masked", (long)user.rflags, 2);
    check_eq("  cs, and the upcall mask", (long)user.cs, USER_CS | 1l << 32);
    check_eq("  ss", (long)user.ss, USER_SS);
    check_eq("  rsp", (long)user.rsp, USER_STACK);
    check_eq("  rax", (long)user.rax, 0x1234);
    check_eq("  rdi", (long)user.rdi, 0x2222);
    check_eq("  rsi", (long)user.rsi, 0x5678);
    check_eq("  r8", (long)user.r8, 0x9abc);
    check_eq("  r15", (long)user.r15, 0xdef0);
    check_eq("  rbx", (long)user.rbx, 0x1111);

    user.rcx = 0x77, user.r11 = 0x88;
    run(u_int80, 0);
    left_by("int $0x80 with a gate for users", 0x80);
    check_eq("  rip is behind the instruction", (long)user.rip, (long)at(u_int80_end));
    check_eq("  rcx came through iret and the trap", (long)user.rcx, 0x77);
    check_eq("  r11 too", (long)user.r11, 0x88);
    run(u_int3, 0);
    left_by("int3 with a gate for users", VECTOR_BP);
    check_eq("  rip is behind the instruction", (long)user.rip, (long)at(u_int3) + 1);

    bool emulated = option("emulated-int");
    run(u_int21, 0);
    left_by("int $0x21 with a gate for users", emulated ? 0x42 : 0x21);
    check_eq("  rip is behind the instruction", (long)user.rip, (long)at(u_int21_end));
    trap_set(0x21, 1 | TRAP_MASKS_UPCALLS, trap_0x21);
    trap_set(0x42, 1 | TRAP_MASKS_UPCALLS, trap_0x42);
    run(u_int21, 0);
    faulted("int $0x21 with a gate for the kernel alone", VECTOR_GP, emulated ? 0x212 : 0x10a);
    check_eq("  rip is the instruction", (long)user.rip, (long)at(u_int21));

    run(u_sysenter, 0);
    print("# sysenter with no callback registered\n");
    /* Processors differ on sysenter in long mode: AMD's refuse it, on Intel's Xen does. */
    check_eq("  vector, #GP or #UD", user.vector == VECTOR_GP || user.vector == VECTOR_UD, 1);
}

static void faults(void)
{
    run(u_read, 0x700000);
    faulted("read of an unmapped page", VECTOR_PF, 4);
    check_eq("  cr2", (long)shared_info->vcpu[0].cr2, 0x700000);
    check_eq("  rip is the instruction", (long)user.rip, (long)at(u_read));
    run(u_write, 0x700008);
    faulted("write to an unmapped page", VECTOR_PF, 6);
    check_eq("  cr2", (long)shared_info->vcpu[0].cr2, 0x700008);
    run(u_write, USER_CODE);
    faulted("write to a read-only page", VECTOR_PF, 7);
    run(u_jump, USER_DATA);
    faulted("a jump to a no-execute page", VECTOR_PF, 0x15);
    run(u_read, (u64)data);
    faulted("read of the kernel's memory, which is not in the user's tables", VECTOR_PF, 4);
    run(u_read, 0xffff830000000000);
    left_by("read of Xen's memory", VECTOR_PF);
    run(u_read, 1ul << 63);
    faulted("read of a non-canonical address", VECTOR_GP, 0);
    run(u_ud2, 0);
    left_by("ud2", VECTOR_UD);
    run(u_hlt, 0);
    faulted("hlt", VECTOR_GP, 0);
    run(u_read, USER_DATA);
    left_by("read of the user's data", VECTOR_SYSCALL);

    user.rip = at(u_nop), user.rsp = USER_STACK, user.cs = USER_CS, user.ss = USER_SS, user.rflags = FLAG_TF | 2;
    run_user(&user);
    left_by("a single step", VECTOR_DB);
    check_eq("  rip is behind the first instruction", (long)user.rip, (long)at(u_nop) + 1);
    check_eq("  TF is in the frame", (long)(user.rflags & FLAG_TF), FLAG_TF);
    check_eq("  but not in the kernel", (long)(entry_rflags & FLAG_TF), 0);

    HYPERCALL(HC_fpu_taskswitch, 1);
    run(u_fninit, 0);
    left_by("x87 with TS set", VECTOR_NM);
    HYPERCALL(HC_fpu_taskswitch, 0);
    run(u_fninit, 0);
    left_by("x87 with TS clear", VECTOR_SYSCALL);
    run(u_rdtsc, 0);
    left_by("rdtsc", VECTOR_SYSCALL);
}

static void flags(void)
{
    user.rip = at(u_syscall), user.rsp = USER_STACK, user.cs = USER_CS, user.ss = USER_SS;
    user.rflags = FLAG_IF | FLAG_DF | 2;
    run_user(&user);
    left_by("a system call with DF and IF set", VECTOR_SYSCALL);
    check_eq("  rflags in the frame", (long)user.rflags, FLAG_IF | FLAG_DF | 2);
    check_eq("  the upcall mask in the frame", (long)user.cs, USER_CS);
    check_eq("  the callback's flag masks upcalls", (long)entry_upcall_mask, 1);
    shared_info->vcpu[0].upcall_mask = 1;
    run(u_popf, 0x3202);
    left_by("popf in user mode", VECTOR_SYSCALL);
    check_eq("  it cannot change IOPL", (long)(user.rax & 0x3000), 0);

    struct {
        u32 iopl;
    } set = {0};
    run(u_cli, 0);
    faulted("cli", VECTOR_GP, 0);
    run(u_in, 0);
    faulted("in", VECTOR_GP, 0);
    set.iopl = 3;
    check_eq("physdev_op set_iopl 3", HYPERCALL(HC_physdev_op, PHYSDEVOP_set_iopl, &set), 0);
    run(u_cli, 0);
    left_by("cli with IOPL 3", VECTOR_SYSCALL);
    run(u_sti, 0);
    left_by("sti with IOPL 3", VECTOR_SYSCALL);
    user.rax = 0;
    run(u_in, 0);
    left_by("in with IOPL 3", VECTOR_SYSCALL);
    check_eq("  a port that is not ours reads as ones", (long)user.rax, 0xff);
    set.iopl = 4;
    check_eq("physdev_op set_iopl 4", HYPERCALL(HC_physdev_op, PHYSDEVOP_set_iopl, &set), -EINVAL);
    set.iopl = 0;
    check_eq("physdev_op set_iopl 0", HYPERCALL(HC_physdev_op, PHYSDEVOP_set_iopl, &set), 0);
    run(u_in, 0);
    faulted("in", VECTOR_GP, 0);
}

static u64 read_gs(void)
{
    u64 value;
    __asm__ volatile("mov %%gs:0, %0" : "=r"(value));
    return value;
}

static void segment_bases(void)
{
    static u64 kernel_word = 0x6b65726e656c, fs_word = 0x6673;
    u64 value;
    ((u64 *)data)[0] = 0x75736572;
    ((u64 *)data)[1] = 0x6f74686572;
    print("# segment bases\n");
    TRY("wrmsr", : : "a"((u32)(u64)&kernel_word), "d"((u64)&kernel_word >> 32), "c"(0xc0000101) : "memory");
    check_eq("  set the kernel's GS base by wrmsr", (long)fault.vector, NO_FAULT);
    check_eq("  it is in force", (long)read_gs(), (long)kernel_word);
    check_eq("  set the user's", HYPERCALL(HC_set_segment_base, SEGBASE_GS_USER, USER_DATA), 0);
    check_eq("  which does not touch ours", (long)read_gs(), (long)kernel_word);
    run(u_gs, 0);
    check_eq("  the user has the user's", (long)user.rax, 0x75736572);
    check_eq("  and we have ours again", (long)read_gs(), (long)kernel_word);
    check_eq("  SEGBASE_GS_KERNEL", HYPERCALL(HC_set_segment_base, SEGBASE_GS_KERNEL, &fs_word), 0);
    check_eq("  it is in force", (long)read_gs(), (long)fs_word);
    run(u_gs, 0);
    check_eq("  the user's is as before", (long)user.rax, 0x75736572);
    check_eq("  SEGBASE_FS", HYPERCALL(HC_set_segment_base, SEGBASE_FS, &fs_word), 0);
    __asm__ volatile("mov %%fs:0, %0" : "=r"(value));
    check_eq("  it is in force", (long)value, (long)fs_word);
    HYPERCALL(HC_set_segment_base, SEGBASE_FS, USER_DATA + 8);
    run(u_fs, 0);
    check_eq("  the user has the same FS base", (long)user.rax, 0x6f74686572);
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(0xc0000100));
    check_eq("  rdmsr shows it", (long)((u64)high << 32 | low), USER_DATA + 8);
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(0xc0000102));
    check_eq("  rdmsr of KERNEL_GS_BASE shows the user's", (long)((u64)high << 32 | low), USER_DATA);
    check_eq("  SEGBASE_GS_USER_SEL", HYPERCALL(HC_set_segment_base, SEGBASE_GS_USER_SEL, 0), 0);
    check_eq("  a non-canonical FS base", HYPERCALL(HC_set_segment_base, SEGBASE_FS, 1ul << 63), -EINVAL);
    check_eq("  a non-canonical user GS base", HYPERCALL(HC_set_segment_base, SEGBASE_GS_USER, 1ul << 63), -EINVAL);
    check_eq("  a non-canonical kernel GS base", HYPERCALL(HC_set_segment_base, SEGBASE_GS_KERNEL, 1ul << 63), -EINVAL);
    check_eq("  an unknown base", HYPERCALL(HC_set_segment_base, 4, 0), -EINVAL);
    TRY("wrmsr", : : "a"(0), "d"(0x80000000), "c"(0xc0000100) : "memory");
    check_eq("  wrmsr of a non-canonical FS base", (long)fault.vector, VECTOR_GP);
}

static void compatibility_mode(void)
{
    user.rip = at(u_32), user.rsp = USER_STACK, user.cs = FLAT_RING3_CS32, user.ss = USER_SS, user.rflags = 2;
    user.rax = 0xffffffff12345678;
    run_user(&user);
    left_by("32-bit code", 0x80);
    check_eq("  rip is behind the instruction", (long)user.rip, (long)at(u_32_end));
    check_eq("  cs", (long)(user.cs & 0xffff), FLAT_RING3_CS32);
    check_eq("  push and pop of 32 bits", (long)user.rcx, 0x12345678);
    check_eq("  rsp", (long)user.rsp, USER_STACK);
}

static void events(void)
{
    long port = evtchn_bind_ipi(0);
    check_eq("bind an IPI channel", port > 0, 1);
    evtchn_unmask((u32)port);
    check_eq("send", evtchn_send((u32)port), 0);
    check_eq("  pending, and masked in the kernel", shared_info->vcpu[0].upcall_pending, 1);
    run(u_nop, 0);
    left_by("user mode with upcalls masked: no upcall", VECTOR_SYSCALL);
    user.rip = at(u_nop), user.rsp = USER_STACK, user.cs = USER_CS, user.ss = USER_SS, user.rflags = FLAG_IF | 2;
    run_user(&user);
    left_by("user mode with upcalls on: the upcall comes first", VECTOR_EVENT);
    check_eq("  rip is the first instruction", (long)user.rip, (long)at(u_nop));
    check_eq("  cs, and the upcall mask", (long)user.cs, USER_CS);
    check_eq("  the upcall masks upcalls", (long)entry_upcall_mask, 1);
}

static void stacks(void)
{
    static u8 other[1024] __attribute__((aligned(16)));
    memset(other, 0, sizeof other);
    check_eq("stack_switch to a stack that is not aligned", HYPERCALL(HC_stack_switch, FLAT_RING3_SS, other + 1000), 0);
    run(u_ud2, 0);
    left_by("ud2", VECTOR_UD);
    /* ss is the first word below the pointer rounded down to 16, rsp the second. */
    check_eq("  the frame is on it, aligned: ss", *(long *)(other + 992 - 8), USER_SS);
    check_eq("  rsp", *(long *)(other + 992 - 16), USER_STACK);
    check_eq("stack_switch with a selector of Xen's is put right, not refused",
             HYPERCALL(HC_stack_switch, 0xe010, kernel_stack + sizeof kernel_stack), 0);
    run(u_syscall, 0);
    left_by("a system call", VECTOR_SYSCALL);
    TRY("mov %%ss, %0", : "=r"(user.rax));
    check_eq("  ss has RPL 3", (long)(user.rax & 3), 3);
}

int main(void)
{
    traps_install();
    events_quiet();
    check_eq("register the event callback", callback_register(CALLBACKTYPE_event, 0, trap_256), 0);
    build_user_tables();
    system_calls();
    faults();
    flags();
    segment_bases();
    compatibility_mode();
    events();
    stacks();
    return 0;
}
