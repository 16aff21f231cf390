/* Ring 0's commonest traps in C: system calls and their way back, page faults, changes of page tables and base pointers.

   Python is the reference: traps.py, mmu.py, paging.py, multicall.py and writable_pagetables.py say what each of these
   functions does, under the same names.  Here is only what succeeds and needs nothing but flat state.  Whatever else
   comes up, every error included, is NOT_HANDLED, found out before anything is changed (or undone), and then Python
   does all of it.

   A domain's lock is the word `lock_word`, on which nobody waits here: see domain.DomainLock.  Under it the threads of its
   vCPUs, native or in Python, change its state one at a time.  Outside of it a thread touches its own vCPU's registers and
   `in_guest`, and nothing else.

   Guest memory that is no page table may change while it is read: the guest's other vCPUs run.  So whatever is checked was
   first copied, by `fetch`, and is not read again. */

#define MASK_FRAME 0x000ffffffffff000ull
#define READ (PTE_P | PTE_US)
#define WRITE (PTE_P | PTE_US | PTE_RW)
#define ADJUSTABLE (PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_AVAIL | PTE_AVAIL_HIGH | PTE_NX)
#define DISALLOWED (~(ADJUSTABLE | MASK_FRAME))
#define L1_DISALLOWED (DISALLOWED & ~PTE_G)
#define COUNTED (~(PTE_NX | PTE_AVAIL_HIGH | PTE_AVAIL | PTE_G | PTE_D | PTE_A | PTE_US))
#define GUEST_KERNEL (1ull << 52)
#define ONE_TYPE (1ull << TYPE_SHIFT)
#define NOWHERE (~0ull)
#define BATCH 512
#define ALL_VCPUS (~0ull)
#define WORK 4096 /* requests and page tables that one trap may take, a few milliseconds; what is left is Python's */
#define SLOW INT64_MIN /* in place of a hypercall's result: nothing was done that its arguments do not tell of */
#define ALWAYS_SET (EFLAGS_IF | EFLAGS_RESERVED_ONE)
#define ENTRY_FLAGS (~(EFLAGS_AC | EFLAGS_VM | EFLAGS_RF | EFLAGS_NT | EFLAGS_TF | EFLAGS_IOPL))
#define SAVED_FLAGS (~(EFLAGS_IF | EFLAGS_IOPL))
#define UPCALL_PENDING 0 /* offsets in vcpu_info */
#define UPCALL_MASK 1
#define CLI 0xfa
#define STI 0xfb

static inline void store(u8 *at, u64 value)
{
    __builtin_memcpy(at, &value, 8);
}

/* Copy guest memory, once: the compiler must not read it again later, when it may be different. */
static inline void fetch(void *to, const u8 *from, unsigned size)
{
    __builtin_memcpy(to, from, size);
    __asm__ volatile("" ::: "memory");
}

static inline u64 *words(struct domain *d)
{
    return (u64 *)d->memory_address;
}

/* --- guest memory ------------------------------------------------------------------------------------ */

static u64 walk(struct vcpu *v, u64 table, u64 va, u64 rights)
{
    const volatile u64 *q = words(v->domain_address);
    if (va >= 0x800000000000ull && va < HYPERVISOR_VIRT_END)
        return NOWHERE;
    u64 entry = q[table << 9 | (va >> 39 & 511)];
    for (int shift = 30; shift >= 12; shift -= 9) {
        if ((entry & rights) != rights)
            return NOWHERE;
        entry = q[(entry & MASK_FRAME) >> 3 | (va >> shift & 511)];
    }
    return (entry & rights) == rights ? (entry & MASK_FRAME) | (va & 0xfff) : NOWHERE;
}

/* The machine address of `size` bytes in one page, or NOWHERE. */
static u64 translate(struct vcpu *v, u64 va, unsigned size, u64 rights)
{
    if ((va & 0xfff) + size > 0x1000)
        return NOWHERE;
    return walk(v, v->kernel_mode ? v->kernel_l4 : v->user_l4, va, rights);
}

/* Index of the L1 entry for a linear address, NOWHERE where there is no L1 table. */
static u64 l1_entry_index(struct vcpu *v, u64 va)
{
    const volatile u64 *q = words(v->domain_address);
    if (!is_canonical(va) || ((va >> 39 & 511) >= XEN_FIRST_SLOT && (va >> 39 & 511) <= XEN_LAST_SLOT))
        return NOWHERE;
    u64 table = v->kernel_mode ? v->kernel_l4 : v->user_l4;
    for (int shift = 39; shift > 12; shift -= 9) {
        u64 entry = q[table << 9 | (va >> shift & 511)];
        if (!(entry & PTE_P))
            return NOWHERE;
        table = (entry & MASK_FRAME) >> 12;
    }
    return table << 9 | (va >> 12 & 511);
}

/* Whether a batch may go on: whoever else wants the domain's lock must not wait long, and Python looks for that. */
static bool may_go_on(struct vcpu *v)
{
    if (!v->work_left)
        return false;
    v->work_left--;
    return true;
}

/* --- frame types (paging.py) ------------------------------------------------------------------------- */

static bool validate(struct vcpu *v, u64 mfn, u64 kind);
static void devalidate(struct vcpu *v, u64 mfn, u64 kind);

/* Whether any of these vCPUs but this one is executing guest code: then Python has to get it out.  One that is not cannot
   begin before this one gives the domain's lock back. */
