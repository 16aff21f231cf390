/* mmu_update, update_va_mapping, mmuext_op: hypercalls/mmu.py. */

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
        table = (entry & PTE_ADDRESS) >> 12;
    }
    return table << 9 | (va >> 12 & 511);
}

static bool update(struct vcpu *v, u64 pointer, u64 value)
{
    struct domain *d = v->domain_address;
    u64 command = pointer & 7, mfn = pointer >> 12, info, kind;
    if (command > MMU_PT_UPDATE_NO_TRANSLATE || !mfn || mfn >= d->machine_frames || d->owner_address[mfn] != d->domid
        || !d->count_info_address[mfn])
        return false;
    if (command == MMU_MACHPHYS_UPDATE) {
        d->m2p_address[mfn] = value;
        return true;
    }
    info = d->type_info_address[mfn];
    kind = info & TYPE_MASK;
    if (!(info & TYPE_COUNT) || !(info & VALIDATED) || kind < TYPE_L1 || kind > TYPE_L4) { /* plain memory, such as a table not yet pinned */
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
        u64 va = a[0] + MMU_UPDATE_SIZE * i, at = va & 7 ? NOWHERE : translate(v, va, MMU_UPDATE_SIZE, READ), request[2];
        if (at == NOWHERE || !undo(v) || !may_go_on(v))
            break;
        fetch(request, memory + at, sizeof request);
        if (!update(v, request[0], request[1]))
            break;
    }
    return batch_done(v, a, i, count, MMU_UPDATE_SIZE, before);
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
    if (d->ldt_in_use || d->python_references)
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
        u64 at = translate(v, a[0] + MMUEXT_OP_SIZE * i, MMUEXT_OP_SIZE, READ), operation[3];
        if (at == NOWHERE || !undo(v) || !may_go_on(v))
            break;
        fetch(operation, memory + at, sizeof operation);
        if (!extended_operation(v, (u32)operation[0], operation[1], operation[2], &base_changed))
            break;
    }
    if (base_changed) {
        v->calls->switch_mode(v->kernel_l4, false, v->calls->context);
        v->calls->flush_tlb(v->calls->context);
    }
    return batch_done(v, a, i, count, MMUEXT_OP_SIZE, before);
}
