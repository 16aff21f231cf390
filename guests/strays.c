/*
 * Code that goes astray: random instructions in user mode, from random registers, flags and selectors, `runs` of them from
 * a `seed`; then one entry of the kernel that has every reason to fail.  With `gates` each begins with a way into the
 * kernel, whose trap table, stack, callbacks and masks are others each time, and the kernel returns to itself with random
 * frames.  Whatever happens must be a trap or the end of this domain.
 */
#include "timing.h"

#include "events.h"
#include "paging.h"
#include "random.h"
#include "traps.h"

#define USER_CODE 0x400000ul
#define USER_DATA 0x401000ul
#define USER_STACK 0x402800ul
#define MINE 0x13
#define COMPATIBLE 0x23
#define SIXTEEN 0x33
#define XENS_DATA 0xe02b

static u64 *user_l4;
static u8 *code, *data;
static struct regs user;
static u32 timer;
static u8 kernel_stack[4096] __attribute__((aligned(16))), return_stack[4096] __attribute__((aligned(16)));

#define PICK(array) array[below(LENGTH(array))]

/* Beginnings of instructions that an engine or ring 0 has to do with; what follows is random. */
static const u8 openings[][6] = {
    {1, 0xcf}, {2, 0x48, 0xcf}, {2, 0x66, 0xcf}, {1, 0xcb}, {2, 0x48, 0xcb}, {1, 0xca}, {2, 0xff, 0x2b}, {3, 0x48, 0xff, 0x2b},
    {2, 0xff, 0x1b}, {3, 0x48, 0xff, 0x1c}, {1, 0xea}, {1, 0x9a}, {1, 0x9d}, {2, 0x66, 0x9d}, {2, 0x0f, 0x05}, {2, 0x0f, 0x34},
    {1, 0xcd}, {1, 0xcc}, {1, 0xce}, {1, 0xf1}, {2, 0x0f, 0xa2}, {5, 0x0f, 0x0b, 'x', 'e', 'n'}, {3, 0x0f, 0x01, 0xd0},
    {3, 0x0f, 0x01, 0xd1}, {2, 0x0f, 0x01}, {2, 0x0f, 0x00}, {2, 0x0f, 0xae}, {3, 0x48, 0x0f, 0xae}, {3, 0x48, 0x0f, 0xc7},
    {3, 0xf3, 0x0f, 0xae}, {4, 0xf3, 0x48, 0x0f, 0xae}, {1, 0xc5}, {1, 0xc4}, {1, 0x62}, {1, 0x8e}, {1, 0x8c}, {2, 0x0f, 0xa1},
    {2, 0x0f, 0xa9}, {1, 0x1f}, {1, 0x07}, {1, 0x17}, {2, 0x0f, 0xb2}, {2, 0x0f, 0xb4}, {2, 0x0f, 0xb5}, {1, 0xf4}, {1, 0xfa},
    {1, 0xec}, {1, 0xe4}, {1, 0x6c}, {2, 0xf3, 0x6e}, {2, 0x0f, 0x20}, {2, 0x0f, 0x23}, {2, 0x0f, 0x30}, {2, 0x0f, 0x32},
    {2, 0x0f, 0x33}, {2, 0x0f, 0x31}, {2, 0x0f, 0x02}, {2, 0x0f, 0x03}, {1, 0xf0}, {2, 0x48, 0xa1}, {2, 0xf3, 0xa4},
    {2, 0xf3, 0xab}, {1, 0xd9}, {1, 0xdb}, {2, 0x0f, 0x77}, {2, 0x0f, 0x6f}, {3, 0x66, 0x0f, 0x6f}, {2, 0x0f, 0x0d}, {1, 0xc8},
};

/* Ways into the kernel. */
static const u8 gates[][8] = {
    {2, 0xcd, 0x80}, {2, 0xcd, 0x21}, {2, 0xcd, 0x42}, {2, 0xcd, 0x03}, {2, 0xcd, 0x0e}, {2, 0xcd, 0x82}, {1, 0xcc}, {1, 0xf1},
    {2, 0x0f, 0x05}, {2, 0x0f, 0x34}, {2, 0x0f, 0x0b}, {1, 0xf4}, {1, 0xfa}, {1, 0xfb}, {4, 0x31, 0xc9, 0xf7, 0xf1}, {1, 0x50},
    {3, 0x48, 0x8b, 0x00}, {3, 0x48, 0x89, 0x03}, {4, 0x48, 0x8b, 0x04, 0x24}, {3, 0x48, 0x8b, 0x45}, {2, 0xff, 0xe0}, {1, 0xc3},
    {2, 0x48, 0xcf}, {1, 0x9d}, {2, 0xe4, 0x61}, {2, 0x0f, 0xa2}, {2, 0xd9, 0xf0}, {2, 0x0f, 0x06}, {3, 0x0f, 0x01, 0xf8},
    {2, 0x8e, 0xd0}, {2, 0x8e, 0xd8}, {3, 0x0f, 0x22, 0xd8}, {4, 0x66, 0x0f, 0x6f, 0x00}, {2, 0xdb, 0xe3}, {2, 0x0f, 0xff},
};

