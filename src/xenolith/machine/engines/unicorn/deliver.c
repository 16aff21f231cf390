/* Between Unicorn's hooks and the trap handlers: a trap goes to the vCPU's native handler first, and to Python if that
   leaves it.  Called by stubs.INTERRUPT, INVALID and SYSTEM_CALL. */

static bool in_user_mode(const struct hook *hook)
{
    return !(*(const u32 *)(hook->env + HFLAGS) & HF_KERNEL);
}

/* Whether guest code goes on here: not in guest-user mode of an address space that runs elsewhere (user/cpu.py). */
static bool goes_on(struct hook *hook)
{
    if (!hook->wanted || hook->stays || !in_user_mode(hook)
        || !hook->wanted[*(const u64 *)(hook->env + CR3) >> PAGE_SHIFT])
        return true;
    hook->to_user = true;
    return false;
}

static bool deliver(u32 vector, u64 error_code, u64 address, struct hook *hook, bool (*python)(u32, u64, u64))
{
    if (hook->vcpu) {
        if (hook->stays && in_user_mode(hook))
            hook->stays = false;
        int answer = hook->handler(hook->vcpu, vector, error_code, address);
        if (answer == LOOK)
            return python(TRAP_NOTHING, 0, 0);
        if (answer != NOT_HANDLED)
            return answer && goes_on(hook);
    }
    return python(vector, error_code, address);
}

bool deliver_interrupt(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    return deliver(vector, error_code, address, hook, hook->interrupt);
}

bool deliver_cpuid(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    return hook->cpuid_is_pythons ? hook->cpuid(vector, error_code, address)
                                  : deliver(vector, error_code, address, hook, hook->cpuid);
}

/* An undefined opcode may be one that is carried out here: see extended.c. */
bool deliver_invalid(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    if (hook->extended && vector == VECTOR_UD && hook->carry_out(hook->extended))
        return true;
    return hook->invalid(vector, error_code, address);
}

bool deliver_system_call(u32 vector, u64 error_code, u64 address, struct hook *hook)
{
    return deliver(vector, error_code, address, hook, hook->system_call);
}
