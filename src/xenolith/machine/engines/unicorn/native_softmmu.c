/* The software MMU's frequent paths, in C.  See softmmu.py.

   AT(type, base, offset) is what lies there; offsets and numbers are layout.py's. */

#define AT(type, base, offset) (*(type *)((u8 *)(base) + (i64)(offset)))
#define PAGE_SIZE 4096ull
#define PAGE_MASK (-PAGE_SIZE)
#define PAGE_EXECUTE 4 /* QEMU's PAGE_EXEC */

struct block { /* a translated block, by which it was found last */
    u64 pc;
    u64 frame; /* machine address of the page that holds its beginning */
    u32 flags;
    u32 next_mfn; /* of the page into which it crosses; 0: it does not */
    u8 *code;     /* null: this is no block */
};

struct location { /* of a page, for accesses that take the slow path */
    u64 address; /* machine address - guest address */
    u64 attributes;
};

struct tlb_entry {
    u64 read, write, code; /* the page, with flags that keep an access from the fast path; all ones: none */
    u64 frame;             /* machine address */
    u64 addend;            /* host address - guest address */
    u64 unused[3];
};

struct filled { /* which entries of a TLB may be other than empty */
    u64 table; /* its address; 0: none */
    u64 count; /* more than FILLED: all */
    u32 index[FILLED];
};

struct description { /* of a TLB */
    u64 large_page, large_mask;
    u64 window_begin, window_entries;
    u64 used;       /* entries in use, victims not counted */
    u64 evicted;    /* victims since the last flush */
    struct tlb_entry victims[VICTIMS];
    struct location victim_locations[VICTIMS];
    struct location *locations; /* for each entry */
};
_Static_assert(sizeof(struct description) == TLB_DESCRIPTION_SIZE, "description");

struct library library;

static struct softmmu *softmmu_of(u8 *cpu)
{
    return AT(struct softmmu *, cpu, CPU_OPAQUE - CPU_STATE);
}

static struct tlb_entry *table_of(u8 *env, int mmu)
{
    return AT(struct tlb_entry *, env, TLB_FAST + mmu * TLB_FAST_SIZE + 8);
}

static u64 entries_of(u8 *env, int mmu)
{
    return (AT(u64, env, TLB_FAST + mmu * TLB_FAST_SIZE) >> TLB_ENTRY_BITS) + 1;
}

static struct description *description_of(u8 *env, int mmu)
{
    return &AT(struct description, env, TLB_DESCRIPTION + mmu * TLB_DESCRIPTION_SIZE);
}

static struct tlb_entry *entry_for(u8 *env, int mmu, u64 va)
{
    return table_of(env, mmu) + (va >> 12 & (entries_of(env, mmu) - 1));
}

static bool empty(struct tlb_entry *e)
{
    return (e->read & e->write & e->code) == ~0ull;
}

static bool holds(struct tlb_entry *e, u64 page)
{
    u64 mask = PAGE_MASK | TLB_INVALID;
    return (e->read & mask) == page || (e->write & mask) == page || (e->code & mask) == page;
}

static void clear(struct tlb_entry *e)
{
    e->read = e->write = e->code = ~0ull;
}

/* --- finding blocks -------------------------------------------------------------------------------- */

static struct block *place(struct softmmu *s, u64 pc, u32 flags)
{
    return (struct block *)s->blocks + ((pc >> 2 ^ pc >> 16 ^ flags >> 27) & (BLOCKS - 1));
}

/* tb_jmp_cache_hash_func */
static u32 jump_hash(u64 pc)
{
    u64 mixed = pc ^ pc >> 6;
    return (mixed >> 6 & 0xFC0) | (mixed & 0x3F);
}

/* A block of one page, if the TLB has this page */
static inline __attribute__((always_inline)) bool current(u8 *env, struct block *b, u64 pc, u32 flags)
{
    struct tlb_entry *e = entry_for(env, MMU_USER, pc);
    return b->pc == pc && b->flags == flags && e->code == (pc & PAGE_MASK) && e->frame == b->frame && b->code
        && !b->next_mfn;
}