static u64 address(void)
{
    static const u64 places[] = {
        0, USER_CODE, USER_DATA, USER_DATA + 0xff8, USER_STACK, 0x7fffffffffc0, 0x800000000000, 0xffff7fffffffff80,
        0xffff800000000000, 0xffff803fffffff80, 0xffff808000000000, 0xffff808040000000, 0xffff810000000000, 0xffff87ffffffffc0,
        0xffff880000000000, 0xffffffff80100000, 0xfffffffffffffe00, 0xffffffffffffffc0, 0xfffffffffffffff8, 0xfffffffc,
    };
    return below(3) ? PICK(places) + below(4) * 8 : below(2) ? next() : USER_DATA + below(512) * 8;
}

static u64 selector(void)
{
    static const u16 some[] = {0, 3, MINE, 0x1b, COMPATIBLE, SIXTEEN, 0x2b, 0x3b, 0x43, 7, 15, 0xe023, 0xe02b, 0xe033, 0xe030, 0xffff};
    return below(8) ? PICK(some) : next() & 0xffff;
}

static void scramble(void)
{
    u64 *registers = (u64 *)&user, length = 0;
    for (u64 i = 0; i < 15; i++)
        registers[i] = address();
    user.rax = below(2) ? next() & 7 : address();
    user.rcx = below(2) ? below(16) : address(), user.r11 = next();
    static const u16 code_selectors[] = {FLAT_RING3_CS64, FLAT_RING3_CS64, MINE, COMPATIBLE, 0xe023, SIXTEEN};
    user.cs = below(16) ? PICK(code_selectors) : selector() | 3;
    user.ss = below(4) ? XENS_DATA : selector();
    user.rip = below(32) ? USER_CODE + below(64) : address();
    user.rsp = below(4) ? USER_STACK : address();
    user.rflags = 0x202 | (below(4) ? 0 : next() & 0x3fffff);
    for (u64 i = 0; i < 512; i++)
        ((u64 *)data)[i] = below(3) ? selector() : address();
    if (option("gates")) {
        const u8 *gate = PICK(gates);
        user.rip = below(16) ? USER_CODE : user.rip;
        for (u64 i = 0; i < gate[0]; i++)
            code[length++] = gate[1 + i];
    }
    while (length < 96) {
        const u8 *opening = PICK(openings);
        if (below(4))
            for (u64 i = 0; i < opening[0]; i++)
                code[length++] = opening[1 + i];
        for (u64 i = below(6); i; i--)
            code[length++] = (u8)next();
    }
    memset(code + length, 0xf4, 64);
}

static void build(void)
{
    user_l4 = page_alloc();
    u64 *t3 = page_alloc(), *t2 = page_alloc(), *t1 = page_alloc(), *gdt = page_alloc(), *ldt = page_alloc();
    u8 *stack = page_alloc();
    code = page_alloc(), data = page_alloc();
    user_l4[0] = entry(t3, PTE_TABLE), t3[0] = entry(t2, PTE_TABLE), t2[USER_CODE >> 21] = entry(t1, PTE_TABLE);
    t1[0] = entry(code, PTE_KERNEL | PTE_U), t1[1] = entry(data, PTE_KERNEL | PTE_U), t1[2] = entry(stack, PTE_KERNEL | PTE_U);
    set_read_only(user_l4), set_read_only(t3), set_read_only(t2), set_read_only(t1);
    check_eq("pin the user's L4", mmuext(MMUEXT_PIN_L4_TABLE, va_to_mfn(user_l4), 0), 0);
    check_eq("NEW_USER_BASEPTR", mmuext(MMUEXT_NEW_USER_BASEPTR, va_to_mfn(user_l4), 0), 0);
    static const u64 descriptors[] = {
        0, 0, 0x00affb000000ffff, 0x00cff3000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff, 0x000ffb000000ffff,
        0x40c0f3401000ffff, 0x00cf7b000000ffff, 0x00affe000000ffff, 0x0040f30000000fff,
    };
    for (u64 i = 0; i < LENGTH(descriptors); i++)
        gdt[i] = ldt[i] = descriptors[i];
    set_read_only(gdt), set_read_only(ldt);
    u64 frames[1] = {va_to_mfn(gdt)};
    check_eq("set_gdt", HYPERCALL(HC_set_gdt, frames, 512), 0);
    check_eq("SET_LDT", mmuext(MMUEXT_SET_LDT, (u64)ldt, 16), 0);
    check_eq("stack_switch", HYPERCALL(HC_stack_switch, XENS_DATA, kernel_stack + sizeof kernel_stack), 0);
    check_eq("syscall", callback_register(CALLBACKTYPE_syscall, CALLBACKF_mask_events, trap_258), 0);
    check_eq("syscall32", callback_register(CALLBACKTYPE_syscall32, CALLBACKF_mask_events, trap_258), 0);
    check_eq("sysenter", callback_register(CALLBACKTYPE_sysenter, CALLBACKF_mask_events, trap_259), 0);
    check_eq("event", callback_register(CALLBACKTYPE_event, CALLBACKF_mask_events, trap_256), 0);
}

