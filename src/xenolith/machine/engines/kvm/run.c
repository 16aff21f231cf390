/* The KVM engine's loop for traps that native code handles: KVM_RUN, the trap, KVM_RUN again.

   Python's loop (cpu.py) is the reference, and goes on with whatever this leaves.  `run` is called in place of
   KVM_RUN, with the vCPU's state in kvm_run, ready to be entered, and without Python's lock. */

#define SYS_TIMER_SETTIME 223l
#define FEW_SYSCALLS 8 /* from one tick to the next */
#define QUIET 10       /* ticks without a system call: a program that computes */
#define CLOCK_MONOTONIC 1
#define SAME_LENGTH 100000 /* ns by which a guest's tick may differ from the host's */
#define SETTING_TAKES 6000 /* ns that KVM_SET_LAPIC needs until the timer runs */
#define PAGE (~0xfffull)

struct itimerspec {
    i64 interval[2], value[2]; /* s, ns */
};
int *__errno_location(void);
int sigtimedwait(const void *set, void *info, const i64 *timeout);
long syscall(long number, ...); /* a plain reference to timer_settime is one to its oldest version */
int ioctl(int fd, unsigned long request, ...);
int clock_gettime(int clock, i64 *time);

static u64 *run_words(struct kvm_cpu *k, unsigned offset)
{
    return (u64 *)(k->run + offset);
}

/* --- what ring 0 calls: see native_state.EngineCalls --------------------------------------------------------- */

u64 get_rflags(struct kvm_cpu *k)
{
    return k->regs[RFLAGS];
}

void set_rflags(u64 value, struct kvm_cpu *k)
{
    k->regs[RFLAGS] = (value & ENTRY_FLAGS) | ALWAYS_SET;
}

void switch_mode(u64 l4_mfn, bool user, struct kvm_cpu *k)
{
    k->l4_mfn = l4_mfn;
    k->user = user;
    *run_words(k, RUN_SREGS + SREGS_CR3) = l4_mfn << 12;
}

void flush_tlb(struct kvm_cpu *k)
{
    k->flush = true;
}

void flush_page(u64 va, struct kvm_cpu *k)
{
    (void)va;
    k->flush = true;
}

/* --- changed page-table entries (changes.py, which says why this is enough between threads) ----------- */

/* Changes with lower numbers were rewritten by some vCPU. */
static u64 rewritten(struct changes *changes)
{
    u64 most = 0;
    for (unsigned i = 0; i < MAX_CPUS; i++) {
        u64 number = __atomic_load_n(&changes->rewritten[i], __ATOMIC_ACQUIRE);
        if (number > most)
            most = number;
    }
    return most;
}

