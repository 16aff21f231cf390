/* Guest-user mode in stubs, as long as its traps are those that native code handles.

   Python's loop (cpu.py) is the reference, and goes on with whatever this leaves: see struct user's `left`.  Called
   without Python's lock, from Unicorn's hooks (deliver.c), whose loop stands still meanwhile, or by Python. */

#define ENOENT 2
#define EINTR 4

/* Why a stub has died: stub.REASONS. */
enum { ENDED = 1, NOT_ANSWERED, FORGED, UNINTERRUPTED, SILENT, FORGED_BY_MAPPER, NOT_HEARD };

struct pollfd {
    int fd;
    short events, revents;
};
struct note { /* struct seccomp_notif */
    u64 id;
    u32 task, flags;
    int32_t number;
    u32 arch;
    u64 ip, arguments[6];
};
struct answer { /* struct seccomp_notif_resp */
    u64 id;
    i64 value;
    int32_t error;
    u32 flags;
};
int ioctl(int fd, unsigned long request, ...);
int poll(struct pollfd *fds, unsigned long count, int timeout);
long syscall(long number, ...);
int *__errno_location(void);

struct trap {
    u32 vector;
    u64 error_code, address;
};

static u64 *words(struct stub *s, unsigned offset)
{
    return (u64 *)(s->mailbox + offset);
}

static u32 hflags(struct user *u)
{
    return *(u32 *)(u->env + HFLAGS);
}

static u64 l4_of(struct user *u)
{
    return *(u64 *)(u->env + CR + 24) >> PAGE_SHIFT;
}

/* --- hand-over: stub.Stub ------------------------------------------------------------------------------------ */

static int answer(struct stub *s, u64 id)
{
    struct answer a = {id, 0, 0, 0};
    if (!s->pid)
        return ENDED;
    return ioctl(s->listener, SEND, &a) ? NOT_ANSWERED : 0;
}

static void interrupt(struct stub *s)
{
    syscall(SYS_TGKILL, (long)s->pid, (long)s->task, (long)SIGKICK);
}

/* Wait for a hand-over: of the guest's task, which may be kicked, or (`kicked` is NULL) of the mapper. */
static int next(struct stub *s, const bool *kicked, struct note *note)
{
    for (int waited = 0;;) {
        struct pollfd fds[2] = {{s->listener, POLLIN, 0}, {s->pidfd, POLLIN, 0}};
        int found = poll(fds, 2, PIECE_MS);
        if (found < 0 && *__errno_location() != EINTR)
            return NOT_HEARD;
        if (found > 0 && fds[0].revents & POLLIN) {
            __builtin_memset(note, 0, sizeof *note);
            if (!ioctl(s->listener, RECEIVE, note))
                return 0;
            if (*__errno_location() != ENOENT && *__errno_location() != EINTR)
                return NOT_HEARD;
            continue;
        }
        if (found > 0)
            return ENDED;
        waited += !found;
        if (!kicked) {
            if (waited > (int)MAPPER_PIECES)
                return SILENT;
        } else if (!__atomic_load_n(kicked, __ATOMIC_SEQ_CST))
            waited = 0;
        else if (waited > (int)ANSWER_PIECES)
            return UNINTERRUPTED;
        else
            interrupt(s);
    }
}

/* Stub.run */
static int resume(struct user *u, struct stub *s)
{
    struct note note;
    __builtin_memcpy(s->mailbox + s->frame, s->fixed, sizeof s->fixed);
    *words(s, s->frame + FRAME_CS) = s->selectors;
    *words(s, s->frame + SIGNAL_MASK) = 0;
    *words(s, s->frame + FPSTATE) = MAILBOX + s->xsave;
    __builtin_memcpy(s->mailbox + s->xsave + SOFTWARE, s->software, sizeof s->software);
    *(u32 *)(s->mailbox + s->xsave + s->xsave_size) = MAGIC_AT_END;
    *words(s, FRAME) = s->frame_va + 8;
    int failed = answer(s, s->guest);
    if (!failed)
        failed = next(s, &u->kicked, &note);
    if (failed)
        return failed;
    s->guest = note.id;
    s->task = (int32_t)note.task;
    __builtin_memcpy(s->arguments, note.arguments, sizeof note.arguments);
    return note.ip == GUEST_HANDS_OVER && note.arguments[1] == s->frame_va ? 0 : FORGED;
}

