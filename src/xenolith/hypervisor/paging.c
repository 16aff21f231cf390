/* Direct paging with validation: paging.py. */

static bool validate(struct vcpu *v, u64 mfn, u64 kind);
static void devalidate(struct vcpu *v, u64 mfn, u64 kind);

/* --- frame types ------------------------------------------------------------------------------------- */

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
        u64 entry = table[slot], target = (entry & PTE_ADDRESS) >> 12;
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

static bool xens(u64 kind, int slot)
{
    return kind == TYPE_L4 && slot >= (int)XEN_FIRST_SLOT && slot <= (int)XEN_LAST_SLOT;
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
        u64 entry = table[slot], target = (entry & PTE_ADDRESS) >> 12;
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

/* --- pins -------------------------------------------------------------------------------------------- */

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
