/* Direct paging with validation: paging.py. */

static u64 validate(struct vcpu *v, u64 mfn, u64 kind, u64 first);
static void devalidate_l1(struct vcpu *v, u64 mfn);

static void entry_changed(struct vcpu *v, u64 index, u64 old, u64 new)
{
    if (v->calls->entry_changed)
        v->calls->entry_changed(index, old, new, v->calls->context);
}

static void executable_mapped(struct vcpu *v, u64 mfn)
{
    if (!v->calls->executable_mapped)
        return;
    v->calls->executable_mapped(mfn, v->calls->context);
    if (!(++v->looked_at % FRAMES_LOOKED_AT))
        spend(v, 1);
}

/* --- references -------------------------------------------------------------------------------------- */

static bool get_page(struct domain *d, u64 mfn)
{
    u64 count;
    if (!mfn || mfn >= d->machine_frames || d->owner_address[mfn] != d->domid)
        return false;
    count = d->count_info_address[mfn];
    if (!count || (count & EXISTENCE_COUNT) >= MOST_REFERENCES)
        return false;
    d->count_info_address[mfn] = count + 1;
    return true;
}

/* For frames whose last existence reference this is not (`python_references` is clear). */
static void put_page(struct domain *d, u64 mfn)
{
    if (d->count_info_address[mfn] & EXISTENCE_COUNT)
        d->count_info_address[mfn]--;
    else
        d->reference_lost = true;
}

static u64 progress_of(u64 info)
{
    return (info & PROGRESS_MASK) >> PROGRESS_SHIFT;
}

/* False leaves a table whose validation was begun as it is: Python goes on from there. */
static bool get_page_type(struct vcpu *v, u64 mfn, u64 wanted)
{
    struct domain *d = v->domain_address;
    u64 *type_info = d->type_info_address, info = type_info[mfn], before = info;
    if (info & TYPE_COUNT) {
        if ((info & TYPE_MASK) != wanted)
            return false;
        if (!(info & PARTIAL)) {
            if (!(info & VALIDATED) || (info & TYPE_COUNT) >= MOST_REFERENCES)
                return false;
            type_info[mfn] = info + 1;
            return true;
        }
    } else {
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
    }
    if (wanted == TYPE_SEGDESC || !may_go_on(v))
        return false;
    type_info[mfn] = wanted | 1;
    u64 progress = validate(v, mfn, wanted, progress_of(info));
    if (progress == ENTRIES)
        type_info[mfn] = wanted | VALIDATED | 1;
    else if (progress)
        type_info[mfn] = wanted | PARTIAL | progress << PROGRESS_SHIFT | 1;
    else
        type_info[mfn] = before;
    if (info & PARTIAL && progress == ENTRIES)
        put_page(d, mfn); /* the caller has one, too */
    if (!(info & PARTIAL) && progress && progress != ENTRIES)
        d->count_info_address[mfn]++;
    return progress == ENTRIES;
}

/* Have an L2..L4 table whose last type reference is gone drop what its entries hold: see `undo`. */
static void begin_undo(struct domain *d, u64 mfn, u64 kind)
{
    d->type_info_address[mfn] = kind | UNDOING | ENTRIES << PROGRESS_SHIFT | 1;
    d->count_info_address[mfn]++;
    d->undo_list[d->undo_count++] = mfn; /* one that an operation puts, and two below */
}

static void put_page_type(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    u64 *info = &d->type_info_address[mfn], kind = *info & TYPE_MASK;
    if (!(*info & TYPE_COUNT)) {
        d->reference_lost = true;
        return;
    }
    if (--*info & TYPE_COUNT)
        return;
    d->stamp_address[mfn] = d->flush_epoch;
    if (!(*info & VALIDATED) || kind < TYPE_L1 || kind > TYPE_L4)
        return;
    spend(v, 1);
    if (kind == TYPE_L1) {
        devalidate_l1(v, mfn);
        *info = kind;
    } else
        begin_undo(d, mfn, kind);
}

static bool get_page_and_type(struct vcpu *v, u64 mfn, u64 wanted)
{
    struct domain *d = v->domain_address;
    if (!get_page(d, mfn))
        return false;
    if (get_page_type(v, mfn, wanted))
        return true;
    put_page(d, mfn);
    return false;
}

static void put_page_and_type(struct vcpu *v, u64 mfn)
{
    put_page_type(v, mfn);
    put_page(v->domain_address, mfn);
}

/* --- whole tables ------------------------------------------------------------------------------------ */