/* Stub.carry_out, of no more commands than there is room for. *refused: one failed. */
static int carry_out_commands(struct stub *s, u64 commands[][COMMAND_WORDS], unsigned count, bool *refused)
{
    struct note note;
    u8 *place = s->mailbox + MAILBOX_SIZE;
    *(u64 *)place = count;
    for (unsigned i = 0; i < count; i++)
        __builtin_memcpy(place + COMMAND_SIZE * (i + 1), commands[i], sizeof commands[i]);
    int failed = answer(s, s->mapper);
    if (!failed)
        failed = next(s, NULL, &note);
    if (failed)
        return failed;
    s->mapper = note.id;
    __builtin_memset(place, 0, COMMAND_SIZE * (count + 1));
    *refused = note.arguments[0];
    return note.ip == MAPPER_HANDS_OVER ? 0 : FORGED_BY_MAPPER;
}

/* --- registers: NativeUserCpu._show and _take_back ----------------------------------------------------------- */

static void show(struct user *u, struct stub *s)
{
    struct extended *x = u->extended;
    u64 *regs = (u64 *)u->env, *at = words(s, s->frame + FRAME_R8);
    static const u8 order[] = {RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP, RIP};
    __builtin_memcpy(at, regs + R8, 64);
    for (unsigned i = 0; i < sizeof order; i++)
        at[8 + i] = regs[order[i]];
    u64 flags = u->get_rflags() | EFLAGS_IF | EFLAGS_RESERVED_ONE;
    *words(s, s->frame + FRAME_FLAGS) = flags;
    *words(s, MAILBOX_FLAGS) = (flags & (EFLAGS_NT | EFLAGS_ID)) | EFLAGS_IF | EFLAGS_RESERVED_ONE;
    *words(s, MAILBOX_FS_BASE) = regs[FS_BASE];
    *words(s, MAILBOX_GS_BASE) = regs[GS_BASE];
    if (!u->is_converted || __builtin_memcmp(u->env + FPU_START, u->converted, FPU_SIZE)) {
        u64 used = load64(x->image + XSAVE_HEADER) | XSTATE_X87 | XSTATE_SSE;
        store_legacy(x, x->image);
        __builtin_memset(x->image + LEGACY_END, 0, XSAVE_EXTENDED - LEGACY_END);
        __builtin_memcpy(x->image + XSAVE_HEADER, &used, 8);
        __builtin_memcpy(u->converted, u->env + FPU_START, FPU_SIZE);
        u->is_converted = true;
        u->shown_by = NULL;
    }
    if (u->shown_by != s || u->handled != x->handled) {
        u->handled = x->handled;
        __builtin_memcpy(s->mailbox + s->xsave, x->image, u->image_size);
        u->shown_by = s;
    }
}

static void take_extended(struct user *u, struct stub *s)
{
    struct extended *x = u->extended;
    u8 *image = x->image, *now = s->mailbox + s->xsave;
    u64 used;
    u32 mxcsr;
    if (!__builtin_memcmp(now, image, SOFTWARE)
        && !__builtin_memcmp(now + XSAVE_HEADER, image + XSAVE_HEADER, u->image_size - XSAVE_HEADER))
        return;
    __builtin_memcpy(image, now, u->image_size);
    used = load64(image + XSAVE_HEADER) & u->components;
    __builtin_memset(image + XSAVE_HEADER, 0, XSAVE_EXTENDED - XSAVE_HEADER);
    __builtin_memcpy(image + XSAVE_HEADER, &used, 8);
    __builtin_memcpy(&mxcsr, image + MXCSR_IN_IMAGE, 4);
    mxcsr &= MXCSR_DEFINED;
    __builtin_memcpy(image + MXCSR_IN_IMAGE, &mxcsr, 4);
    if (!(used & XSTATE_SSE))
        mxcsr = INITIAL_MXCSR;
    load_x87(x, used & XSTATE_X87 ? image : NULL);
    load_sse(x, used & XSTATE_SSE ? image : NULL);
    __builtin_memcpy(u->env + MXCSR, &mxcsr, 4);
    x->update_fp_status(u->env);
    x->update_mxcsr_status(u->env);
    __builtin_memcpy(u->converted, u->env + FPU_START, FPU_SIZE);
    u->is_converted = true;
}

