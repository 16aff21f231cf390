/* The C half of event_fifo.py: raising an event of the vCPU that runs. */

static u32 *event_word(struct domain *d, u32 port)
{
    u64 page = d->event_pages[port / EVENT_WORDS_PER_PAGE];
    return page ? (u32 *)(d->memory_address + page) + port % EVENT_WORDS_PER_PAGE : NULL;
}

static bool set_link(u32 *word, u32 port)
{
    for (unsigned attempts = 0; word && attempts < LINK_ATTEMPTS; attempts++) {
        u32 seen = __atomic_load_n(word, __ATOMIC_RELAXED);
        if (!(seen & L))
            break;
        u32 linked = (seen & ~(u32)(BUSY | LINK_MASK)) | port;
        if (__atomic_compare_exchange_n(word, &seen, linked, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return true;
        __atomic_fetch_or(word, (u32)BUSY, __ATOMIC_SEQ_CST);
    }
    if (word)
        __atomic_fetch_and(word, ~(u32)BUSY, __ATOMIC_SEQ_CST);
    return false;
}

/* Whether the vCPU is to be notified. */
static bool link_port(struct vcpu *v, u32 port, u32 *word)
{
    struct domain *d = v->domain_address;
    if (__atomic_load_n(word, __ATOMIC_RELAXED) & (M | L) || !v->control_block
        || __atomic_fetch_or(word, (u32)L, __ATOMIC_SEQ_CST) & L)
        return false;
    u8 *queue = d->queues_address + port * QUEUE_BYTES;
    u32 priority = queue[PRIORITY], *last = d->vcpu_addresses[queue[LAST_VCPU]]->queue_tails + queue[LAST_PRIORITY];
    if (*last == port)
        *last = 0;
    queue[LAST_PRIORITY] = (u8)priority;
    queue[LAST_VCPU] = (u8)v->vcpu_id;
    u32 tail = v->queue_tails[priority], *control = (u32 *)(d->memory_address + v->control_block);
    v->queue_tails[priority] = port;
    if (tail && set_link(event_word(d, tail), port))
        return false;
    __atomic_store_n(control + CONTROL_BLOCK_HEADS / 4 + priority, port, __ATOMIC_RELAXED);
    return !(__atomic_fetch_or(control, 1u << priority, __ATOMIC_SEQ_CST) >> priority & 1);
}

/* event_fifo.set_pending; whether the vCPU is to be notified. */
static bool fifo_set_pending(struct vcpu *v, u32 port)
{
    struct domain *d = v->domain_address;
    u32 *word = event_word(d, port);
    if (!word) {
        d->queues_address[port * QUEUE_BYTES + EARLY] = 1;
        return false;
    }
    __atomic_fetch_or(word, (u32)P, __ATOMIC_SEQ_CST);
    return link_port(v, port, word);
}
