/* The trap table, expected faults, and user mode. */
#ifndef GUEST_TRAPS_H
#define GUEST_TRAPS_H

#include "guest.h"

/* What an entry leaves on the stack; see trap-entry.S. */
struct regs {
    u64 r15, r14, r13, r12, r10, r9, r8, rbp, rdi, rsi, rdx, rbx, vector, rax, r11, rcx, error, rip, cs, rflags, rsp,
        ss;
};

#define VECTOR_DE 0
#define VECTOR_DB 1
#define VECTOR_BP 3
#define VECTOR_OF 4
#define VECTOR_UD 6
#define VECTOR_NM 7
#define VECTOR_GP 13
#define VECTOR_PF 14
#define VECTOR_MF 16
#define VECTOR_EVENT 256
#define VECTOR_SYSCALL 258
#define VECTOR_SYSENTER 259
#define NO_FAULT 999

/* One entry of set_trap_table. */
struct trap_info {
    u8 vector;
    u8 flags; /* 0-3 the privilege that INT n needs; 4 mask event upcalls on entry */
    u16 cs;
    u64 address;
};
#define TRAP_MASKS_UPCALLS 4

extern struct trap_info trap_table[];
void traps_install(void);
void trap_set(u8 vector, u8 flags, void (*entry)(void));

/* The last fault of a TRY; vector NO_FAULT if there was none. */
struct fault {
    u64 vector, error, rip, cs, rflags, rsp, cr2;
};
extern struct fault fault;

/*
 * TRY(text, operands) runs assembly text and comes out behind it, whatever happens: a fault inside is
 * noted in `fault`. A jump out of the text (to a bad address) comes back too if `fault_elsewhere` was
 * set to the address to go on at.
 */
#define TRY(text, ...)                                                             \
    do {                                                                           \
        fault.vector = NO_FAULT;                                                   \
        __asm__ volatile("771: " text "\n772:\n"                                   \
                         ".pushsection .rodata.fixups, \"a\"\n"                    \
                         ".quad 771b, 772b\n.popsection" __VA_ARGS__);             \
    } while (0)
extern u64 fault_elsewhere;

/* Called first for every trap in kernel mode; true if it dealt with it. */
extern bool (*trap_hook)(struct regs *);

void run_user(struct regs *regs);

/* trap-entry.S */
long iret_raw(u64 frame[9]);
void trap_0x21(void), trap_0x42(void), iret_raw_landed(void), iret_raw_faulted(void), trap_2(void), trap_6(void), trap_6_raw(void), trap_256(void), trap_258(void), trap_259(void);
extern u64 iret_landed_rsp, iret_landed_rax, iret_landed_rcx, iret_landed_r11, iret_landed_rflags;
extern u64 entry_rflags, entry_upcall_mask; /* as the last trap found them */
extern u64 raw_rsp, raw_cs, raw_ss, raw_frame[7];

/* callback_op */
#define CALLBACKOP_register 0
#define CALLBACKOP_unregister 1
#define CALLBACKTYPE_event 0
#define CALLBACKTYPE_failsafe 1
#define CALLBACKTYPE_syscall 2
#define CALLBACKTYPE_nmi 4
#define CALLBACKTYPE_sysenter 5
#define CALLBACKTYPE_syscall32 7
#define CALLBACKF_mask_events 1
long callback_register(u16 type, u16 flags, void (*entry)(void));

static inline u64 read_flags(void)
{
    u64 flags;
    __asm__ volatile("pushf; pop %0" : "=r"(flags));
    return flags;
}

#endif
