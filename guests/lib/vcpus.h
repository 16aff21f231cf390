/* More vCPUs than the first: bringing one up, and waiting for what it does. */
#ifndef GUEST_VCPUS_H
#define GUEST_VCPUS_H

#include "events.h"
#include "timing.h"
#include "traps.h"

#define VGCF_IN_KERNEL 4

struct vcpu_context {
    u8 fpu[512];
    u64 flags;
    struct {
        u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
        u32 error_code, entry_vector;
        u64 rip;
        u16 cs, pad0;
        u8 saved_upcall_mask, pad1[3];
        u64 rflags, rsp;
        u16 ss, pad2[3], es, pad3[3], ds, pad4[3], fs, pad5[3], gs, pad6[3];
    } regs;
    struct trap_info traps[256];
    u64 ldt_base, ldt_ents;
    u64 gdt_frames[16], gdt_ents;
    u64 kernel_ss, kernel_sp;
    u64 ctrlreg[8], debugreg[8];
    u64 event_callback, failsafe_callback, syscall_callback;
    u64 vm_assist;
    u64 fs_base, gs_base_kernel, gs_base_user;
};
_Static_assert(__builtin_offsetof(struct vcpu_context, traps) == 720, "public ABI");
_Static_assert(sizeof(struct vcpu_context) == 5168, "public ABI");

static inline long vcpu_op(long op, long vcpu, void *arg) { return HYPERCALL(HC_vcpu_op, op, vcpu, arg); }

/* A context that begins at `entry`, on our page tables and with our trap table. */
static inline void vcpu_context_fill(struct vcpu_context *context, u64 entry, u8 *stack_end)
{
    memset(context, 0, sizeof *context);
    context->flags = VGCF_IN_KERNEL;
    context->regs.rip = entry;
    context->regs.cs = FLAT_RING3_CS64;
    context->regs.ss = FLAT_RING3_SS;
    context->regs.rflags = 0x202;
    context->regs.rsp = (u64)stack_end - 8;
    context->kernel_ss = FLAT_RING3_SS;
    context->kernel_sp = (u64)stack_end;
    context->ctrlreg[3] = va_to_mfn((void *)start_info->pt_base) << PAGE_SHIFT;
    for (int i = 0; trap_table[i].address; i++)
        context->traps[trap_table[i].vector] = trap_table[i];
    context->syscall_callback = (u64)trap_258;
}

/* Wait for another vCPU to do something; true if it did. Yields, so that one pCPU is enough. */
static inline bool wait_until(const volatile u64 *word, u64 value)
{
    u64 start = now_ns();
    while (*word != value && now_ns() - start < 20000 * MS)
        HYPERCALL(HC_sched_op, SCHEDOP_yield, 0);
    return *word == value;
}

#endif
