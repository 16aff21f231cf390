/* Between Unicorn's hooks and the trap handlers: a trap goes to the vCPU's native handler first, and to Python if that
   leaves it.  Called by stubs.INTERRUPT, INVALID and SYSTEM_CALL. */

static bool in_user_mode(const struct hook *hook)
{
    return !(*(const u32 *)(hook->env + HFLAGS) & HF_KERNEL);
}

/* Whether translated code may have changed: a frame of it may have been written to where guest-user mode runs. */
static bool code_may_have_changed(const struct hook *hook)
{
    u64 both = 0;
    for (u64 i = 0; i + 8 <= hook->frames; i += 8)
        both |= load64(hook->marked + i) & load64(hook->writable + i);
    for (u64 i = hook->frames & ~7ull; i < hook->frames; i++)
        both |= hook->marked[i] & hook->writable[i];
    return both;
}

/* Whether guest code goes on here: not in guest-user mode of an address space that runs elsewhere, nor before code that
   was changed there is known (user/cpu.py).  Native code may run it elsewhere until guest-kernel mode goes on here. */
static bool goes_on(struct hook *hook)
{
    if (!hook->wanted || !in_user_mode(hook))
        return true;
    bool elsewhere = !hook->stays && hook->wanted[*(const u64 *)(hook->env + CR3) >> PAGE_SHIFT];
    if (elsewhere && hook->run_user) {
        if (hook->run_user(hook->user) == KERNEL)
            return true;
    } else if (!elsewhere && hook->distrusts && hook->frames)
        hook->distrusts = code_may_have_changed(hook);
    if (!elsewhere && !hook->distrusts)
        return true;
    hook->to_user = true;
    return false;
}

/* Guest-user mode traps, and goes on: how long it has run, but for translation, and how often trapped (a page fault
   counts more), in the address space where it was last. */
static void leave_user_mode(struct hook *hook, u32 vector)
{
    if (!hook->wanted || !in_user_mode(hook))
        return;
    u64 l4 = *(const u64 *)(hook->env + CR3) >> PAGE_SHIFT;
    if (l4 != hook->user_l4) {
        hook->user_l4 = l4;
        hook->user_ticks = hook->user_traps = 0;
    }
    hook->user_ticks += __builtin_ia32_rdtsc() - hook->user_since - (*hook->translating - hook->translated);
    hook->user_traps += vector == VECTOR_PF ? EXCEPTION : 1;
}

static bool enter_user_mode(struct hook *hook)
{
    if (hook->wanted && in_user_mode(hook)) {
        hook->user_since = __builtin_ia32_rdtsc();
        hook->translated = *hook->translating;
    }
    return true;
}

/* The next instruction begins: does the guest single-step it? */
static bool note_steps(struct hook *hook, bool more)
{
    if (hook->watches)
        hook->steps = hook->get_rflags() & EFLAGS_TF;
    return more;
}

/* What a program is not told of, see features.UNTOLD. */
static void hide_features(struct hook *hook, u32 leaf)
{
    static const u8 places[] = {RAX, RBX, RCX, RDX};
    for (u32 i = 0; i < hook->untold_count; i++)
        for (int n = 0; n < 4 && hook->untold[i][0] == leaf; n++)
            hook->regs[places[n]] &= ~(u64)hook->untold[i][1 + n];
}

static bool deliver(u32 vector, u64 error_code, u64 address, struct hook *hook, bool (*python)(u32, u64, u64))
{
    u32 leaf = (u32)hook->regs[RAX];
    bool user = in_user_mode(hook);
    leave_user_mode(hook, vector);
    hook->far_transfers = 0;
    if (hook->vcpu) {
        if (hook->stays && in_user_mode(hook))
            hook->stays = false;
        int answer = hook->handler(hook->vcpu, vector, error_code, address);
        if (vector == TRAP_CPUID && user && answer != NOT_HANDLED)
            hide_features(hook, leaf);
        if (answer == LOOK)
            return python(TRAP_NOTHING, 0, 0) && enter_user_mode(hook);
        if (answer != NOT_HANDLED)
            return answer && goes_on(hook) && enter_user_mode(hook);
    }
    return python(vector, error_code, address) && enter_user_mode(hook);
}