static void remember(struct softmmu *s, u64 pc, u32 flags, u8 *tb)
{
    struct block *b = place(s, pc, flags);
    u64 next = AT(u64, tb, TB_PAGES + 8);
    b->pc = pc;
    b->frame = AT(u64, tb, TB_PAGES);
    b->flags = flags;
    b->next_mfn = next == ~0ull ? 0 : (u32)(next >> 12);
    b->code = next ? AT(u8 *, tb, TB_CODE) : 0; /* frame 0 would be taken for none */
}

/* The same when that failed, for any block.  Faults, and never returns, where the guest may not execute. */
static __attribute__((noinline)) u8 *find_slowly(struct softmmu *s, u8 *cpu, u64 pc, u64 cs_base, u32 flags, u32 cflags)
{
    u8 *env = cpu - (i64)CPU_STATE;
    struct block *b = place(s, pc, flags);
    if (b->pc == pc && b->flags == flags && b->code && !cs_base
        && library.page_of_code(env, pc) == b->frame + (pc & ~PAGE_MASK)
        && (!b->next_mfn || library.page_of_code(env, (pc & PAGE_MASK) + PAGE_SIZE) == (u64)b->next_mfn << 12)
        && b->code) /* which `verify` may have dropped */
        return b->code - TB_SIZE;
    u8 *tb = library.find_block(cpu, pc, cs_base, flags, cflags);
    if (tb && !cs_base)
        remember(s, pc, flags, tb);
    return tb;
}

/* In place of helper_lookup_tb_ptr: where to go on at the end of a block */
u8 *next_code(u8 *env)
{
    u8 *cpu = env + (i64)CPU_STATE;
    struct softmmu *s = softmmu_of(cpu);
    u64 cs_base = AT(u64, env, CS_BASE);
    u64 pc = AT(u64, env, EIP) + cs_base;
    u32 flags = AT(u32, env, HFLAGS) | (AT(u32, env, EFLAGS) & BLOCK_EFLAGS);
    struct block *b = place(s, pc, flags);
    if (!cs_base && current(env, b, pc, flags))
        return b->code;
    u8 *tb = find_slowly(s, cpu, pc, cs_base, flags, BLOCK_CFLAGS);
    if (tb)
        return AT(u8 *, tb, TB_CODE);
    u8 *uc = AT(u8 *, cpu, CPU_UC - CPU_STATE);
    return AT(u8 *, AT(u8 *, uc, UC_TCG), TCG_EPILOGUE);
}

/* In place of tb_htable_lookup, whose caller puts what it returns, or makes then, into tb_jmp_cache */
u8 *find_block(u8 *cpu, u64 pc, u64 cs_base, u32 flags, u32 cflags)
{
    struct softmmu *s = softmmu_of(cpu);
    if (!s)
        return library.find_block(cpu, pc, cs_base, flags, cflags);
    if (s->jumps < JUMPS)
        s->jump[s->jumps++] = jump_hash(pc);
    else
        s->jumps = JUMPS + 1;
    if (cflags != BLOCK_CFLAGS)
        return library.find_block(cpu, pc, cs_base, flags, cflags);
    struct block *b = place(s, pc, flags);
    if (!cs_base && current(cpu - (i64)CPU_STATE, b, pc, flags))
        return b->code - TB_SIZE;
    return find_slowly(s, cpu, pc, cs_base, flags, cflags);
}

/* --- code that others may have changed --------------------------------------------------------------- */

static u64 rotate(u64 value, int right)
{
    return value >> right | value << (64 - right);
}