void entry_changed(u64 index, u64 old, u64 new, struct kvm_cpu *k)
{
    struct changes *changes = k->changes;
    if (!k->shadows || (index & 511 && !(old & ~new & MAY_NOT_LOSE) && !(new & ~old & MAY_NOT_GAIN)))
        return;
    u64 number = changes->noted;
    if (number >= changes->room)
        changes->room = rewritten(changes) + KEPT;
    if (number < changes->room)
        __atomic_store_n(&changes->entries[number % KEPT], index, __ATOMIC_RELAXED);
    else {
        __atomic_store_n(&changes->tables[index >> 9], number + 1, __ATOMIC_RELAXED);
        __atomic_store_n(&changes->overflowed, number + 1, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&changes->noted, number + 1, __ATOMIC_RELEASE);
}

/* The vCPU is back from the guest, so it has passed the stubs that were on its way. */
static void confirm_rewritten(struct kvm_cpu *k)
{
    if (k->rewriting)
        __atomic_store_n(&k->changes->rewritten[k->number], k->rewriting, __ATOMIC_RELEASE);
    k->rewriting = 0;
}

struct to_rewrite {
    u64 noted;
    unsigned entry_count, table_count;
    u64 entries[MOST], tables[MOST];
};

/* changes.Changes.pending. False: it is more than a list holds. */
static bool pending(struct changes *changes, struct to_rewrite *found)
{
    u64 noted = __atomic_load_n(&changes->noted, __ATOMIC_ACQUIRE), number = rewritten(changes);
    found->noted = noted;
    found->entry_count = found->table_count = 0;
    if (__atomic_load_n(&changes->overflowed, __ATOMIC_RELAXED) > number)
        return false;
    if (number + KEPT < noted)
        number = noted - KEPT;
    for (; number < noted; number++) {
        u64 index = __atomic_load_n(&changes->entries[number % KEPT], __ATOMIC_RELAXED);
        unsigned *count = index & 511 ? &found->entry_count : &found->table_count;
        if (*count == MOST)
            return false;
        (index & 511 ? found->entries : found->tables)[(*count)++] = index;
    }
    return true;
}

/* --- the fast path (fast_path.py) --------------------------------------------------------------------- */

static bool has_view(struct kvm_cpu *k, u64 l4_mfn, bool kernel)
{
    u64 entry = ((volatile u64 *)k->memory)[l4_mfn << 9 | k->slot];
    return !((entry ^ k->view_entries[kernel]) & ~(PTE_A | PTE_D));
}

static void turn(struct kvm_cpu *k, bool on)
{
    k->on = on;
    __builtin_memcpy(k->kernel_code, k->kernel_start[on], 5);
    __builtin_memcpy(k->user_code, k->user_start[on], 2);
    k->list[GATE_IN_RIP] = on ? k->gate_rips[0] : NO_RIP;
    k->list[GATE_OUT_RIP] = on ? k->gate_rips[1] : NO_RIP;
    if (!on)
        k->list[KERNEL_CR3] = k->list[USER_CR3] = k->list[TICK_CR3] = NO_CR3;
}

/* `left` ns, or more by less than a host's tick: until one of those. */
i64 until_host_tick(u64 now, i64 left, u64 tick)
{
    u64 past = (now + left) % tick;
    return past ? left + (i64)(tick - past) : left;
}

/* From `first` ns on KVM's local timer interrupts the program at each of the host's ticks, and the fast path delivers the
   guest's, which has the same length, without an exit.  False: it cannot. */
static bool start_ticks(struct kvm_cpu *k, struct vcpu *v, u64 now, i64 first)
{
    u64 *data = k->data, length = k->host_tick;
    u32 port = v->virq_port[VIRQ_TIMER], setting[2] = {(u32)length, 1};
    i64 longer = v->timer_interval - length;
    if (!k->lapic || !port || v->fifo || longer > SAME_LENGTH || longer < -SAME_LENGTH || first > (i64)length)
        return false; /* KVM would take `length` for a longer `first` */
    if (first > SETTING_TAKES)
        setting[1] = (u32)(first - SETTING_TAKES);
    data[TICKS_LEFT] = TICKS;
    data[TICK_NOW] = now + first - length;
    data[TICK_LENGTH] = k->tick_length = length;
    data[TICK_ENTRY] = v->event_callback;
    data[TICK_WORD] = k->shared_va + SHARED_EVTCHN_PENDING + (port >> 6) * 8;
    data[TICK_BIT] = 1ull << (port & 63);
    data[TICK_SELECTOR] = 1ull << (port >> 6);
    k->list[TICK_CR3] = v->kernel_l4 << 12;
    k->ticking = true;
    __builtin_memcpy(k->lapic + LAPIC_INITIAL_COUNT, setting, 4);
    __builtin_memcpy(k->lapic + LAPIC_CURRENT_COUNT, setting + 1, 4);
    return !ioctl(k->fd, KVM_SET_LAPIC, k->lapic);
}

/* Set the alarm for the next tick of the guest's, if that is to come: else its timer is to be told of. */
static bool set_alarm(struct kvm_cpu *k, struct vcpu *v)
{
    u64 now = v->now();
    i64 left = v->timer_look - now, time[2];
    k->quiet = v->untrapped_syscalls == k->syscalls ? k->quiet + 1 : 0;
    k->syscalls = v->untrapped_syscalls;
    if (left < 1) {
        v->timer_look = 0;
        return true;
    }
    if (k->quiet > QUIET && k->host_tick && !clock_gettime(CLOCK_MONOTONIC, time)) {
        left = until_host_tick(time[0] * 1000000000 + time[1], left, k->host_tick);
        if (start_ticks(k, v, now, left)) {
            k->look = v->timer_look;
            return true;
        }
    }
    struct itimerspec alarm = {{0, 0}, {left / 1000000000, left % 1000000000}};
    if (syscall(SYS_TIMER_SETTIME, k->alarm, 0l, &alarm, NULL))
        return false;
    k->look = v->timer_look;
    return true;
}

/* Before the guest runs. False: Python has to see. */
static bool enter_fast_path(struct kvm_cpu *k, struct vcpu *v)
{
    u64 *data = k->data;
    if (v->info != k->info || v->syscall_callback != k->callback)
        return false;
    if (v->kernel_l4 != k->kernel_l4 || v->user_l4 != k->user_l4 || v->syscall_masks_events != k->masks_events
        || (k->on && v->architectural_iopl)) {
        bool on = !v->architectural_iopl && v->kernel_l4 && v->user_l4 && v->syscall_callback && v->syscall_masks_events
            && has_view(k, v->kernel_l4, true) && has_view(k, v->user_l4, false);
        if (on && !k->info_mapped)
            return false;
        if (k->on)
            turn(k, false);
        k->masks_events = v->syscall_masks_events;
        k->kernel_l4 = v->kernel_l4;
        k->user_l4 = v->user_l4;
        if (on) {
            k->list[KERNEL_CR3] = v->kernel_l4 << 12;
            k->list[USER_CR3] = v->user_l4 << 12;
            turn(k, true);
        }
    }
    if (!k->on)
        return true;
    if (!v->kernel_mode && !v->compatibility) {
        k->pair_cs = k->regs[CS] & 0xffff;
        k->pair_ss = k->regs[SS] & 0xffff;
    }
    if (v->timer_look && v->timer_look != k->look) {
        if (!k->has_alarm || !v->now || !set_alarm(k, v))
            return false;
    }
    bool known = false;
    for (unsigned i = 0; i < FLAT_PAIRS; i++)
        known |= v->flat_pairs[i] == (k->pair_cs << 16 | k->pair_ss) && v->flat_pairs[i];
    data[KERNEL_SP] = v->kernel_sp;
    data[KERNEL_SS] = v->kernel_ss;
    data[OTHER_GS] = v->other_gs_base;
    data[ENTRY] = v->syscall_callback;
    data[USER_CS] = known ? k->pair_cs : NO_SELECTOR;
    data[USER_SS] = k->pair_ss;
    data[HOLD] = v->nmi_masked;
    data[VCPU_ID] = v->vcpu_id;
    data[TIMER_FROM] = v->timer_look ? v->timer_look - TIMER_SLOP : NO_TIMER;
    data[TIMER] = 0;
    data[USED] = 0;
    return true;
}

/* After the guest ran on this table: take over what the fast path did. */
static void leave_fast_path(struct kvm_cpu *k, struct vcpu *v, u64 l4_mfn)
{
    volatile u64 *data = k->data;
    u64 used = data[USED], other = data[OTHER_GS];
    if (!k->on || (!used && l4_mfn == (v->kernel_mode ? k->kernel_l4 : k->user_l4)))
        return;
    v->kernel_sp = data[KERNEL_SP];
    v->kernel_ss = data[KERNEL_SS] & 0xffff;
    v->other_gs_base = is_canonical(other) ? other : 0;
    v->untrapped_syscalls += data[SWITCHES] & 0xffffffff;
    data[SWITCHES] = 0;
    bool kernel = l4_mfn == k->kernel_l4;
    v->kernel_mode = kernel;
    if (used & 2 || !kernel) {
        k->regs[CS] = kernel ? FLAT_RING3_CS64 : k->pair_cs;
        k->regs[SS] = kernel ? FLAT_RING3_SS64 : k->pair_ss;
    }
    k->l4_mfn = l4_mfn;
    k->user = !kernel;
}

/* The vCPU left its code by the OUT of a slow label, its registers are in the register file: as it was at the SYSCALL.
   False: it is none of these. */
static bool roll_back(struct kvm_cpu *k, u64 *l4_mfn)
{
    u64 *regs = k->regs, *data = k->data, at = regs[RIP] - k->code_va - 2;
    if (!k->on || *l4_mfn == k->user_l4) {
        if (at != k->slow[0] && at != k->slow[1])
            return false;
    } else if (at == k->landing_slow) {
        regs[RCX] = data[SAVED_RCX];
        regs[R11] = data[SAVED_R11];
        regs[RSP] = data[SAVED_RSP];
        *l4_mfn = k->user_l4;
    } else if (at == k->iret_slow) {
        regs[RCX] = data[SAVED_RCX];
        regs[R11] = data[SAVED_R11];
        regs[RAX] = HYPERVISOR_iret;
    } else if (at != k->slow[1])
        return false;
    regs[RIP] = regs[RCX];
    regs[RFLAGS] = (regs[R11] & ENTRY_FLAGS) | ALWAYS_SET;
    return true;
}

/* --- between kvm_run and the register file ------------------------------------------------------------ */

static const u8 ORDER[8] = {RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP}; /* of struct kvm_regs; then R8 to R15 */

static void read_registers(struct kvm_cpu *k)
{
    u64 *regs = k->regs, *from = run_words(k, RUN_REGS);
    for (int i = 0; i < 8; i++)
        regs[ORDER[i]] = from[i];
    __builtin_memcpy(regs + R8, from + 8, 64);
    regs[FS_BASE] = *run_words(k, RUN_SREGS + SREGS_FS);
    regs[GS_BASE] = *run_words(k, RUN_SREGS + SREGS_GS);
}

static void write_registers(struct kvm_cpu *k)
{
    u64 *regs = k->regs, *to = run_words(k, RUN_REGS);
    for (int i = 0; i < 8; i++)
        to[i] = regs[ORDER[i]];
    __builtin_memcpy(to + 8, regs + R8, 64);
    to[16] = regs[RIP];
    to[17] = regs[RFLAGS];
    *run_words(k, RUN_SREGS + SREGS_FS) = regs[FS_BASE];
    *run_words(k, RUN_SREGS + SREGS_GS) = regs[GS_BASE];
    __builtin_memcpy(k->run + RUN_SREGS + SREGS_CS, k->flat_code, SEGMENT_SIZE);
    __builtin_memcpy(k->run + RUN_SREGS + SREGS_SS, k->flat_stack, SEGMENT_SIZE);
}

/* Whether the selectors of DS, ES, FS and GS are as they were. */
static bool same_selectors(struct kvm_cpu *k)
{
    for (int i = 0; i < 4; i++)
        if (load64(k->run + RUN_SREGS + SREGS_DS + SEGMENT_SIZE * i + 8) != k->selectors[i])
            return false;
    return true;
}

/* Make the entry that kvm_run holds go through the stubs that forget translations (cpu._divert_to_stubs). False: there
   is too much of it. */
static bool divert_to_stubs(struct kvm_cpu *k)
{
    u64 *regs = run_words(k, RUN_REGS), *list = k->list, first = 0;
    struct to_rewrite found;
    if (k->shadows) {
        if (!pending(k->changes, &found))
            return false;
        k->rewriting = found.noted;
        if (found.table_count) {
            first = k->tables_end - k->table_size * found.table_count;
            while (found.table_count)
                *list++ = k->alias + (found.tables[--found.table_count] << 3) + 1;
        }
        if (found.entry_count) {
            u64 stub = k->entries_end - k->entry_size * found.entry_count;
            if (first)
                *list++ = stub;
            else
                first = stub;
            while (found.entry_count)
                *list++ = k->alias + (found.entries[--found.entry_count] << 3);
        }
    } else {
        first = k->flush_stub;
        *list++ = *run_words(k, RUN_SREGS + SREGS_CR3);
    }
    k->flush = false;
    if (!first)
        return true;
    *list++ = k->go_stub;
    *list++ = regs[5]; /* RDI, which the stubs use; then what IRETQ takes */
    *list++ = regs[16];
    *list++ = USER_CODE64;
    *list++ = regs[17];
    *list++ = regs[6];
    *list++ = USER_DATA;
    regs[16] = first;
    regs[17] = EFLAGS_RESERVED_ONE;
    regs[6] = k->list_va;
    __builtin_memcpy(k->run + RUN_SREGS + SREGS_CS, k->code0, SEGMENT_SIZE);
    __builtin_memcpy(k->run + RUN_SREGS + SREGS_SS, k->data0, SEGMENT_SIZE);
    return true;
}

/* --- the loop ----------------------------------------------------------------------------------------- */

/* The exit that kvm_run holds, if it is a trap of 64-bit code at CPL 3 that Python need not see: then its vector, with
   everything in the register file as the trap handlers want it.  Otherwise nothing was changed, but registers. */
static int trap_of_exit(struct kvm_cpu *k, struct vcpu *v)
{
    u64 *regs = k->regs, l4_mfn = *run_words(k, RUN_SREGS + SREGS_CR3) >> 12;
    u16 port = *(u16 *)(k->run + RUN_IO_PORT);
    volatile u64 *frame = k->frame;
    if (*(u32 *)(k->run + RUN_EXIT_REASON) != KVM_EXIT_IO || !same_selectors(k) || (k->data && k->data[TIMER]))
        return -1;
    u64 error_code = frame[0];
    if (port == VECTOR_PF || (port == VECTOR_GP && !error_code)) {
        u64 rip = frame[1];
        if ((frame[2] & 0xffff) != USER_CODE64 || (k->data && (rip & PAGE) == k->code_va))
            return -1;
        read_registers(k);
        k->error_code = error_code;
        k->address = port == VECTOR_PF ? *run_words(k, RUN_SREGS + SREGS_CR2) : 0;
        regs[RIP] = rip;
        regs[RFLAGS] = frame[3];
        regs[RSP] = frame[4];
        if (k->data)
            leave_fast_path(k, v, l4_mfn);
        return port;
    }
    if (port != PORT_SYSCALL || (*run_words(k, RUN_REGS + 128) & PAGE) != k->syscall_page)
        return -1;
    read_registers(k);
    regs[RIP] = *run_words(k, RUN_REGS + 128);
    if (k->data) {
        if (!roll_back(k, &l4_mfn))
            return -1;
        *run_words(k, RUN_SREGS + SREGS_CR3) = l4_mfn << 12;
        leave_fast_path(k, v, l4_mfn);
    } else {
        regs[RIP] = regs[RCX];
        regs[RFLAGS] = (regs[R11] & ENTRY_FLAGS) | ALWAYS_SET;
    }
    k->error_code = k->address = 0;
    return TRAP_SYSCALL;
}

/* A byte of guest code, or -1 where nothing is mapped. */
static int code_byte(struct kvm_cpu *k, u64 va)
{
    u64 table = *run_words(k, RUN_SREGS + SREGS_CR3) & PTE_ADDRESS;
    if (!is_canonical(va))
        return -1;
    for (int shift = 39; shift >= 12; shift -= 9) {
        u64 entry = table < k->memory_size ? ((volatile u64 *)(k->memory + table))[va >> shift & 511] : 0;
        if (!(entry & PTE_P) || (entry & PTE_PSE && shift != 12))
            return -1;
        table = entry & PTE_ADDRESS;
    }
    return table < k->memory_size ? k->memory[table + (va & 0xfff)] : -1;
}

/* Whether the 64-bit instruction that ends at `rip` may have been one that raises #BP or #OF: INT3, INT 3 or INT 4. */
static bool may_be_breakpoint(struct kvm_cpu *k, u64 rip)
{
    int last = code_byte(k, rip - 1), before = code_byte(k, rip - 2);
    return last < 0 || last == OPCODE_INT3 || ((last == VECTOR_BP || last == VECTOR_OF) && (before < 0 || before == OPCODE_INT_N));
}

/* KVM_RUN was interrupted while guest code ran, and the fast path holds a timer that is due: what the native function
   says to that, or NOT_HANDLED. */
static int tick(struct kvm_cpu *k, struct vcpu *v)
{
    static const i64 no_time[2];
    const u8 *events = k->run + RUN_EVENTS;
    u64 rip = *run_words(k, RUN_REGS + 128), deadline = k->data ? k->data[TIMER] : 0;
    u16 selector;
    __builtin_memcpy(&selector, k->run + RUN_SREGS + SREGS_CS + 12, 2);
    if (*__errno_location() != EINTR || __atomic_load_n(&k->kicked, __ATOMIC_ACQUIRE) || !deadline || !k->on
        || !v->native_timer || !v->now || v->now() < deadline)
        return NOT_HANDLED;
    if (v->native_budget != UNLIMITED && k->data[SWITCHES] > FEW_SYSCALLS)
        return NOT_HANDLED; /* who has given a budget may want the vCPU elsewhere */
    if ((k->run[RUN_SREGS + SREGS_SS + 16] & 3) != 3 || selector != USER_CODE64 || (rip & PAGE) == k->code_va
        || events[EVENTS_EXCEPTION_INJECTED] || events[EVENTS_EXCEPTION_PENDING] || !same_selectors(k))
        return NOT_HANDLED;
    if ((events[EVENTS_EXCEPTION_VECTOR] == VECTOR_BP || events[EVENTS_EXCEPTION_VECTOR] == VECTOR_OF)
        && may_be_breakpoint(k, rip))
        return NOT_HANDLED;
    while (sigtimedwait(k->signals, NULL, no_time) > 0)
        ;
    read_registers(k);
    k->regs[RIP] = rip;
    k->regs[RFLAGS] = (*run_words(k, RUN_REGS + 136) & ENTRY_FLAGS) | ALWAYS_SET;
    leave_fast_path(k, v, *run_words(k, RUN_SREGS + SREGS_CR3) >> 12);
    int answer = v->native_timer(v, deadline);
    *__errno_location() = EINTR;
    return answer;
}

/* Enter the guest, and again after each trap that native code handles.  What Python is to do now: RAN (look at what
   KVM_RUN says; -1: at errno), TRAPPED (handle this trap, `vector`, whose registers are in the register file), LOOK_NOW
   (look for events), LEFT (leave), AGAIN (enter the guest: everything is in the register file). */
int run(struct kvm_cpu *k)
{
    for (;;) {
        int result = ioctl(k->fd, KVM_RUN, 0l), answer;
        struct vcpu *v = k->vcpu;
        if (!v || !k->flat || k->ticking)
            return result;
        if (result) {
            answer = tick(k, v);
            if (answer == NOT_HANDLED)
                return -1;
        } else {
            int vector = trap_of_exit(k, v);
            if (vector < 0)
                return RAN;
            k->vector = vector;
            answer = k->handler(v, vector, k->error_code, k->address);
        }
        switch (answer) {
        case LEAVE:
            return LEFT;
        case LOOK:
            return LOOK_NOW;
        case NOT_HANDLED:
            return TRAPPED;
        }
        k->handled++;
        confirm_rewritten(k);
        if (__atomic_load_n(&k->kicked, __ATOMIC_ACQUIRE))
            return LEFT;
        if ((k->data && !enter_fast_path(k, v)) || !is_canonical(k->regs[RIP]))
            return AGAIN;
        write_registers(k);
        if (k->flush && !divert_to_stubs(k))
            return AGAIN;
        *run_words(k, RUN_DIRTY_REGS) = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    }
}