/* False, with nothing changed: what has happened is rarer. */
static bool take_back(struct user *u, struct stub *s, struct trap *trap)
{
    u64 *regs = (u64 *)u->env, *at = words(s, s->frame + FRAME_R8), place = 0;
    static const u8 order[] = {RDI, RSI, RBP, RBX, RDX, RAX, RCX, RSP, RIP};
    u64 signal = s->arguments[0], vector = *words(s, s->frame + FRAME_VECTOR);
    u64 error_code = *words(s, s->frame + FRAME_ERROR);
    if ((*words(s, s->frame + FRAME_CS) & 0xffff) != CS64)
        return false;
    if (signal == SIGSYS) {
        place = *words(s, s->frame + SIGNAL_CALL);
        if (*(u32 *)(s->mailbox + s->frame + SIGNAL_ARCH) != ARCH_X86_64 || place >> PAGE_SHIFT == VSYSCALL)
            return false;
        *trap = (struct trap){TRAP_SYSCALL, 0, 0};
    } else if (signal == SIGSEGV && vector == VECTOR_PF)
        *trap = (struct trap){VECTOR_PF, (error_code & (PFEC_WRITE | PFEC_INSN)) | PFEC_USER, *words(s, s->frame + FRAME_CR2)};
    else if (signal != SIGKICK)
        return false;
    __builtin_memcpy(regs + R8, at, 64);
    for (unsigned i = 0; i < sizeof order; i++)
        regs[order[i]] = at[8 + i];
    u->set_rflags(*words(s, s->frame + FRAME_FLAGS) & ~(u64)EFLAGS_RF);
    take_extended(u, s);
    regs[FS_BASE] = s->arguments[4];
    regs[GS_BASE] = s->arguments[5];
    return true;
}

/* --- Placement.ran_in_stub ----------------------------------------------------------------------------------- */

static i64 nanoseconds(struct user *u, u64 ticks, u64 most)
{
    if (ticks >> 40)
        return (i64)most;
    ticks = u->tsc_shift >= 0 ? ticks << u->tsc_shift : ticks >> -u->tsc_shift;
    u64 time = (u64)((unsigned __int128)ticks * u->tsc_mul >> 32);
    return (i64)(time < most ? time : most);
}

static void add_regret(struct user *u, u64 l4, i64 ns)
{
    i64 regret = u->regret[l4] + ns;
    u->regret[l4] = regret < -(i64)PATIENCE ? -(i64)PATIENCE : regret;
    if (regret < (i64)PATIENCE)
        return;
    u->wanted[l4] = 0;
    u->regret[l4] = 0;
    i64 patience = u->patience[l4] * (i64)LESSON;
    u->patience[l4] = patience > (i64)MOST_PATIENCE ? (i64)MOST_PATIENCE : patience;
}

static void ran_in_stub(struct user *u, u64 l4, u64 ticks, bool exception)
{
    u64 own = ticks > u->overhead[exception] ? ticks - u->overhead[exception] : 0;
    if (u->regret)
        add_regret(u, l4, (i64)TRAP_NS - (i64)(SPEED - 1) * nanoseconds(u, own, MOST_NS));
}

static void charge(struct user *u, u64 l4, u64 ticks)
{
    if (u->regret)
        add_regret(u, l4, nanoseconds(u, ticks, MOST_CHARGED_NS));
}

/* --- pages: Spaces.fault ------------------------------------------------------------------------------------- */

enum outcome { MAPPED, FAULT, PYTHONS };