/* As stubs.EXECUTABLE_MAPPED has it */
static u64 checksum(const u64 *words)
{
    u64 sums[4] = {0};
    for (int i = 0; i < 512; i++)
        sums[i & 3] = rotate(sums[i & 3] ^ words[i], 29) * 0x9e3779b97f4a7c15ull;
    return (sums[0] ^ rotate(sums[1], 16) ^ rotate(sums[2], 32) ^ rotate(sums[3], 48)) | 1;
}

/* Drop the blocks of a frame that has changed since its checksum was taken */
static void verify(struct softmmu *s, u8 *cpu, u64 frame)
{
    u64 mfn = frame >> 12, now = checksum((u64 *)(s->memory + frame));
    ((u8 *)s->unverified)[mfn] = 0;
    if (((u64 *)s->checksums)[mfn] == now)
        return;
    library.invalidate(AT(u8 *, cpu, CPU_UC - CPU_STATE), frame, frame + PAGE_SIZE);
    ((u64 *)s->checksums)[mfn] = now;
}

/* Somebody else has executed the guest: what was translated holds only where memory is as it was */
void distrust_code(u8 *cpu)
{
    struct softmmu *s = softmmu_of(cpu);
    __builtin_memcpy((u8 *)s->unverified, (u8 *)s->marked, s->memory_size >> 12);
}

/* A block is no longer valid: perhaps because its frame has changed */
void forget_block(u8 *uc, u8 *tb)
{
    u8 *cpu = AT(u8 *, uc, UC_CPU);
    struct softmmu *s = cpu ? softmmu_of(cpu) : 0;
    if (!s)
        return;
    struct block *b = place(s, AT(u64, tb, 0), AT(u32, tb, TB_FLAGS));
    if (b->code == AT(u8 *, tb, TB_CODE))
        b->code = 0;
    for (int i = 0; i < 2; i++) {
        u64 frame = AT(u64, tb, TB_PAGES + 8 * i);
        if (frame < s->memory_size)
            ((u64 *)s->checksums)[frame >> 12] = 0;
    }
}

/* In place of tcg_region_reset_all: no block is valid */
void reset_regions(u8 *tcg)
{
    u8 *uc = AT(u8 *, tcg, TCG_UC);
    u8 *cpu = uc ? AT(u8 *, uc, UC_CPU) : 0;
    struct softmmu *s = cpu ? softmmu_of(cpu) : 0;
    if (s)
        for (struct block *b = (struct block *)s->blocks; b < (struct block *)s->blocks + BLOCKS; b++)
            b->code = 0;
    library.reset_regions(tcg);
}

/* In place of tb_gen_code.  From now on stores to the block's pages are to be noticed, through whichever mapping: put
   NOTDIRTY into all TLB entries of these frames, unless that was done and not undone since (stubs.MEMORY_MAPPING). */
u8 *make_block(u8 *cpu, u64 pc, u64 cs_base, u32 flags, u32 cflags)
{
    u64 start = __builtin_ia32_rdtsc();
    u8 *tb = library.make_block(cpu, pc, cs_base, flags, cflags);
    struct softmmu *s = softmmu_of(cpu);
    if (!s)
        return tb;
    s->translating += __builtin_ia32_rdtsc() - start;
    for (int i = 0; i < 2; i++) {
        u64 frame = AT(u64, tb, TB_PAGES + 8 * i);
        if (frame < s->memory_size && !((u8 *)s->marked)[frame >> 12]) {
            ((u8 *)s->marked)[frame >> 12] = 1;
            library.reset_dirty(cpu, s->memory + frame, PAGE_SIZE);
        }
    }
    if (AT(u32, tb, TB_CFLAGS) == BLOCK_CFLAGS && !cs_base)
        remember(s, pc, flags, tb);
    return tb;
}

/* In place of helper_syscall, which before it calls Unicorn's hook looks up the block that it is in, for registers that
   have been stored.  As stubs.SYSTEM_CALL. */
