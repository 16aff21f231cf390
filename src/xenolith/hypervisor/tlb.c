/* Flushes of what a domain's vCPUs have cached: tlb.py. */

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