static bool validate_l1(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    u64 *table = words(d) + (mfn << 9), *type_info = d->type_info_address;
    bool flush = false;
    for (int slot = 0; slot < 512; slot++) {
        u64 entry = table[slot], target = (entry & PTE_ADDRESS) >> 12;
        if (!(entry & PTE_P))
            continue;
        if (entry & L1_DISALLOWED || target >= d->machine_frames || d->owner_address[target] != d->domid
            || (d->count_info_address[target] & EXISTENCE_COUNT) >= MOST_REFERENCES
            || (type_info[target] & TYPE_COUNT) >= MOST_REFERENCES)
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
        u64 entry = table[slot], target = (entry & PTE_ADDRESS) >> 12;
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

static void devalidate_l1(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    u64 *table = words(d) + (mfn << 9);
    bool any = false;
    for (int slot = 0; slot < 512; slot++) {
        u64 entry = table[slot], target = (entry & PTE_ADDRESS) >> 12;
        if (!(entry & PTE_P))
            continue;
        any = true;
        if (entry & PTE_RW)
            put_page_type(v, target);
        put_page(d, target);
    }
    if (any)
        entry_changed(v, mfn << 9, PTE_P, 0);
}

static bool xens(u64 kind, u64 slot)
{
    return kind == TYPE_L4 && slot >= XEN_FIRST_SLOT && slot <= XEN_LAST_SLOT;
}

/* Take the references of a present entry in a table of `kind`, which is not a linear one. */
static bool get_table(struct vcpu *v, u64 entry, u64 kind)
{
    return !(entry & DISALLOWED) && get_page_and_type(v, (entry & PTE_ADDRESS) >> 12, kind - ONE_TYPE);
}

static void put_table(struct vcpu *v, u64 entry, u64 holder)
{
    u64 mfn = (entry & PTE_ADDRESS) >> 12;
    if (mfn != holder) /* a linear map of the table itself holds nothing */
        put_page_and_type(v, mfn);
}

/* Check entries from `first` on and take their references: below which entry they are held now. ENTRIES: all are. */
static u64 validate(struct vcpu *v, u64 mfn, u64 kind, u64 first)
{
    struct domain *d = v->domain_address;
    u64 *table = words(d) + (mfn << 9);
    if (kind == TYPE_L1)
        return validate_l1(v, mfn) ? ENTRIES : 0;
    if (kind == TYPE_L4 && !first)
        for (u64 slot = XEN_FIRST_SLOT; slot <= XEN_LAST_SLOT; slot++)
            table[slot] = d->xen_l4_entries[slot - XEN_FIRST_SLOT];
    for (u64 slot = first; slot < ENTRIES; slot++) {
        if (!(table[slot] & PTE_P) || xens(kind, slot))
            continue;
        if (!get_table(v, table[slot], kind))
            return slot;
        table[slot] |= PTE_US;
    }
    return ENTRIES;
}

/* Let the tables in `undo_list` drop what their entries hold. False: some is left, as no work was. */
static bool undo(struct vcpu *v)
{
    struct domain *d = v->domain_address;
    while (d->undo_count) {
        u32 depth = d->undo_count;
        u64 mfn = d->undo_list[depth - 1], *info = &d->type_info_address[mfn], kind = *info & TYPE_MASK;
        u64 slot = progress_of(*info), *table = words(d) + (mfn << 9);
        while (slot && d->undo_count == depth) {
            if (!v->work_left || d->python_references) {
                *info = (*info & ~PROGRESS_MASK) | slot << PROGRESS_SHIFT;
                return false;
            }
            slot--;
            if (table[slot] & PTE_P && !xens(kind, slot))
                put_table(v, table[slot], mfn);
        }
        if (d->undo_count != depth) { /* that was its last use: first the table below */
            *info = (*info & ~PROGRESS_MASK) | slot << PROGRESS_SHIFT;
            continue;
        }
        d->undo_count--;
        *info = kind | ((*info & TYPE_COUNT) - 1);
        d->stamp_address[mfn] = d->flush_epoch;
        entry_changed(v, mfn << 9, PTE_P, 0);
        put_page(d, mfn);
    }
    return true;
}

/* --- single entries ---------------------------------------------------------------------------------- */

static bool modify_l1(struct vcpu *v, u64 index, u64 new)
{
    struct domain *d = v->domain_address;
    u64 *q = words(d), *type_info = d->type_info_address, old = q[index];
    u64 target = (new & PTE_ADDRESS) >> 12, former = (old & PTE_ADDRESS) >> 12;
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
        if (d->python_references || d->owner_address[former] != d->domid)
            return false;
        if (!(old & PTE_RW) && d->ldt_in_use && (type_info[former] & TYPE_MASK) == TYPE_SEGDESC)
            return false;
    }
    if (new & PTE_P) {
        if (new & PTE_RW ? !get_page_and_type(v, target, TYPE_WRITABLE) : !get_page(d, target))
            return false;
        q[index] = new;
        if (!(new & PTE_NX))
            executable_mapped(v, target);
    } else
        q[index] = new;
    if (old & PTE_P) {
        entry_changed(v, index, old, new);
        if (old & PTE_RW)
            put_page_type(v, former);
        put_page(d, former);
    }
    return true;
}

static bool modify_upper(struct vcpu *v, u64 index, u64 new, u64 kind)
{
    struct domain *d = v->domain_address;
    u64 *q = words(d), old = q[index];
    if (xens(kind, index & 511) || d->python_references)
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

/* --- pins -------------------------------------------------------------------------------------------- */

static bool pin(struct vcpu *v, u64 mfn, u64 kind)
{
    struct domain *d = v->domain_address;
    if (d->python_references || mfn >= d->machine_frames || d->type_info_address[mfn] & PINNED
        || !get_page_and_type(v, mfn, kind))
        return false;
    d->type_info_address[mfn] |= PINNED;
    v->new_space |= kind == TYPE_L4;
    return true;
}

static bool unpin(struct vcpu *v, u64 mfn)
{
    struct domain *d = v->domain_address;
    if (d->python_references || mfn >= d->machine_frames || d->owner_address[mfn] != d->domid
        || !(d->type_info_address[mfn] & PINNED))
        return false;
    d->type_info_address[mfn] &= ~PINNED;
    put_page_and_type(v, mfn);
    return true;
}
