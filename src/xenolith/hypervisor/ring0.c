/* The domain's lock, and the way into native code: a trap, a timer that is due. */

/* Another vCPU of the domain's holds it for a microsecond, most of the time; Python for longer. */
bool try_lock(u32 *word)
{
    for (int attempts = 0; attempts < 50; attempts++) {
        if (!__atomic_load_n(word, __ATOMIC_RELAXED) && !__atomic_exchange_n(word, 1, __ATOMIC_ACQUIRE))
            return true;
        __builtin_ia32_pause();
    }
    return false;
}

static void unlock(struct domain *d)
{
    __atomic_store_n(&d->lock_word, 0, __ATOMIC_RELEASE);
}

int sched_yield(void);

/* For Python, which holds the domain's other lock: only a trap handled here can be in the way.  A batch may take
   milliseconds, so this is to be called without the interpreter's lock, on which all other domains wait. */
void wait_for_lock(u32 *word)
{
    while (!try_lock(word))
        sched_yield();
}

/* The end of what was handled: an event that is pending is delivered. */
static int finish(struct vcpu *v)
{
    struct domain *d = v->domain_address;
    const u8 *info = d->memory_address + v->info;
    int answer = v->may_run ? GO_ON : LEAVE;
    if (info[VCPU_INFO_UPCALL_PENDING] && !info[VCPU_INFO_UPCALL_MASK]) {
        if (bounce(v, v->event_callback, false, 0, true))
            d->trap_counts[COUNT_UPCALL]++;
        else
            answer = LOOK;
    }
    if (v->flush_requested) {
        v->flush_requested = false;
        v->calls->flush_tlb(v->calls->context);
    }
    __atomic_store_n(&v->in_guest, answer == GO_ON, __ATOMIC_RELEASE);
    return answer;
}

int handle_trap(struct vcpu *v, u32 vector, u64 error_code, u64 address)
{
    struct domain *d = v->domain_address;
    if (vector == TRAP_CPUID && v->calls && !v->compatibility && d->contexts == 1)
        return cpuid(v);
    if ((vector != TRAP_SYSCALL && vector != VECTOR_PF && vector != VECTOR_GP) || !v->calls || !v->native_budget
        || (v->new_space && v->native_budget != UNLIMITED))
        return NOT_HANDLED;
    __atomic_store_n(&v->in_guest, false, __ATOMIC_RELEASE); /* as Python's handler, which gets what is not handled */
    if (!try_lock(&d->lock_word))
        return NOT_HANDLED;
    v->work_left = d->work_limit;
    int answer = NOT_HANDLED;
    if (undo(v) && handle(v, vector, error_code, address)) {
        v->native_budget -= v->native_budget != UNLIMITED;
        answer = finish(v);
    }
    if (d->reference_lost)
        answer = answer == NOT_HANDLED ? NOT_HANDLED : LOOK; /* Python ends the domain */
    unlock(d);
    return answer;
}

/* events.set_pending, for a port of the vCPU that runs. */
static void set_pending(struct vcpu *v, u32 port)
{
    struct domain *d = v->domain_address;
    u8 *shared = d->memory_address + d->shared_info, *info = d->memory_address + v->info;
    if (v->fifo) {
        info[VCPU_INFO_UPCALL_PENDING] |= fifo_set_pending(v, port);
        return;
    }
    u64 *pending = (u64 *)(shared + SHARED_EVTCHN_PENDING), *mask = (u64 *)(shared + SHARED_EVTCHN_MASK);
    u64 bit = 1ull << (port & 63), word = port >> 6;
    if (__atomic_fetch_or(pending + word, bit, __ATOMIC_SEQ_CST) & bit || mask[word] & bit)
        return;
    u64 *selector = (u64 *)(info + VCPU_INFO_PENDING_SEL);
    if (!(__atomic_fetch_or(selector, 1ull << word, __ATOMIC_SEQ_CST) >> word & 1))
        info[VCPU_INFO_UPCALL_PENDING] = 1;
}

/* The singleshot timer, which the guest has set to `deadline`, is due: time.VcpuTimers.set_singleshot_late.  What is not
   handled may go on in the guest without a look at flushes, so `in_guest` stays set until then. */
int handle_timer(struct vcpu *v, u64 deadline)
{
    struct domain *d = v->domain_address;
    if (!v->calls || !try_lock(&d->lock_word))
        return NOT_HANDLED;
    u64 interval = deadline - v->timer_deadline;
    v->timer_deadline = deadline;
    v->timer_interval = interval;
    v->timer_look = interval && interval <= LONGEST_TICK ? deadline + interval + LOOK_LATE : 0;
    if (v->virq_port[VIRQ_TIMER])
        set_pending(v, v->virq_port[VIRQ_TIMER]);
    int answer = finish(v);
    unlock(d);
    return answer;
}

/* --- for dom0's back-ends: grants.py ------------------------------------------------------------------ */

/* Whoever has the lock in Python may keep it for long. */
static bool lock_if_free(struct domain *d)
{
    for (int attempts = 0; attempts < 100; attempts++) {
        if (try_lock(&d->lock_word))
            return true;
        sched_yield();
    }
    return false;
}

/* How many are left NOT_PINNED, for Python to try. */
u32 pin_grants(struct domain *d, struct pins *p)
{
    u32 left = 0;
    if (p->begin == p->count)
        return 0;
    if (d->dying || !lock_if_free(d))
        return p->count - p->begin;
    for (u32 i = p->begin; i < p->count; i++) {
        pin_grant(d, p, i);
        left += p->states[i] == NOT_PINNED;
    }
    unlock(d);
    return left;
}

/* How many are not NOT_PINNED afterwards: Python is to unpin them, or to tell of changed code. */
u32 unpin_grants(struct domain *d, struct pins *p)
{
    u32 left = 0;
    if (!p->count)
        return 0;
    bool locked = lock_if_free(d);
    for (u32 i = 0; i < p->count; i++) {
        if (locked && p->states[i] == IS_PINNED)
            unpin_grant(d, p, i);
        left += p->states[i] != NOT_PINNED;
    }
    if (locked)
        unlock(d);
    return left;
}

/* Copy the parts of frames that the pins name, one after the other, from or to `local`. */
u32 copy_grants(struct domain *d, struct pins *p, u8 *local, bool to_guest)
{
    if (pin_grants(d, p))
        return NOT_ALL_PINNED;
    for (u32 i = 0; i < p->count; i++) {
        u8 *part = (u8 *)p->addresses[i] + p->offsets[i];
        if (to_guest)
            __builtin_memcpy(part, local, p->sizes[i]);
        else
            __builtin_memcpy(local, part, p->sizes[i]);
        local += p->sizes[i];
    }
    if (unpin_grants(d, p))
        return TO_UNPIN;
    return COPIED;
}