static bool others_in_guest(struct vcpu *v, u64 vcpus)
{
    struct domain *d = v->domain_address;
    for (u32 i = 0; i < d->vcpu_count; i++)
        if (vcpus >> i & 1 && i != v->vcpu_id && __atomic_load_n(&d->vcpu_addresses[i]->in_guest, __ATOMIC_ACQUIRE))
            return true;
    return false;
}

/* Those of these vCPUs that have threads of their own flush before they next execute guest code: they are not doing so. */
static void flush_others(struct vcpu *v, u64 vcpus)
{
    struct domain *d = v->domain_address;
    if (d->contexts == 1)
        return; /* they are not loaded, and flushed when they are */
    for (u32 i = 0; i < d->vcpu_count; i++)
        if (vcpus >> i & 1 && i != v->vcpu_id)
            d->vcpu_addresses[i]->flush_requested = true;
}

static bool flush_domain(struct vcpu *v)
{
    if (others_in_guest(v, ALL_VCPUS))
        return false;
    v->domain_address->flush_epoch++;
    flush_others(v, ALL_VCPUS);
    v->calls->flush_tlb(v->calls->context);
    return true;
}

static void entry_changed(struct vcpu *v, u64 index, u64 old, u64 new)
{
    if (v->calls->entry_changed)
        v->calls->entry_changed(index, old, new, v->calls->context);
}

static void executable_mapped(struct vcpu *v, u64 mfn)
{
    if (v->calls->executable_mapped)
        v->calls->executable_mapped(mfn, v->calls->context);
}

static bool owned(struct domain *d, u64 mfn)
{
    return mfn && mfn < d->machine_frames && d->owner_address[mfn] == d->domid && d->count_info_address[mfn];
}

static bool get_page_type(struct vcpu *v, u64 mfn, u64 wanted)
{
    struct domain *d = v->domain_address;
    u64 *type_info = d->type_info_address, info = type_info[mfn], before = info;
    if (info & TYPE_COUNT) {
        if ((info & TYPE_MASK) != wanted || !(info & VALIDATED))
            return false;
        type_info[mfn] = info + 1;
        return true;
    }
    if ((info & TYPE_MASK) != wanted) {
        if (d->stamp_address[mfn] == d->flush_epoch
            && ((info & TYPE_MASK) == TYPE_WRITABLE || d->caches_tables) && !flush_domain(v))
            return false;
        info = wanted | (wanted == TYPE_WRITABLE ? VALIDATED : 0);
    }
    if (info & VALIDATED) {
        type_info[mfn] = info + 1;
        return true;
    }
    if (wanted == TYPE_SEGDESC)
        return false;
    type_info[mfn] = wanted | 1;
    if (!validate(v, mfn, wanted)) {
        type_info[mfn] = before;
        return false;
    }
    type_info[mfn] = wanted | VALIDATED | 1;
    return true;
}

/* For frames whose last existence reference this is not (`odd_references` is clear). */
static void put_page_type(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    u64 info = --d->type_info_address[mfn], kind = info & TYPE_MASK;
    if (info & TYPE_COUNT)
        return;
    d->stamp_address[mfn] = d->flush_epoch;
    if (kind >= TYPE_L1 && kind <= TYPE_L4 && info & VALIDATED) {
        devalidate(v, mfn, kind);
        d->type_info_address[mfn] = kind;
    }
}

static bool get_page_and_type(struct vcpu *v, u64 mfn, u64 wanted)
{
    struct domain *d = v->domain_address;
    if (!owned(d, mfn))
        return false;
    d->count_info_address[mfn]++;
    if (get_page_type(v, mfn, wanted))
        return true;
    d->count_info_address[mfn]--;
    return false;
}

static void put_page_and_type(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    put_page_type(v, mfn);
    d->count_info_address[mfn]--;
}

/* --- whole tables ------------------------------------------------------------------------------------ */

static bool validate_l1(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    u64 *table = words(d) + (mfn << 9), *type_info = d->type_info_address;
    bool flush = false;
    for (int slot = 0; slot < 512; slot++) {
        u64 entry = table[slot], target = (entry & MASK_FRAME) >> 12;
        if (!(entry & PTE_P))
            continue;
        if (entry & L1_DISALLOWED || target >= d->machine_frames || d->owner_address[target] != d->domid)
            return false;
        if (entry & PTE_RW && (type_info[target] & TYPE_MASK) != TYPE_WRITABLE) {
            if (type_info[target] & TYPE_COUNT)
                return false;
            flush |= d->caches_tables && d->stamp_address[target] == d->flush_epoch;
        }
    }
    if (flush && !flush_domain(v))
        return false;
    for (int slot = 0; slot < 512; slot++) {
        u64 entry = table[slot], target = (entry & MASK_FRAME) >> 12;
        if (!(entry & PTE_P))
            continue;
        if (entry & PTE_RW) {
            if ((type_info[target] & TYPE_MASK) != TYPE_WRITABLE)
                type_info[target] = TYPE_WRITABLE | VALIDATED;
            type_info[target]++;
        }
        d->count_info_address[target]++;
        if (!(entry & PTE_US))
            entry |= GUEST_KERNEL;
        else if (!(entry & GUEST_KERNEL))
            entry |= PTE_G;
        table[slot] = entry | PTE_US;
        if (!(entry & PTE_NX))
            executable_mapped(v, target);
    }
    return true;
}

static bool xens(u64 kind, int slot)
{
    return kind == TYPE_L4 && slot >= (int)XEN_FIRST_SLOT && slot <= (int)XEN_LAST_SLOT;
}