static bool set_bits(u64 *entry, u64 old, u64 bits)
{
    u32 low = (u32)old, new = low | (u32)bits;
    return low == new
           || __atomic_compare_exchange_n((u32 *)entry, &low, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static bool is_ready(struct user *u, struct space *s)
{
    return !u->reports[0] && !u->renewed && s->ready && s->regions <= MOST_REGIONS;
}

static enum outcome fault(struct user *u, struct space *s, u64 va, bool write, bool fetch, int *failed)
{
    u64 table = s->l4_mfn << PAGE_SHIFT, rights = ~0ull, upper = ~0ull, *places[4], entries[4];
    if (!is_canonical(va))
        return FAULT;
    if (!is_ready(u, s))
        return PYTHONS;
    for (int level = 0; level < 4; level++) {
        if (table >= u->memory_size)
            return PYTHONS;
        places[level] = (u64 *)(u->memory + table) + (va >> (39 - 9 * level) & 511);
        entries[level] = *(volatile u64 *)places[level];
        if (!(entries[level] & PTE_P))
            return FAULT;
        if (level < 3 && level && entries[level] & PTE_PSE)
            return PYTHONS;
        upper = rights;
        rights &= entries[level] ^ PTE_NX;
        table = entries[level] & PTE_ADDRESS;
    }
    u64 needed = PTE_P | PTE_US | (write ? PTE_RW : 0) | (fetch ? PTE_NX : 0);
    if ((rights & needed) != needed)
        return FAULT;
    u64 wanted = va >> PAGE_SHIFT, base = wanted & ~(PER_WINDOW - 1), slot = base / PER_WINDOW % WINDOWS;
    u64 *window = s->windows[slot];
    if (va >= USER_END || va >> 39 == AREA_SLOT || !window || s->bases[slot] != base)
        return PYTHONS;
    for (int level = 0; level < 4; level++)
        if (!set_bits(places[level], entries[level], level == 3 && write ? PTE_A | PTE_D : PTE_A))
            return PYTHONS;

    u64 commands[AROUND][COMMAND_WORDS], values[AROUND];
    unsigned first = (unsigned)(wanted & 511 & ~(AROUND - 1)), count = 0;
    u64 *leaves = places[3] - (wanted & 511) + first, *last = NULL;
    bool found = false;
    for (unsigned i = 0; i < AROUND; i++) {
        u64 entry = ((volatile u64 *)leaves)[i], mfn = (entry & PTE_ADDRESS) >> PAGE_SHIFT;
        u64 value = mfn << 3 | READ;
        values[i] = 0;
        if ((entry & (PTE_P | PTE_US | PTE_A)) != (PTE_P | PTE_US | PTE_A))
            continue;
        if (entry & upper & PTE_RW && entry & PTE_D)
            value |= WRITE;
        if (!(entry & PTE_NX) && upper & PTE_NX)
            value |= EXECUTE;
        if (window[first + i] == value || mfn >= u->frames)
            continue;
        values[i] = value;
        found |= (wanted & 511) == first + i;
        if (last && i && values[i - 1] && value == values[i - 1] + 8)
            last[2] += 0x1000;
        else {
            last = commands[count++];
            last[0] = SYS_MMAP;
            last[1] = (base + first + i) << PAGE_SHIFT;
            last[2] = 0x1000;
            last[3] = value & 7;
            last[4] = MAP_SHARED_FIXED;
            last[5] = mfn << PAGE_SHIFT;
        }
    }
    if (!found)
        return PYTHONS;
    bool refused = false;
    u64 began = __builtin_ia32_rdtsc();
    s->regions += count;
    *failed = carry_out_commands(s->stub, commands, count, &refused);
    charge(u, s->l4_mfn, __builtin_ia32_rdtsc() - began);
    if (*failed || refused) {
        s->ready = false; /* and Python empties it */
        s->regions = MOST_REGIONS + 1;
        return PYTHONS;
    }
    for (unsigned i = 0; i < AROUND; i++) {
        if (!values[i])
            continue;
        window[first + i] = values[i];
        if (values[i] & WRITE)
            u->writable[values[i] >> 3] = u->written[values[i] >> 3] = 1;
    }
    u->faults++;
    return MAPPED;
}

/* --- the loop: NativeUserCpu._run_in_stub -------------------------------------------------------------------- */

static bool may_run(struct user *u, u64 l4)
{
    u64 *regs = (u64 *)u->env;
    return u->enabled && u->vcpu && u->wanted[l4] && !*u->stays
           && (hflags(u) & (HF_CS64 | HF_KERNEL | HF_TS)) == HF_CS64
           && !(((u64 *)(u->env + DR))[7] & BREAKPOINTS) && !(regs[RFLAGS] & EFLAGS_TF) && regs[RIP] < USER_END
           && regs[ES] <= NULL_SELECTOR && regs[DS] <= NULL_SELECTOR && regs[FS] <= NULL_SELECTOR
           && regs[GS] <= NULL_SELECTOR && !(((u64 *)(u->memory + (l4 << PAGE_SHIFT)))[AREA_SLOT] & PTE_P);
}

static struct space *find_space(struct user *u, u64 l4)
{
    for (unsigned i = 0; i < MOST_STUBS; i++)
        if (u->spaces[i] && u->spaces[i]->l4_mfn == l4)
            return u->spaces[i];
    return NULL;
}

static u32 leave_trap(struct user *u, struct trap *trap)
{
    u->vector = trap->vector;
    u->error_code = trap->error_code;
    u->address = trap->address;
    return TRAP;
}

static u32 has_died(struct user *u, int reason)
{
    u->reason = reason;
    return DIED;
}

static u32 run_rounds(struct user *u)
{
    u64 l4 = l4_of(u);
    struct space *s = may_run(u, l4) ? find_space(u, l4) : NULL;
    int failed = 0;
    if (!s || !s->ready)
        return NOTHING;
    struct stub *stub = s->stub;
    u->space = s;
    if (u->missed_l4 == l4) {
        u64 va = u->missed_va;
        enum outcome outcome = fault(u, s, va, false, u->missed_fetch, &failed);
        if (failed)
            return has_died(u, failed);
        if (outcome == PYTHONS)
            return NOTHING;
    }
    u->missed_l4 = 0;
    *u->distrusts = true;
    for (;;) {
        struct trap trap = {TRAP_NOTHING, 0, 0};
        if (!is_ready(u, s) || !may_run(u, l4))
            return NOTHING;
        show(u, stub);
        u->running_pid = stub->pid;
        __atomic_store_n(&u->running_task, stub->task, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&u->kicked, __ATOMIC_SEQ_CST) || __atomic_load_n(&u->held, __ATOMIC_SEQ_CST)) {
            u->running_task = 0;
            return NOTHING;
        }
        failed = resume(u, stub);
        __atomic_store_n(&u->running_task, 0, __ATOMIC_SEQ_CST);
        if (failed)
            return has_died(u, failed);
        u->traps++;
        if (!take_back(u, stub, &trap))
            return SIGNAL;
        if (trap.vector == TRAP_NOTHING)
            continue;
        u64 tsc = stub->arguments[2] << 32 | stub->arguments[3];
        ran_in_stub(u, l4, tsc - *words(stub, RESUMED), trap.vector != TRAP_SYSCALL);
        if (trap.vector == VECTOR_PF) {
            bool write = trap.error_code & PFEC_WRITE, fetch = trap.error_code & PFEC_INSN;
            enum outcome outcome = fault(u, s, trap.address, write, fetch, &failed);
            if (failed)
                return has_died(u, failed);
            if (outcome == MAPPED)
                continue;
            if (outcome == PYTHONS)
                return leave_trap(u, &trap);
            *(u64 *)(u->env + CR + 16) = trap.address;
            u->missed_l4 = l4;
            u->missed_va = trap.address;
            u->missed_fetch = fetch;
            if (is_canonical(trap.address) && walk(u->memory, u->memory_size, l4 << PAGE_SHIFT, trap.address, PTE_P, 0))
                trap.error_code |= PFEC_PRESENT;
        }
        int answer = u->handler(u->vcpu, trap.vector, trap.error_code, trap.address);
        if (answer == NOT_HANDLED || answer == LOOK) {
            if (answer == LOOK)
                trap = (struct trap){TRAP_NOTHING, 0, 0};
            else if (trap.vector == VECTOR_PF)
                trap.error_code &= ~PFEC_PRESENT; /* as it came */
            return leave_trap(u, &trap);
        }
        if (answer == LEAVE)
            return LEFT;
        if (hflags(u) & HF_KERNEL)
            return KERNEL;
        if (l4_of(u) != l4)
            return NOTHING;
    }
}

u32 run_user(struct user *u)
{
    return u->left = run_rounds(u);
}