/* What a kernel may change of its own entries, within what it can bear. */
static void change_gates(void)
{
    struct trap_info table[32];
    u64 length = 0;
    for (const struct trap_info *t = trap_table; t->address; t++) {
        table[length] = *t;
        table[length++].flags = (u8)(next() & (t->vector < 20 && 0x27d00 >> t->vector & 1 ? 4 : 7)); /* INT n has no error code */
    }
    table[length] = (struct trap_info){0, 0, 0, 0};
    HYPERCALL(HC_set_trap_table, table);
    HYPERCALL(HC_stack_switch, below(4) ? XENS_DATA : 0, kernel_stack + sizeof kernel_stack - below(512));
    callback_register(CALLBACKTYPE_syscall, (u16)below(2), trap_258);
    callback_register(CALLBACKTYPE_syscall32, (u16)below(2), trap_258);
    callback_register(CALLBACKTYPE_sysenter, (u16)below(2), trap_259);
    callback_register(CALLBACKTYPE_event, (u16)below(2), trap_256);
    HYPERCALL(HC_vm_assist, below(2), below(8) ? 4 : 5); /* architectural_iopl among them */
    u32 iopl = (u32)below(4);
    HYPERCALL(HC_physdev_op, 6, &iopl);
    HYPERCALL(HC_set_segment_base, below(3), below(2) ? USER_DATA : next() & 0x7fffffffffff);
    HYPERCALL(HC_fpu_taskswitch, below(2));
    shared_info->vcpu[0].upcall_mask = (u8)below(2);
}

static void forget_events(void)
{
    shared_info->vcpu[0].upcall_pending = 0;
    __atomic_exchange_n(&shared_info->vcpu[0].pending_selector, 0, __ATOMIC_SEQ_CST);
    evtchn_clear(timer);
}

static bool in_the_kernel(struct regs *regs)
{
    if (regs->vector != VECTOR_EVENT)
        return false;
    forget_events();
    return true;
}

/* Return to ourselves with a frame that may be anything but user mode's. */
static void return_to_kernel(void)
{
    static const u64 some[] = {0xe030, 0xe031, 0xe030, MINE & ~3ul, 0xe020, COMPATIBLE & ~3ul, SIXTEEN & ~3ul};
    u64 *top = (u64 *)(return_stack + sizeof return_stack) - 1;
    u64 flags = below(2) ? 2 : below(2) ? next() & 0x3fffff : next();
    u64 frame[9] = {next(), next(), next(), below(2) << 8, (u64)iret_raw_landed, below(8) ? PICK(some) : selector() & ~3ul,
                    flags, (u64)top, below(4) ? XENS_DATA : selector()};
    shared_info->vcpu[0].upcall_mask = 1; /* what is below this frame is in use */
    fault_elsewhere = (u64)iret_raw_faulted;
    iret_raw(frame);
    fault_elsewhere = 0;
    __asm__ volatile("push $2; popf" : : : "memory", "cc");
}

int main(void)
{
    u64 runs = option_value("runs", 100), vectors[260] = {0}, kinds = 0;
    random_seed(option_value("seed", 1));
    traps_install();
    events_quiet();
    build();
    timer = (u32)evtchn_bind_virq(VIRQ_TIMER, 0);
    evtchn_unmask_op(timer);
    if (option("gates"))
        trap_hook = in_the_kernel;
    for (u64 run = 0; run < runs; run++) {
        if (option("gates"))
            change_gates();
        if (option("gates") && !below(4)) {
            return_to_kernel();
            continue;
        }
        scramble();
        HYPERCALL(HC_set_timer_op, now_ns() + MS); /* code that loops */
        user.vector = 0;
        run_user(&user);
        if (user.vector == VECTOR_EVENT)
            forget_events();
        vectors[user.vector < LENGTH(vectors) ? user.vector : 0]++;
        if (option("trace"))
            print("run %lu: vector %lu error 0x%lx rip 0x%lx cs 0x%lx\n", run, user.vector, user.error, user.rip, user.cs);
        if ((user.cs & 3) != 3)
            check_eq("a frame of user mode shows RPL 3", (long)user.cs & 3, 3);
    }
    for (u64 i = 0; i < LENGTH(vectors); i++)
        kinds += vectors[i] != 0;
    check_eq("every run ended in a trap, of some kind or other", kinds > 3 || runs < 50, 1);
    report();
    console_drain();
    if (option("last")) {
        HYPERCALL(HC_stack_switch, selector(), address());
        HYPERCALL(HC_set_segment_base, below(4), address());
        struct trap_info wild[3] = {{VECTOR_GP, (u8)next(), (u16)selector(), address()}, {VECTOR_UD, 4, 0, address()}, {0, 0, 0, 0}};
        HYPERCALL(HC_set_trap_table, wild);
        scramble();
        run_user(&user);
    }
    shut_down(SHUTDOWN_poweroff);
}