/* Take the references of a present entry in a table of `kind`, which is not a linear one. */
static bool get_table(struct vcpu *v, u64 entry, u64 kind)
{
    return !(entry & DISALLOWED) && get_page_and_type(v, (entry & MASK_FRAME) >> 12, kind - ONE_TYPE);
}

static void put_table(struct vcpu *v, u64 entry, u64 holder)
{
    u64 mfn = (entry & MASK_FRAME) >> 12;
    if (mfn != holder) /* a linear map of the table itself holds nothing */
        put_page_and_type(v, mfn);
}

static bool validate(struct vcpu *v, u64 mfn, u64 kind)
{
    struct domain *d = v->domain_address;
    u64 *table = words(d) + (mfn << 9);
    may_go_on(v); /* what was begun is finished, and counts */
    if (kind == TYPE_L1)
        return validate_l1(v, mfn);
    if (d->odd_references)
        return false; /* what is taken may have to be put again */
    if (kind == TYPE_L4)
        for (u64 slot = XEN_FIRST_SLOT; slot <= XEN_LAST_SLOT; slot++)
            table[slot] = d->xen_l4_entries[slot - XEN_FIRST_SLOT];
    for (int slot = 0; slot < 512; slot++) {
        if (!(table[slot] & PTE_P) || xens(kind, slot))
            continue;
        if (!get_table(v, table[slot], kind)) {
            while (slot--)
                if (table[slot] & PTE_P && !xens(kind, slot))
                    put_table(v, table[slot], mfn);
            return false;
        }
        table[slot] |= PTE_US;
    }
    return true;
}

static void devalidate(struct vcpu *v, u64 mfn, u64 kind)
{
    struct domain *d = v->domain_address;
    u64 *table = words(d) + (mfn << 9);
    bool any = kind != TYPE_L1;
    may_go_on(v); /* what was begun is finished, and counts */
    for (int slot = 0; slot < 512; slot++) {
        u64 entry = table[slot], target = (entry & MASK_FRAME) >> 12;
        if (!(entry & PTE_P) || xens(kind, slot))
            continue;
        any = true;
        if (kind != TYPE_L1) {
            put_table(v, entry, mfn);
            continue;
        }
        if (entry & PTE_RW) {
            d->type_info_address[target]--;
            d->stamp_address[target] = d->flush_epoch;
        }
        d->count_info_address[target]--;
    }
    if (any)
        entry_changed(v, mfn << 9, PTE_P, 0);
}

/* --- single entries ---------------------------------------------------------------------------------- */

static bool modify_l1(struct vcpu *v, u64 index, u64 new)
{
    struct domain *d = v->domain_address;
    u64 *q = words(d), *type_info = d->type_info_address, old = q[index];
    u64 target = (new & MASK_FRAME) >> 12, former = (old & MASK_FRAME) >> 12;
    if (new & PTE_P) {
        if (new & L1_DISALLOWED)
            return false;
        if (new & GUEST_KERNEL)
            new |= PTE_US;
        else
            new |= new & PTE_US ? PTE_G : PTE_US | GUEST_KERNEL;
        if (old & PTE_P && !((old ^ new) & COUNTED)) {
            q[index] = new;
            entry_changed(v, index, old, new);
            if ((old ^ new) & PTE_NX && !(new & PTE_NX))
                executable_mapped(v, target);
            return true;
        }
    }
    if (old & PTE_P) {
        if (d->odd_references || d->owner_address[former] != d->domid)
            return false;
        if (!(old & PTE_RW) && d->ldt_in_use && (type_info[former] & TYPE_MASK) == TYPE_SEGDESC)
            return false;
    }
    if (new & PTE_P) {
        if (target >= d->machine_frames || d->owner_address[target] != d->domid)
            return false;
        if (new & PTE_RW && !get_page_type(v, target, TYPE_WRITABLE))
            return false;
        d->count_info_address[target]++;
        q[index] = new;
        if (!(new & PTE_NX))
            executable_mapped(v, target);
    } else
        q[index] = new;
    if (old & PTE_P) {
        entry_changed(v, index, old, new);
        if (old & PTE_RW && !(--type_info[former] & TYPE_COUNT))
            d->stamp_address[former] = d->flush_epoch;
        d->count_info_address[former]--;
    }
    return true;
}

static bool modify_upper(struct vcpu *v, u64 index, u64 new, u64 kind)
{
    struct domain *d = v->domain_address;
    u64 *q = words(d), old = q[index];
    if (xens(kind, index & 511) || d->odd_references)
        return false;
    if (new & PTE_P) {
        if (new & DISALLOWED)
            return false;
        if (old & PTE_P && !((old ^ new) & COUNTED)) {
            q[index] = new | PTE_US;
            entry_changed(v, index, old, new);
            return true;
        }
        if (!get_table(v, new, kind))
            return false;
        new |= PTE_US;
    }
    q[index] = new;
    if (old & PTE_P) {
        entry_changed(v, index, old, new);
        put_table(v, old, index >> 9);
    }
    return true;
}

