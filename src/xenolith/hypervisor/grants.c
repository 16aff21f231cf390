/* Pins of granted frames by dom0's back-ends: grants.py.  Whoever calls these holds the domain's lock. */

static u32 *grant_entry(struct domain *d, u32 ref)
{
    return (u32 *)(d->memory_address + (d->grant_frames[ref / GRANT_ENTRIES_PER_FRAME] << 12))
        + ref % GRANT_ENTRIES_PER_FRAME * 2;
}

/* Note in the entry that it is used, if it permits that. */
static bool mark(u32 *entry, u32 domid, u32 marks)
{
    for (unsigned i = 0; i < ATTEMPTS; i++) {
        u32 seen = __atomic_load_n(entry, __ATOMIC_RELAXED);
        if ((seen & GTF_type_mask) != GTF_permit_access || seen >> 16 != domid)
            return false;
        if (marks & GTF_writing && seen & GTF_readonly)
            return false;
        if (__atomic_compare_exchange_n(entry, &seen, seen | marks, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return true;
    }
    return false;
}

static void unmark(u32 *entry, u32 marks)
{
    for (unsigned i = 0; i < ATTEMPTS; i++) {
        u32 seen = __atomic_load_n(entry, __ATOMIC_RELAXED);
        if (__atomic_compare_exchange_n(entry, &seen, seen & ~marks, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return;
    }
}

/* References to a frame, if that takes no change of its type, which is Python's. */
static bool take_frame(struct domain *d, u64 mfn, bool writable)
{
    if (mfn >= d->machine_frames)
        return false;
    u64 info = d->type_info_address[mfn];
    if (writable && ((info & TYPE_MASK) != TYPE_WRITABLE || !(info & VALIDATED) || (info & TYPE_COUNT) >= MOST_REFERENCES))
        return false;
    if (!get_page(d, mfn))
        return false;
    d->type_info_address[mfn] += writable;
    return true;
}

static void pin_grant(struct domain *d, struct pins *p, u32 i)
{
    u32 ref = p->refs[i];
    bool writable = p->writable[i];
    if (ref >= d->grant_entries)
        return;
    struct active *a = &d->active_grants[ref];
    u32 *entry = grant_entry(d, ref), marks = 0;
    bool used = a->readers || a->writers;
    if (used && a->domid)
        return;
    if (!used)
        marks = writable ? GTF_reading | GTF_writing : GTF_reading;
    else if (writable && !a->writers)
        marks = GTF_writing;
    if (marks && !mark(entry, 0, used ? GTF_reading | GTF_writing : marks))
        return;
    u32 mfn = used ? a->mfn : __atomic_load_n(entry + 1, __ATOMIC_RELAXED);
    if (!take_frame(d, mfn, writable)) {
        if (marks)
            unmark(entry, used ? GTF_writing : GTF_reading | GTF_writing);
        return;
    }
    a->mfn = mfn;
    a->domid = 0;
    *(writable ? &a->writers : &a->readers) += 1;
    p->mfns[i] = mfn;
    p->addresses[i] = (u64)d->memory_address + ((u64)mfn << 12);
    p->states[i] = IS_PINNED;
}

static void unpin_grant(struct domain *d, struct pins *p, u32 i)
{
    u32 ref = p->refs[i], mfn = p->mfns[i];
    struct active *a = &d->active_grants[ref];
    u64 *count = &d->count_info_address[mfn], *info = &d->type_info_address[mfn];
    if (ref >= d->grant_entries || (*count & EXISTENCE_COUNT) <= 1 || (p->writable[i] && !(*info & TYPE_COUNT)))
        return;
    u32 marks = 0;
    if (p->writable[i]) {
        if (!(--*info & TYPE_COUNT))
            d->stamp_address[mfn] = d->flush_epoch;
        a->writers--;
        p->states[i] = d->code_frames && d->code_frames[mfn] ? HAS_CODE : NOT_PINNED;
    } else {
        a->readers--;
        p->states[i] = NOT_PINNED;
    }
    --*count;
    if (!a->writers)
        marks = a->readers ? GTF_writing : GTF_reading | GTF_writing;
    if (marks)
        unmark(grant_entry(d, ref), marks);
}