bool deliver_interrupt(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    if (hook->watches) { /* as watchpoints.Watcher.trap has it, which is the reference */
        u64 *dr6 = (u64 *)(hook->env + DR6), hits = hook->watch_hits;
        hook->watch_hits = 0;
        if (vector == VECTOR_DB && *dr6 & DR6_STEP) {
            *dr6 = (*dr6 & ~(u64)(hook->steps ? 0 : DR6_STEP)) | hits;
            if (!hook->steps && !(*dr6 & DR6_BREAKPOINTS))
                return note_steps(hook, true);
            address = *dr6;
        }
    }
    return note_steps(hook, deliver(vector, error_code, address, hook, hook->interrupt));
}

bool deliver_cpuid(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    return note_steps(hook, hook->cpuid_is_pythons ? hook->cpuid(vector, error_code, address)
                                                   : deliver(vector, error_code, address, hook, hook->cpuid));
}

/* IRETQ from Xen's own flat selectors to the same ones, which a kernel executes by the hundred thousand (Linux's
   sync_core), as segment_loads._iret has it, which is the reference. False, with nothing changed: it is something else, or
   not as simple as that. */
static bool iret(struct hook *hook)
{
    u64 *regs = hook->regs, rip = regs[RIP], rsp = regs[RSP], words[5], l4 = *(const u64 *)(hook->env + CR3);
    u32 hflags = *(const u32 *)(hook->env + HFLAGS);
    if (!(hflags & HF_CS64) || (regs[CS] & 0xffff) != FLAT_RING3_CS64
        || (regs[SS] & 0xffff) != FLAT_RING3_SS64 || !is_canonical(rip) || !is_canonical(rsp) || (rip & 0xfff) == 0xfff
        || (rsp & 0xfff) > 0x1000 - sizeof words)
        return false;
    u64 code = walk(hook->memory, hook->memory_size, l4, rip, READ, 0);
    if (!code || hook->memory[code + (rip & 0xfff)] != 0x48 || hook->memory[code + (rip & 0xfff) + 1] != OPCODE_IRET)
        return false;
    u64 stack = walk(hook->memory, hook->memory_size, l4, rsp, READ, 0);
    if (!stack)
        return false;
    __builtin_memcpy(words, hook->memory + stack + (rsp & 0xfff), sizeof words);
    u64 flags = hook->get_rflags();
    if ((words[1] & 0xffff) != FLAT_RING3_CS64 || (words[4] & 0xffff) != FLAT_RING3_SS64 || !is_canonical(words[0])
        || (flags | words[2]) & (EFLAGS_TF | EFLAGS_NT | EFLAGS_RF | EFLAGS_VM))
        return false;
    regs[RIP] = words[0];
    regs[RSP] = words[3];
    hook->set_rflags((flags & KEPT_FLAGS) | (words[2] & EFLAGS_DEFINED & ~(u64)KEPT_FLAGS));
    hook->kernels_far_transfers += !in_user_mode(hook);
    hook->far_transfers++;
    hook->serializes |= hook->far_transfers > SERIALIZES;
    return true;
}

/* An undefined opcode may be one that is carried out here (see extended.c), or an IRET, which vex.py has made one. */
bool deliver_invalid(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    bool done = vector == VECTOR_UD && ((hook->extended && hook->carry_out(hook->extended)) || iret(hook));
    return note_steps(hook, done || hook->invalid(vector, error_code, address));
}

bool deliver_system_call(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    return note_steps(hook, deliver(vector, error_code, address, hook, hook->system_call));
}