static bool update(struct vcpu *v, u64 pointer, u64 value)
{
    struct domain *d = v->domain_address;
    u64 command = pointer & 7, mfn = pointer >> 12, info, kind;
    if (command > MMU_PT_UPDATE_NO_TRANSLATE || !owned(d, mfn))
        return false;
    if (command == MMU_MACHPHYS_UPDATE) {
        d->m2p_address[mfn] = value;
        return true;
    }
    info = d->type_info_address[mfn];
    kind = info & TYPE_MASK;
    if (!(info & TYPE_COUNT) || kind < TYPE_L1 || kind > TYPE_L4) { /* plain memory, such as a table not yet pinned */
        if (!get_page_type(v, mfn, TYPE_WRITABLE))
            return false;
        words(d)[pointer >> 3] = value;
        put_page_type(v, mfn);
        executable_mapped(v, mfn);
        return true;
    }
    if (command == MMU_PT_UPDATE_PRESERVE_AD)
        value |= words(d)[pointer >> 3] & (PTE_A | PTE_D);
    return kind == TYPE_L1 ? modify_l1(v, pointer >> 3, value) : modify_upper(v, pointer >> 3, value, kind);
}

/* --- hypercalls -------------------------------------------------------------------------------------- */

/* How many requests of a batch that goes on were done before. False: Python has to see. */
static bool done_before(struct vcpu *v, u64 done_va, u64 count, u32 *before)
{
    u64 place = done_va ? translate(v, done_va, 4, WRITE) : 0;
    *before = 0;
    if (place == NOWHERE)
        return false;
    if (done_va && count & MMU_UPDATE_PREEMPTED)
        fetch(before, (u8 *)words(v->domain_address) + place, 4);
    return true;
}

/* After `processed` of `count` requests: the result, or SLOW with the rest left to Python in the arguments. */
static i64 batch_done(struct vcpu *v, u64 *a, u64 processed, u64 count, u64 size, u32 before)
{
    u32 done = before + (u32)processed;
    if (processed < count) {
        if (processed) {
            a[0] += processed * size;
            a[1] = count - processed;
            v->batch_begun = a[2] != 0;
            v->batch_done = done;
        }
        return SLOW;
    }
    u64 place = a[2] ? translate(v, a[2], 4, WRITE) : NOWHERE; /* requests may have changed what is mapped there */
    if (place != NOWHERE)
        __builtin_memcpy((u8 *)words(v->domain_address) + place, &done, 4);
    return 0;
}

static i64 do_mmu_update(struct vcpu *v, u64 *a)
{
    const u8 *memory = (u8 *)words(v->domain_address);
    u64 count = a[1] & 0xffffffff & ~MMU_UPDATE_PREEMPTED, i;
    u32 before;
    if ((a[3] & 0xffffffff) != DOMID_SELF || count > BATCH || !done_before(v, a[2], a[1], &before))
        return SLOW;
    for (i = 0; i < count; i++) {
        u64 va = a[0] + 16 * i, at = va & 7 ? NOWHERE : translate(v, va, 16, READ), request[2];
        if (at == NOWHERE || !may_go_on(v))
            break;
        fetch(request, memory + at, sizeof request);
        if (!update(v, request[0], request[1]))
            break;
    }
    return batch_done(v, a, i, count, 16, before);
}

/* The vCPUs that a bitmap in guest memory names. False: Python has to see, or one of them is executing guest code. */
static bool vcpus_of_mask(struct vcpu *v, u64 mask_va, u64 *vcpus)
{
    struct domain *d = v->domain_address;
    unsigned size = (d->vcpu_count + 7) / 8;
    u64 at = translate(v, mask_va, size, READ);
    *vcpus = 0;
    if (at == NOWHERE)
        return false;
    fetch(vcpus, (u8 *)words(d) + at, size);
    return !others_in_guest(v, *vcpus);
}

/* None of these vCPUs, of which no other executes guest code, uses translations that it has (of one page, unless `all`). */
static void flush(struct vcpu *v, u64 vcpus, bool all, u64 va)
{
    flush_others(v, vcpus);
    if (!(vcpus >> v->vcpu_id & 1))
        return;
    if (all)
        v->calls->flush_tlb(v->calls->context);
    else
        v->calls->flush_page(va, v->calls->context);
}

static i64 do_update_va_mapping(struct vcpu *v, u64 *a)
{
    struct domain *d = v->domain_address;
    u64 va = a[0], kind = a[2] & UVMF_FLUSHTYPE_MASK, target = a[2] & ~UVMF_FLUSHTYPE_MASK, vcpus = 1ull << v->vcpu_id;
    u64 index = l1_entry_index(v, va);
    bool flushes = kind == UVMF_TLB_FLUSH || kind == UVMF_INVLPG, masked = flushes && target && target != UVMF_ALL;
    if (target == UVMF_ALL)
        vcpus = ALL_VCPUS;
    if (index == NOWHERE || (masked && (d->contexts != 1 || !vcpus_of_mask(v, target, &vcpus)))
        || (flushes && others_in_guest(v, vcpus)))
        return SLOW;
    u64 info = d->type_info_address[index >> 9];
    if ((info & TYPE_MASK) != TYPE_L1 || !(info & TYPE_COUNT) || d->owner_address[index >> 9] != d->domid)
        return SLOW;
    if (!modify_l1(v, index, a[1]))
        return SLOW;
    if (masked && !vcpus_of_mask(v, target, &vcpus))
        return -(i64)EFAULT; /* the bitmap was what this mapped */
    if (flushes)
        flush(v, vcpus, kind == UVMF_TLB_FLUSH, va);
    return 0;
}

