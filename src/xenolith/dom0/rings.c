/* Shared rings, from a back-end's side: rings.py.  Included by the C halves of back-ends. */

static u32 *ring_word(struct ring *r, u64 which)
{
    return (u32 *)r->address + which;
}

static u8 *ring_entry(struct ring *r, u32 index)
{
    return r->address + ENTRIES + (u64)(index & (r->entries - 1)) * r->entry_size;
}

/* Copy guest memory, once: the compiler must not read it again later, when it may be different. */
static inline void fetch(void *to, const u8 *from, u64 size)
{
    __builtin_memcpy(to, from, size);
    __asm__ volatile("" ::: "memory");
}

/* How many requests have come; -1: the front-end's producer index is impossible. */
static i64 requests_waiting(struct ring *r)
{
    u32 produced = __atomic_load_n(ring_word(r, REQ_PROD), __ATOMIC_ACQUIRE);
    u32 unanswered = produced - r->produced, waiting = produced - r->consumed;
    return unanswered > r->entries || waiting > unanswered ? -1 : (i64)waiting;
}

static void put_response(struct ring *r, const void *response, u64 size)
{
    __builtin_memcpy(ring_entry(r, r->produced++), response, size);
}

/* Ask to be notified of the next request; whether it has come already and no notification will. */
static bool rearm(struct ring *r)
{
    __atomic_store_n(ring_word(r, REQ_EVENT), r->consumed + 1, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(ring_word(r, REQ_PROD), __ATOMIC_RELAXED) != r->consumed;
}

/* Let the front-end see what was put; whether it has to be notified. */
static bool push_responses(struct ring *r)
{
    u32 before = r->pushed, now = r->produced;
    if (now == before)
        return false;
    r->pushed = now;
    __atomic_store_n(ring_word(r, RSP_PROD), now, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    u32 event = __atomic_load_n(ring_word(r, RSP_EVENT), __ATOMIC_RELAXED);
    return now - event < now - before;
}