void system_call(u8 *env, int length)
{
    u8 *cpu = env + (i64)CPU_STATE;
    struct softmmu *s = softmmu_of(cpu);
    AT(u64, env, EIP) += length;
    if (!s->system_call(TRAP_SYSCALL, 0, 0, s->hook))
        library.stop(AT(u8 *, cpu, CPU_UC - CPU_STATE));
}

/* In place of tcg_gen_callN: the calls of two helpers become calls of ours */
void gen_call(u8 *tcg, u8 *function, u8 *result, int count, u8 **arguments)
{
    library.gen_call(tcg, function, result, count, arguments);
    u8 *uc = AT(u8 *, tcg, TCG_UC);
    struct softmmu *s = softmmu_of(AT(u8 *, uc, UC_CPU));
    if (function == library.lookup_tb_ptr && s)
        AT(void *, AT(u8 *, tcg, TCG_LAST_OP), CALL_FUNCTION) = next_code;
    else if (function == library.system_call && s && s->system_call)
        AT(void *, AT(u8 *, tcg, TCG_LAST_OP), CALL_FUNCTION) = system_call;
}

/* --- filling the TLB ------------------------------------------------------------------------------- */

/* The note for this table, or the other one */
static struct filled *filled_of(struct softmmu *s, struct tlb_entry *table)
{
    struct filled *f = (struct filled *)s->filled;
    return f->table == (u64)table ? f : f + 1;
}

/* Note that this entry of the TLB in use is no longer empty */
static void note_filled(struct softmmu *s, u8 *env, struct tlb_entry *e)
{
    struct tlb_entry *table = table_of(env, MMU_USER);
    struct filled *f = filled_of(s, table);
    if (f->table != (u64)table)
        return;
    if (f->count < FILLED)
        f->index[f->count] = (u32)(e - table);
    f->count++;
}

/* In place of the CPU's tlb_fill: walk the page tables and put a page into the TLB.  Whatever is not the frequent case is
   QEMU's, as are all faults. */
bool fill_tlb(u8 *cpu, u64 va, int size, int access, int mmu, bool probe, u64 return_address)
{
    struct softmmu *s = softmmu_of(cpu);
    u8 *env = cpu - (i64)CPU_STATE;
    if (!s || mmu != MMU_USER || s->watched || (u64)((i64)(va << 16) >> 16) != va)
        goto theirs;
    u64 rights = ~0ull, frame = AT(u64, env, CR3) & PTE_ADDRESS, entry;
    u64 *at;
    for (int shift = 39;; shift -= 9) {
        if (frame >= s->memory_size)
            goto theirs;
        at = (u64 *)(s->memory + frame) + (va >> shift & 511);
        entry = *at;
        rights &= entry ^ PTE_NX;
        frame = entry & PTE_ADDRESS;
        if (shift == 12)
            break;
        if ((entry & (PTE_P | PTE_A | PTE_PSE)) != (PTE_P | PTE_A))
            goto theirs;
    }
    u64 needed = PTE_P | PTE_US | (access == 1 ? PTE_RW : access == 2 ? PTE_NX : 0);
    if ((rights & needed) != needed || frame >= s->memory_size)
        goto theirs;
    u64 marks = PTE_A | (access == 1 ? PTE_D : 0);
    if ((entry & marks) != marks)
        entry |= __atomic_or_fetch((u32 *)at, (u32)marks, __ATOMIC_RELAXED) & marks;

    if (access == 2 && ((u8 *)s->unverified)[frame >> 12])
        verify(s, cpu, frame);
    u64 page = va & PAGE_MASK;
    struct description *d = description_of(env, MMU_USER);
    struct tlb_entry *e = entry_for(env, MMU_USER, va);
    u64 index = e - table_of(env, MMU_USER);
    if (d->evicted)
        for (struct tlb_entry *v = d->victims; v < d->victims + VICTIMS; v++)
            if (holds(v, page)) {
                clear(v);
                d->used--;
            }
    if (empty(e))
        note_filled(s, env, e);
    else if (!holds(e, page)) {
        u64 victim = d->evicted++ % VICTIMS;
        d->victims[victim] = *e;
        d->victim_locations[victim] = d->locations[index];
        d->used--;
    }
    d->locations[index] = (struct location){frame - page, 0};
    e->read = page;
    e->write = e->code = ~0ull;
    if (rights & PTE_RW && entry & PTE_D)
        e->write = page | (((u8 *)s->marked)[frame >> 12] ? TLB_NOTDIRTY : 0);
    if (rights & PTE_NX && !((u8 *)s->unverified)[frame >> 12])
        e->code = page;
    e->frame = frame;
    e->addend = s->memory + frame - page;
    d->used++;
    AT(u16, env, TLB_DIRTY) |= 1 << MMU_USER;
    return true;
theirs:
    if (s)
        s->fetching = access == 2;
    return library.fill_tlb(cpu, va, size, access, mmu, probe, return_address);
}