static bool new_base(struct vcpu *v, u64 mfn, bool kernel)
{
    struct domain *d = v->domain_address;
    u64 *base = kernel ? &v->kernel_l4 : &v->user_l4, old = *base;
    if (d->ldt_in_use || d->odd_references)
        return false;
    if (mfn == old)
        return true;
    if (!mfn && kernel)
        return false;
    if (mfn) {
        if (!get_page_and_type(v, mfn, TYPE_L4))
            return false;
        u64 index = mfn << 9 | d->view_slot, entry = d->view_entries[kernel], *q = words(d), former = q[index];
        if (d->view_slot && (former ^ entry) & ~(PTE_A | PTE_D)) {
            q[index] = entry;
            entry_changed(v, index, former, entry);
        }
    }
    *base = mfn;
    if (old)
        put_page_and_type(v, old);
    return true;
}

static bool pin(struct vcpu *v, u64 mfn, u64 kind)
{
    struct domain *d = v->domain_address;
    if (d->odd_references || (owned(d, mfn) && d->type_info_address[mfn] & PINNED) || !get_page_and_type(v, mfn, kind))
        return false;
    d->type_info_address[mfn] |= PINNED;
    v->new_space |= kind == TYPE_L4;
    return true;
}

static bool unpin(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    if (d->odd_references || !owned(d, mfn) || !(d->type_info_address[mfn] & PINNED))
        return false;
    d->type_info_address[mfn] &= ~PINNED;
    put_page_and_type(v, mfn);
    return true;
}

static bool extended_operation(struct vcpu *v, u32 command, u64 argument1, u64 argument2, bool *base_changed)
{
    const struct engine_calls *calls = v->calls;
    u64 vcpus;
    switch (command) {
    case MMUEXT_PIN_L1_TABLE ... MMUEXT_PIN_L4_TABLE:
        return pin(v, argument1, (command - MMUEXT_PIN_L1_TABLE + 1) * ONE_TYPE);
    case MMUEXT_UNPIN_TABLE:
        return unpin(v, argument1);
    case MMUEXT_NEW_BASEPTR:
    case MMUEXT_NEW_USER_BASEPTR:
        if (!new_base(v, argument1, command == MMUEXT_NEW_BASEPTR))
            return false;
        *base_changed = true;
        return true;
    case MMUEXT_TLB_FLUSH_LOCAL:
        calls->flush_tlb(calls->context);
        return true;
    case MMUEXT_INVLPG_LOCAL:
        calls->flush_page(argument1, calls->context);
        return true;
    case MMUEXT_TLB_FLUSH_MULTI:
    case MMUEXT_INVLPG_MULTI:
        if (!argument2 || !vcpus_of_mask(v, argument2, &vcpus))
            return false;
        flush(v, vcpus, command == MMUEXT_TLB_FLUSH_MULTI, argument1);
        return true;
    }
    return false;
}

static i64 do_mmuext_op(struct vcpu *v, u64 *a)
{
    const u8 *memory = (u8 *)words(v->domain_address);
    u64 count = a[1] & 0xffffffff & ~MMU_UPDATE_PREEMPTED, i;
    bool base_changed = false;
    u32 before;
    if ((a[3] & 0xffffffff) != DOMID_SELF || count > BATCH || !done_before(v, a[2], a[1], &before))
        return SLOW;
    for (i = 0; i < count; i++) {
        u64 at = translate(v, a[0] + 24 * i, 24, READ), operation[3];
        if (at == NOWHERE || !may_go_on(v))
            break;
        fetch(operation, memory + at, sizeof operation);
        if (!extended_operation(v, operation[0], operation[1], operation[2], &base_changed))
            break;
    }
    if (base_changed) {
        v->calls->switch_mode(v->kernel_l4, false, v->calls->context);
        v->calls->flush_tlb(v->calls->context);
    }
    return batch_done(v, a, i, count, 24, before);
}

static i64 do_set_segment_base(struct vcpu *v, u64 *a)
{
    u64 *regs = v->calls->regs, base = a[1];
    if (!is_canonical(base))
        return SLOW;
    switch (a[0] & 0xffffffff) {
    case SEGBASE_FS:
        regs[FS_BASE] = base;
        return 0;
    case SEGBASE_GS_USER:
        *(v->kernel_mode ? &v->other_gs_base : &regs[GS_BASE]) = base;
        return 0;
    case SEGBASE_GS_KERNEL:
        *(v->kernel_mode ? &regs[GS_BASE] : &v->other_gs_base) = base;
        return 0;
    }
    return SLOW;
}

/* A hypercall that a multicall may hold. `a`: its arguments, changed where SLOW leaves it a rest. */
static i64 hypercall(struct vcpu *v, u64 number, u64 *a)
{
    struct domain *d = v->domain_address;
    i64 result;
    switch (number) {
    case HYPERVISOR_mmu_update:
        result = do_mmu_update(v, a);
        break;
    case HYPERVISOR_update_va_mapping:
        result = do_update_va_mapping(v, a);
        break;
    case HYPERVISOR_mmuext_op:
        result = do_mmuext_op(v, a);
        break;
    case HYPERVISOR_stack_switch:
        v->kernel_ss = a[0] & 0xffff;
        v->kernel_sp = a[1];
        result = 0;
        break;
    case HYPERVISOR_set_segment_base:
        result = do_set_segment_base(v, a);
        break;
    default:
        return SLOW;
    }
    if (result != SLOW)
        d->hypercall_counts[number]++;
    return result;
}

