/* Entering the guest kernel: bounce.py. */

static void set_mode(struct vcpu *v, bool kernel)
{
    u64 *regs = v->calls->regs, base = regs[GS_BASE];
    regs[GS_BASE] = v->other_gs_base;
    v->other_gs_base = base;
    v->kernel_mode = kernel;
    v->calls->switch_mode(kernel ? v->kernel_l4 : v->user_l4, !kernel, v->calls->context);
}

/* Room for a frame of so many words on the guest-kernel stack below `stack`: its machine address. */
static u64 room(struct vcpu *v, u64 stack, unsigned count)
{
    stack -= 8 * count;
    return (stack & 0xfff) + 8 * count > 0x1000 ? NOWHERE : walk(v, v->kernel_l4, stack, WRITE);
}

static void enter(struct vcpu *v, u64 handler, u64 stack, u64 rflags, bool mask_events)
{
    u64 *regs = v->calls->regs;
    regs[CS] = FLAT_RING3_CS64;
    regs[SS] = FLAT_RING3_SS64;
    regs[RSP] = stack;
    regs[RIP] = handler;
    v->calls->set_rflags(rflags | ALWAYS_SET, v->calls->context);
    if (mask_events)
        ((u8 *)words(v->domain_address))[v->info + VCPU_INFO_UPCALL_MASK] = 1;
}

/* RFLAGS as a frame shows them. */
static u64 saved_flags(struct vcpu *v, u64 rflags)
{
    bool masked = ((u8 *)words(v->domain_address))[v->info + VCPU_INFO_UPCALL_MASK];
    return (rflags & SAVED_FLAGS) | (v->architectural_iopl ? v->iopl * (EFLAGS_IOPL / 3) : 0) | (masked ? 0 : EFLAGS_IF);
}

static bool bounce(struct vcpu *v, u64 handler, bool has_error_code, u64 error_code, bool mask_events)
{
    u64 *regs = v->calls->regs, rsp = regs[RSP];
    u8 *memory = (u8 *)words(v->domain_address);
    unsigned count = 7 + has_error_code;
    u64 stack = (v->kernel_mode ? rsp : v->kernel_sp) & ~15ull;
    if (!handler || v->compatibility)
        return false;
    u64 at = room(v, stack, count);
    if (at == NOWHERE)
        return false;
    u64 rflags = v->calls->get_rflags(v->calls->context);
    u64 mask = memory[v->info + VCPU_INFO_UPCALL_MASK];
    u64 selector = (v->kernel_mode ? regs[CS] & 0xfffc : (regs[CS] & 0xffff) | 3) | mask << 32;
    if (!v->kernel_mode)
        set_mode(v, true);
    u64 frame[8], *f = frame;
    *f++ = regs[RCX];
    *f++ = regs[R11];
    if (has_error_code)
        *f++ = error_code;
    *f++ = regs[RIP];
    *f++ = selector;
    *f++ = saved_flags(v, rflags);
    *f++ = rsp;
    *f++ = regs[SS] & 0xffff;
    __builtin_memcpy(memory + at, frame, 8 * count);
    enter(v, handler, stack - 8 * count, rflags & KERNEL_ENTRY_FLAGS, mask_events);
    return true;
}

static bool bounce_syscall(struct vcpu *v)
{
    u64 *regs = v->calls->regs, stack = v->kernel_sp & ~15ull;
    u8 *memory = (u8 *)words(v->domain_address);
    if (v->compatibility || !v->syscall_callback)
        return false;
    u64 at = room(v, stack, 7);
    if (at == NOWHERE)
        return false;
    u64 rflags = v->calls->get_rflags(v->calls->context), mask = memory[v->info + VCPU_INFO_UPCALL_MASK];
    u64 frame[7] = {
        regs[RIP], rflags, regs[RIP], FLAT_RING3_CS64 | mask << 32, saved_flags(v, rflags),
        regs[RSP], FLAT_RING3_SS64,
    };
    regs[RCX] = regs[RIP];
    regs[R11] = rflags;
    set_mode(v, true);
    __builtin_memcpy(memory + at, frame, sizeof frame);
    enter(v, v->syscall_callback, stack - sizeof frame, rflags & SYSCALL_FLAGS, v->syscall_masks_events);
    return true;
}