/* In place of tlb_set_page_with_attrs, with which QEMU's own tlb_fill ends */
void set_page(u8 *cpu, u64 va, u64 frame, u32 attributes, int rights, int mmu, u64 size)
{
    struct softmmu *s = softmmu_of(cpu);
    u8 *env = cpu - (i64)CPU_STATE;
    if (s && mmu == MMU_USER) {
        struct tlb_entry *e = entry_for(env, MMU_USER, va);
        if (empty(e))
            note_filled(s, env, e);
        if (frame < s->memory_size && ((u8 *)s->unverified)[frame >> 12]) {
            if (s->fetching)
                verify(s, cpu, frame & PAGE_MASK);
            else
                rights &= ~PAGE_EXECUTE;
        }
    }
    library.set_page(cpu, va, frame, attributes, rights, mmu, size);
}

/* --- emptying it ----------------------------------------------------------------------------------- */

static bool empty_tlb(struct softmmu *s, u8 *env, int mmu)
{
    struct tlb_entry *table = table_of(env, mmu);
    u64 entries = entries_of(env, mmu);
    struct description *d = description_of(env, mmu);
    struct filled *f = filled_of(s, table);
    if (f->table != (u64)table || f->count > FILLED || d->used * 100 > entries * 70)
        return false;
    for (u32 i = 0; i < f->count; i++)
        if (f->index[i] < entries)
            clear(table + f->index[i]);
    f->count = 0;
    if (d->evicted)
        for (u64 i = 0; i < VICTIMS; i++)
            clear(d->victims + i);
    d->large_page = d->large_mask = ~0ull;
    d->used = d->evicted = 0;
    return true;
}

/* In place of tlb_flush_by_mmuidx */
void flush_tlbs(u8 *cpu, u16 asked)
{
    struct softmmu *s = softmmu_of(cpu);
    if (!s) {
        library.flush_tlbs(cpu, asked);
        return;
    }
    u8 *env = cpu - (i64)CPU_STATE;
    u16 full = asked & AT(u16, env, TLB_DIRTY);
    for (int mmu = 0; mmu < (int)MMU_SYSTEM; mmu++)
        if (full >> mmu & 1 && empty_tlb(s, env, mmu)) {
            full = (u16)(full & ~(1 << mmu));
            AT(u16, env, TLB_DIRTY) &= (u16)~(1 << mmu);
        }
    if (full || s->jumps > JUMPS) {
        library.flush_tlbs(cpu, full);
        for (int mmu = 0; mmu < (int)MMU_SYSTEM; mmu++)
            if (full >> mmu & 1) {
                struct tlb_entry *other = table_of(env, !mmu);
                struct filled *f = (struct filled *)s->filled + (filled_of(s, other) == (struct filled *)s->filled);
                f->table = (u64)table_of(env, mmu);
                f->count = 0;
            }
    } else
        for (u32 i = 0; i < s->jumps; i++)
            AT(u64, cpu, CPU_JUMPS - CPU_STATE + s->jump[i] * 8) = 0;
    s->jumps = 0;
}