static i64 do_multicall(struct vcpu *v, u64 *a)
{
    struct domain *d = v->domain_address;
    u8 *memory = (u8 *)words(d);
    u64 calls = a[1] & 0xffffffff, end = a[0] + 64 * calls, done;
    if (!calls || calls > BATCH || end < a[0] || (a[0] < HYPERVISOR_VIRT_END && end > HYPERVISOR_VIRT_START))
        return SLOW;
    for (done = 0; done < calls; done++) {
        u64 va = a[0] + 64 * done, at = va & 7 ? NOWHERE : translate(v, va, 64, WRITE), entry[7], begun[7];
        if (at == NOWHERE || !may_go_on(v))
            break;
        fetch(entry, memory + at, 8);
        fetch(entry + 1, memory + at + 16, 48);
        __builtin_memcpy(begun, entry, sizeof begun);
        i64 result = hypercall(v, begun[0], begun + 1);
        if (result == SLOW) {
            v->call_begun = __builtin_memcmp(begun, entry, sizeof begun) != 0;
            __builtin_memcpy(v->call, begun, sizeof begun);
            break;
        }
        u64 after = translate(v, va, 64, WRITE); /* the call may have changed the page tables */
        if (after == NOWHERE) {
            d->hypercall_counts[HYPERVISOR_multicall]++;
            return -(i64)EFAULT;
        }
        store(memory + after + 8, result);
    }
    if (done == calls) {
        d->hypercall_counts[HYPERVISOR_multicall]++;
        return 0;
    }
    a[0] += 64 * done;
    a[1] = calls - done;
    return SLOW;
}

/* --- traps ------------------------------------------------------------------------------------------- */

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
        ((u8 *)words(v->domain_address))[v->info + UPCALL_MASK] = 1;
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
    u64 mask = memory[v->info + UPCALL_MASK];
    u64 selector = (regs[CS] & (v->kernel_mode ? 0xfffc : 0xffff)) | mask << 32;
    if (!v->kernel_mode)
        set_mode(v, true);
    u64 frame[8], *f = frame;
    *f++ = regs[RCX];
    *f++ = regs[R11];
    if (has_error_code)
        *f++ = error_code;
    *f++ = regs[RIP];
    *f++ = selector;
    *f++ = (rflags & SAVED_FLAGS) | (mask ? 0 : EFLAGS_IF);
    *f++ = rsp;
    *f++ = regs[SS] & 0xffff;
    __builtin_memcpy(memory + at, frame, 8 * count);
    enter(v, handler, stack - 8 * count, rflags & ENTRY_FLAGS, mask_events);
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
    u64 rflags = v->calls->get_rflags(v->calls->context), mask = memory[v->info + UPCALL_MASK];
    u64 frame[7] = {
        regs[RIP], rflags, regs[RIP], FLAT_RING3_CS64 | mask << 32, (rflags & SAVED_FLAGS) | (mask ? 0 : EFLAGS_IF),
        regs[RSP], FLAT_RING3_SS64,
    };
    regs[RCX] = regs[RIP];
    regs[R11] = rflags;
    set_mode(v, true);
    __builtin_memcpy(memory + at, frame, sizeof frame);
    enter(v, v->syscall_callback, stack - sizeof frame, rflags & ENTRY_FLAGS & ~EFLAGS_DF, v->syscall_masks_events);
    return true;
}

static bool is_flat(struct vcpu *v, u64 cs, u64 ss)
{
    for (unsigned i = 0; i < sizeof v->flat_pairs / sizeof *v->flat_pairs; i++)
        if (v->flat_pairs[i] == (cs << 16 | ss))
            return true;
    return false;
}

static bool do_iret(struct vcpu *v)
{
    u64 *regs = v->calls->regs, at = translate(v, regs[RSP], 72, READ), frame[9];
    u8 *memory = (u8 *)words(v->domain_address);
    if (at == NOWHERE || v->nmi_masked || v->compatibility)
        return false;
    fetch(frame, memory + at, sizeof frame);
    u64 rip = frame[4], cs = frame[5] & 0xffff, rflags = frame[6], ss = frame[8] & 0xffff;
    if (rflags & EFLAGS_TF || !is_canonical(rip) || !is_flat(v, cs | 3, ss | 3))
        return false;
    if ((cs & 3) == 3) {
        if (!v->user_l4)
            return false;
        set_mode(v, false);
    }
    memory[v->info + UPCALL_MASK] = !(rflags & EFLAGS_IF);
    bool in_syscall = frame[3] & VGCF_in_syscall;
    regs[RCX] = in_syscall ? rip : frame[2];
    regs[R11] = in_syscall ? rflags : frame[1];
    regs[RSP] = frame[7];
    regs[RIP] = rip;
    v->calls->set_rflags((rflags & EFLAGS_DEFINED & ~(EFLAGS_IOPL | EFLAGS_VM)) | ALWAYS_SET, v->calls->context);
    regs[CS] = cs | 3;
    regs[SS] = ss | 3;
    regs[RAX] = frame[0];
    return true;
}

/* --- direct writes to page tables (writable_pagetables.py) ------------------------------------------- */

static u64 status_flags(u64 left, u64 right)
{
    u64 result = left - right;
    return (left < right ? EFLAGS_CF : 0) | (__builtin_parity(result & 0xff) ? 0 : 4) | ((left ^ right ^ result) & 0x10)
        | (result ? 0 : 0x40) | (result >> 63 << 7) | (((left ^ right) & (left ^ result)) >> 63 << 11);
}

static u64 logic_flags(u8 value)
{
    return (__builtin_parity(value) ? 0 : 4) | (value & 0x80) | (value ? 0 : 0x40);
}

