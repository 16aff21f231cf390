/* Ring 0's commonest traps in C: system calls and their way back, page faults, changes of page tables and base pointers.

   Python is the reference: paging.c is the C half of paging.py, and its functions do what those of the same names there
   do.  Here is only what succeeds and needs nothing but flat state.  Whatever else comes up, every error included, is
   NOT_HANDLED, found out before anything is changed (or left where Python goes on), and then Python does the rest.

   ring0.py joins the halves, this first and ring0.c, the way in, last.  What Python states, it declares to them.

   A domain's lock is the word `lock_word`, on which nobody waits here: see domain.DomainLock.  Under it the threads of its
   vCPUs, native or in Python, change its state one at a time.  Outside of it a thread touches its own vCPU's registers and
   `in_guest`, and nothing else.

   Guest memory that is no page table may change while it is read: the guest's other vCPUs run.  So whatever is checked was
   first copied, by `fetch`, and is not read again. */

#define ONE_TYPE (1ull << TYPE_SHIFT)
#define NOWHERE (~0ull)
#define ALL_VCPUS (~0ull)
#define SLOW INT64_MIN /* in place of a hypercall's result: nothing was done that its arguments do not tell of */

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

/* An engine that translates code looks at a frame that becomes executable: so many of these are as much work as a table. */
#define FRAMES_LOOKED_AT 8

/* Whether a batch may go on: whoever else wants the domain's lock must not wait long, and Python looks for that. */
static bool may_go_on(struct vcpu *v)
{
    if (!v->work_left)
        return false;
    v->work_left--;
    return true;
}

/* Work that was done whether or not any was left. */
static void spend(struct vcpu *v, u32 work)
{
    v->work_left -= work < v->work_left ? work : v->work_left;
}