/* The instructions by which kernels write to page tables, all with one memory operand: MOV, XCHG, BTR, BTS, CMPXCHG of 64
   bits, AND and OR of a byte with an immediate.  What the address is made of does not matter: it is `va`. */
static bool carry_out(struct vcpu *v, u64 index, u64 va)
{
    u64 *regs = v->calls->regs, rip = regs[RIP], at = translate(v, rip, 15, READ);
    if (at == NOWHERE)
        return false;
    u8 code[15], *c = code, rex = 0, opcode, modrm;
    fetch(code, (u8 *)words(v->domain_address) + at, 15);
    if (*c == 0xf0)
        c++;
    if ((*c & 0xf0) == 0x40)
        rex = *c++;
    opcode = *c++;
    bool two_bytes = opcode == 0x0f;
    if (two_bytes)
        opcode = *c++;
    modrm = *c++;
    u8 mod = modrm >> 6, rm = modrm & 7, reg = (modrm >> 3 & 7) | (rex & 4) << 1;
    if (mod == 3)
        return false;
    u8 base = rm;
    if (rm == 4)
        base = *c++ & 7;
    c += mod == 1 ? 1 : mod == 2 || base == 5 ? 4 : 0;

    u64 old = words(v->domain_address)[index], new = old, *result = NULL, flags = 0, changed = 0;
    if (!two_bytes && opcode == 0x80 && ((modrm & 0x38) == 0x20 || (modrm & 0x38) == 0x08)) {
        unsigned shift = (va & 7) * 8;
        u8 byte = old >> shift, immediate = *c++;
        byte = (modrm & 0x38) == 0x20 ? byte & immediate : byte | immediate;
        new = (old & ~(0xffull << shift)) | (u64)byte << shift;
        changed = EFLAGS_STATUS;
        flags = logic_flags(byte);
    } else if (va & 7 || !(rex & 8))
        return false;
    else if (!two_bytes && (opcode == 0x89 || opcode == 0x87)) {
        new = regs[reg];
        if (opcode == 0x87)
            result = &regs[reg];
    } else if (!two_bytes && opcode == 0xc7 && !(modrm >> 3 & 7)) {
        int32_t immediate;
        __builtin_memcpy(&immediate, c, 4);
        c += 4;
        new = (i64)immediate;
    } else if (two_bytes && (opcode == 0xb3 || opcode == 0xab || opcode == 0xba)) {
        u8 operation = opcode == 0xba ? modrm >> 3 & 7 : opcode == 0xb3 ? 6 : 5;
        u64 bit = opcode == 0xba ? *c++ & 63 : regs[reg];
        if (bit > 63 || (operation != 5 && operation != 6))
            return false;
        new = operation == 5 ? old | 1ull << bit : old & ~(1ull << bit);
        changed = EFLAGS_CF;
        flags = old >> bit & 1;
    } else if (two_bytes && opcode == 0xb1) {
        changed = EFLAGS_STATUS;
        flags = status_flags(regs[RAX], old);
        if (regs[RAX] == old)
            new = regs[reg];
        else
            result = &regs[RAX];
    } else
        return false;
    if (c > code + 15 || (new != old && !modify_l1(v, index, new)))
        return false;
    if (result)
        *result = old;
    if (changed)
        v->calls->set_rflags((v->calls->get_rflags(v->calls->context) & ~changed) | flags, v->calls->context);
    regs[RIP] = rip + (c - code);
    return true;
}

/* Whether the faulting write to `va` hits an L1 table of the guest's: then its word's index, or else NOWHERE. */
static u64 table_written(struct vcpu *v, u64 va)
{
    struct domain *d = v->domain_address;
    u64 mapping = d->vm_assist >> VMASST_TYPE_writable_pagetables & 1 ? l1_entry_index(v, va) : NOWHERE;
    if (mapping == NOWHERE)
        return NOWHERE;
    u64 entry = words(d)[mapping], mfn = (entry & MASK_FRAME) >> 12;
    if (!(entry & PTE_P) || entry & PTE_RW || d->owner_address[mfn] != d->domid)
        return NOWHERE;
    u64 info = d->type_info_address[mfn];
    if ((info & TYPE_MASK) != TYPE_L1 || !(info & VALIDATED) || !(info & TYPE_COUNT))
        return NOWHERE;
    return mfn << 9 | (va >> 3 & 511);
}

static bool page_fault(struct vcpu *v, u64 error_code, u64 address)
{
    struct domain *d = v->domain_address;
    if (v->kernel_mode
        && (error_code & (PFEC_WRITE | PFEC_PRESENT | PFEC_RESERVED | PFEC_INSN)) == (PFEC_WRITE | PFEC_PRESENT)) {
        u64 index = table_written(v, address);
        if (index != NOWHERE) {
            if (!carry_out(v, index, address))
                return false;
            d->trap_counts[COUNT_PAGE_TABLE_WRITE]++;
            return true;
        }
    }
    if (address >= HYPERVISOR_VIRT_START && address < HYPERVISOR_VIRT_END)
        return false;
    error_code &= ~PFEC_RESERVED;
    error_code = v->kernel_mode ? error_code & ~PFEC_USER : error_code | PFEC_USER;
    u64 info = v->info;
    if (!bounce(v, v->trap_address[VECTOR_PF], true, error_code, v->trap_flags[VECTOR_PF] & TRAP_INFO_MASK_EVENTS))
        return false;
    store((u8 *)words(d) + info + VCPU_INFO_ARCH_CR2, address);
    return true;
}

static bool system_call(struct vcpu *v)
{
    struct domain *d = v->domain_address;
    u64 *regs = v->calls->regs, number = regs[RAX];
    if (!v->kernel_mode) {
        if (!bounce_syscall(v))
            return false;
        d->trap_counts[COUNT_SYSCALL_BOUNCE]++;
        return true;
    }
    if (number == HYPERVISOR_iret) {
        if (!do_iret(v))
            return false;
        d->hypercall_counts[number]++;
        return true;
    }
    u64 a[6] = {regs[RDI], regs[RSI], regs[RDX], regs[R10], regs[R8]};
    i64 result = number == HYPERVISOR_multicall ? do_multicall(v, a) : hypercall(v, number, a);
    if (result == SLOW) { /* what was done already is taken off, until Python has done the rest */
        v->begun = a[0] != regs[RDI] || a[1] != regs[RSI] || v->call_begun;
        v->batch[0] = regs[RDI];
        v->batch[1] = regs[RSI];
        regs[RDI] = a[0];
        regs[RSI] = a[1];
        return false;
    }
    regs[RAX] = result;
    return true;
}

/* CPUID without prefixes, with an answer that Python has given before (emulate.py).  Only registers may change: an engine
   that intercepts it goes on behind it whatever RIP is. */
static int cpuid(struct vcpu *v)
{
    u64 *regs = v->calls->regs, at = translate(v, regs[RIP], 2, READ);
    const u8 *code = (u8 *)words(v->domain_address) + at;
    if (at == NOWHERE || code[0] != 0x0f || code[1] != 0xa2)
        return NOT_HANDLED;
    for (u32 i = 0; i < v->cpuid_count; i++) {
        const u32 *entry = v->cpuid_table[i];
        if (entry[0] != (u32)regs[RAX] || entry[1] != (u32)regs[RCX])
            continue;
        regs[RAX] = entry[2];
        regs[RBX] = entry[3];
        regs[RCX] = entry[4];
        regs[RDX] = entry[5];
        regs[RIP] += 2;
        v->domain_address->trap_counts[TRAP_CPUID]++;
        return v->may_run ? GO_ON : LEAVE;
    }
    return NOT_HANDLED;
}

/* CLI and STI of a guest kernel, which are allowed and do nothing (emulate.py). */
static bool general_protection(struct vcpu *v, u64 error_code)
{
    u64 *rip = &v->calls->regs[RIP], at = translate(v, *rip, 1, READ);
    u8 code;
    if (error_code || !v->kernel_mode || !v->iopl || v->compatibility || at == NOWHERE)
        return false;
    fetch(&code, (u8 *)words(v->domain_address) + at, 1);
    if (code != CLI && code != STI)
        return false;
    ++*rip;
    v->domain_address->trap_counts[COUNT_PRIVILEGED]++;
    return true;
}

static bool handle(struct vcpu *v, u32 vector, u64 error_code, u64 address)
{
    if (vector == TRAP_SYSCALL)
        return system_call(v);
    if (!(vector == VECTOR_PF ? page_fault(v, error_code, address) : general_protection(v, error_code)))
        return false;
    v->domain_address->trap_counts[vector]++;
    return true;
}

/* --- the lock, and the way in ------------------------------------------------------------------------ */

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

/* Take the domain's lock. False: it is taken, or all is Python's. */
static bool begin(struct domain *d)
{
    if (!try_lock(&d->lock_word))
        return false;
    if (!d->python_only) /* set under the lock */
        return true;
    unlock(d);
    return false;
}

/* The end of what was handled: an event that is pending is delivered. */
static int finish(struct vcpu *v)
{
    struct domain *d = v->domain_address;
    const u8 *info = d->memory_address + v->info;
    int answer = v->may_run ? GO_ON : LEAVE;
    if (info[UPCALL_PENDING] && !info[UPCALL_MASK]) {
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
    if (!begin(d))
        return NOT_HANDLED;
    v->work_left = WORK;
    int answer = NOT_HANDLED;
    if (handle(v, vector, error_code, address)) {
        v->native_budget -= v->native_budget != UNLIMITED;
        answer = finish(v);
    }
    unlock(d);
    return answer;
}

/* events.set_pending, for a port of the vCPU that runs. */
static void set_pending(struct vcpu *v, u32 port)
{
    struct domain *d = v->domain_address;
    u8 *shared = d->memory_address + d->shared_info, *info = d->memory_address + v->info;
    u64 *pending = (u64 *)(shared + SHARED_EVTCHN_PENDING), *mask = (u64 *)(shared + SHARED_EVTCHN_MASK);
    u64 bit = 1ull << (port & 63), word = port >> 6;
    if (__atomic_fetch_or(pending + word, bit, __ATOMIC_SEQ_CST) & bit || mask[word] & bit)
        return;
    u64 *selector = (u64 *)(info + VCPU_INFO_PENDING_SEL);
    if (!(__atomic_fetch_or(selector, 1ull << word, __ATOMIC_SEQ_CST) >> word & 1))
        info[UPCALL_PENDING] = 1;
}

/* The singleshot timer, which the guest has set to `deadline`, is due: time.VcpuTimers.set_singleshot_late.  What is not
   handled may go on in the guest without a look at flushes, so `in_guest` stays set until then. */
int handle_timer(struct vcpu *v, u64 deadline)
{
    struct domain *d = v->domain_address;
    if (!v->calls || !begin(d))
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
