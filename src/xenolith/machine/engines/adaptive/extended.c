/* XSAVE64, XSAVEOPT64, XSAVEC64 and XRSTOR64 on Unicorn, as extended.py has them, which is the reference: false, with
   nothing changed, leaves an instruction to that.  x87 and SSE state is QEMU's own, in `env`; the other components are
   in `image`, in the standard format. */

struct area { /* the memory operand, in the frames that it lies in */
    u8 *pages[4];
    u64 frames[4];
    unsigned offset, size, count;
};

static u64 frame_at(struct extended *x, u64 va, u64 needed, u64 needed_of_leaf)
{
    return walk(x->memory, x->memory_size, load64(x->env + CR + 24), va, needed, needed_of_leaf);
}

/* Frames of the first `size` bytes at `va`, which code at CPL 3 could read (and write) without a change to its tables. */
static bool find(struct extended *x, struct area *area, u64 va, unsigned size, bool writable)
{
    area->offset = va & 0xfff;
    area->size = size;
    area->count = 0;
    if (va & 63 || !is_canonical_range(va, size)
        || area->offset + size > sizeof area->pages / sizeof *area->pages * 0x1000)
        return false;
    for (unsigned at = 0; at < area->offset + size; at += 0x1000) {
        u64 frame = frame_at(x, va + at, writable ? STORABLE : LOADABLE, writable ? PTE_D : 0);
        if (!frame)
            return false;
        area->frames[area->count] = frame >> 12;
        area->pages[area->count++] = x->memory + frame;
    }
    return true;
}

/* As many of `size` bytes at `at` as lie in one page: where, and *here says how many. */
static u8 *piece(struct area *area, unsigned at, unsigned size, unsigned *here)
{
    unsigned place = area->offset + at, left = 0x1000 - (place & 0xfff);
    *here = left < size ? left : size;
    return area->pages[place >> 12] + (place & 0xfff);
}

static void put(struct area *area, unsigned at, const void *data, unsigned size)
{
    for (unsigned done = 0, here; done < size; done += here) {
        u8 *page = piece(area, at + done, size - done, &here);
        __builtin_memcpy(page, (const u8 *)data + done, here);
    }
}

static void get(struct area *area, unsigned at, void *data, unsigned size)
{
    for (unsigned done = 0, here; done < size; done += here) {
        u8 *page = piece(area, at + done, size - done, &here);
        __builtin_memcpy((u8 *)data + done, page, here);
    }
}

/* Where a component lies in an image that holds those of `present`; *end grows to behind it. */
static unsigned place(struct extended *x, unsigned i, bool compacted, unsigned *end)
{
    unsigned start = x->start[i];
    if (compacted)
        start = x->aligned[i] ? (*end + 63) & ~63u : *end;
    if (start + x->size[i] > *end)
        *end = start + x->size[i];
    return start;
}

static unsigned end_of(struct extended *x, u64 present, bool compacted)
{
    unsigned end = XSAVE_EXTENDED;
    for (unsigned i = 0; i < x->components; i++)
        if (present >> x->number[i] & 1)
            place(x, i, compacted, &end);
    return end;
}

/* --- x87 and SSE, between QEMU's form and an image's first 416 bytes: unicorn/xsave.py ---------------- */

static void store_legacy(struct extended *x, u8 *image)
{
    u8 *env = x->env;
    unsigned top = env[FPSTT] & 7;
    u16 status, control;
    u8 tags = 0;
    __builtin_memcpy(&status, env + FPUS, 2);
    __builtin_memcpy(&control, env + FPUC, 2);
    status = (u16)((status & ~(7u << 11)) | top << 11);
    for (unsigned i = 0; i < 8; i++)
        tags |= (u8)(!env[FPTAGS + i] << i);
    __builtin_memset(image, 0, LEGACY_END);
    __builtin_memcpy(image, &control, 2);
    __builtin_memcpy(image + 2, &status, 2);
    image[4] = tags;
    __builtin_memcpy(image + 8, env + FPIP, 8);
    __builtin_memcpy(image + 16, env + FPDP, 8);
    __builtin_memcpy(image + MXCSR_IN_IMAGE, env + MXCSR, 4);
    image[28] = image[29] = 0xff; /* MXCSR_MASK */
    for (unsigned i = 0; i < 8; i++)
        __builtin_memcpy(image + ST + 16 * i, env + FPREGS + 16 * ((top + i) & 7), 10);
    for (unsigned i = 0; i < 16; i++)
        __builtin_memcpy(image + XMM_IN_IMAGE + 16 * i, env + XMM + XMM_STRIDE * i, 16);
}

static void load_x87(struct extended *x, const u8 *image)
{
    static const u8 initial[XSAVE_EXTENDED] = {0x7f, 0x03};
    u8 *env = x->env;
    u16 status;
    if (!image)
        image = initial;
    __builtin_memcpy(&status, image + 2, 2);
    u32 top = status >> 11 & 7;
    status &= (u16)~(7u << 11);
    __builtin_memcpy(env + FPSTT, &top, 4);
    __builtin_memcpy(env + FPUS, &status, 2);
    __builtin_memcpy(env + FPUC, image, 2);
    __builtin_memcpy(env + FPIP, image + 8, 8);
    __builtin_memcpy(env + FPDP, image + 16, 8);
    for (unsigned i = 0; i < 8; i++) {
        u8 *physical = env + FPREGS + 16 * ((top + i) & 7);
        env[FPTAGS + i] = !(image[4] >> i & 1);
        __builtin_memset(physical, 0, 16);
        __builtin_memcpy(physical, image + ST + 16 * i, 10);
    }
}

static void load_sse(struct extended *x, const u8 *image)
{
    for (unsigned i = 0; i < 16; i++) {
        u8 *xmm = x->env + XMM + XMM_STRIDE * i;
        __builtin_memset(xmm, 0, XMM_STRIDE);
        if (image)
            __builtin_memcpy(xmm, image + XMM_IN_IMAGE + 16 * i, 16);
    }
}

/* --- the instructions --------------------------------------------------------------------------------- */

static bool save(struct extended *x, u64 va, u64 requested, bool compacted)
{
    u64 used = (load64(x->image + XSAVE_HEADER) & ~(u64)(XSTATE_X87 | XSTATE_SSE)) | XSTATE_X87 | XSTATE_SSE, stored = compacted ? requested & used : requested;
    unsigned end = XSAVE_EXTENDED;
    struct area area;
    u8 legacy[LEGACY_END];
    u64 header[2];
    if (!find(x, &area, va, end_of(x, requested, compacted), true))
        return false;
    store_legacy(x, legacy);
    if (stored & XSTATE_X87) {
        put(&area, 0, legacy, 24);
        put(&area, ST, legacy + ST, 128);
    }
    if (stored & XSTATE_SSE)
        put(&area, XMM_IN_IMAGE, legacy + XMM_IN_IMAGE, 256);
    if (requested & (compacted ? XSTATE_SSE : XSTATE_SSE | XSTATE_AVX))
        put(&area, MXCSR_IN_IMAGE, legacy + MXCSR_IN_IMAGE, 8);
    for (unsigned i = 0; i < x->components; i++) {
        static const u8 zeros[64];
        u64 bit = 1ull << x->number[i];
        if (!(requested & bit))
            continue;
        unsigned start = place(x, i, compacted, &end);
        if (!(stored & bit))
            continue;
        if (used & bit)
            put(&area, start, x->image + x->start[i], x->size[i]);
        else
            for (unsigned done = 0; done < x->size[i]; done += 64)
                put(&area, start + done, zeros, x->size[i] - done < 64 ? x->size[i] - done : 64);
    }
    get(&area, XSAVE_HEADER, header, 16);
    if (compacted) {
        header[0] = stored;
        header[1] = COMPACTED | requested;
    } else
        header[0] = (header[0] & ~requested) | (requested & used);
    put(&area, XSAVE_HEADER, header, 16);
    for (unsigned i = 0; i < area.count; i++)
        x->code_written(area.frames[i]);
    return true;
}

static bool restore(struct extended *x, u64 va, u64 requested)
{
    struct area area;
    u64 header[8], given, layout, before = load64(x->image + XSAVE_HEADER);
    unsigned end = XSAVE_EXTENDED;
    u64 used = 0; /* extended components with anything but zeros */
    u8 legacy[LEGACY_END];
    u32 mxcsr;
    if (!find(x, &area, va, XSAVE_EXTENDED, false))
        return false;
    get(&area, XSAVE_HEADER, header, 64);
    given = header[0];
    layout = header[1] & ~COMPACTED;
    bool compacted = header[1] & COMPACTED;
    for (unsigned i = 2; i < 8; i++)
        if (header[i])
            return false;
    if (given & ~(compacted ? layout : x->xcr0) || layout & ~x->xcr0 || (layout && !compacted))
        return false;
    u64 present = compacted ? layout : requested;
    if (!find(x, &area, va, end_of(x, present, compacted), false))
        return false;
    for (unsigned i = 0; i < x->components; i++) {
        u64 bit = 1ull << x->number[i], word;
        if (!(present & bit))
            continue;
        unsigned start = place(x, i, compacted, &end);
        if (!(requested & given & bit))
            continue;
        for (unsigned done = 0; done < x->size[i]; done += 8) {
            word = 0;
            get(&area, start + done, &word, x->size[i] - done < 8 ? x->size[i] - done : 8);
            if (word)
                used |= bit;
        }
    }
    if (used && !x->wide)
        return false; /* in the middle of something with wide vectors */
    get(&area, 0, legacy, sizeof legacy);
    __builtin_memcpy(&mxcsr, legacy + MXCSR_IN_IMAGE, 4);
    bool loads_mxcsr = compacted ? requested & given & XSTATE_SSE : requested & (XSTATE_SSE | XSTATE_AVX);
    if (loads_mxcsr && mxcsr & ~MXCSR_DEFINED)
        return false;
    if (requested & XSTATE_X87) {
        load_x87(x, given & XSTATE_X87 ? legacy : NULL);
        x->update_fp_status(x->env);
    }
    if (requested & XSTATE_SSE)
        load_sse(x, given & XSTATE_SSE ? legacy : NULL);
    if (loads_mxcsr || requested & XSTATE_SSE) {
        mxcsr = loads_mxcsr ? mxcsr : INITIAL_MXCSR;
        __builtin_memcpy(x->env + MXCSR, &mxcsr, 4);
        x->update_mxcsr_status(x->env);
    }
    end = XSAVE_EXTENDED;
    for (unsigned i = 0; i < x->components; i++) {
        if (!(present >> x->number[i] & 1))
            continue;
        unsigned start = place(x, i, compacted, &end);
        if (used >> x->number[i] & 1)
            get(&area, start, x->image + x->start[i], x->size[i]);
    }
    before = (before & ~requested) | used | XSTATE_X87 | XSTATE_SSE;
    __builtin_memcpy(x->image + XSAVE_HEADER, &before, 8);
    return true;
}

/* The instruction at RIP, if it is one of these, in 64-bit code, with an operand that is a register's address, plain or
   with a displacement. */
bool carry_out(struct extended *x)
{
    u64 *regs = (u64 *)x->env, rip = regs[RIP];
    u32 hflags;
    u8 code[9];
    __builtin_memcpy(&hflags, x->env + HFLAGS, 4);
    if (hflags & HF_TS || !(hflags & HF_CS64) || (rip & 0xfff) > 0x1000 - sizeof code)
        return false;
    u64 frame = is_canonical(rip) ? frame_at(x, rip, PTE_P | PTE_US, 0) : 0;
    if (!frame)
        return false;
    __builtin_memcpy(code, x->memory + frame + (rip & 0xfff), sizeof code);
    u8 operation = code[3] >> 3 & 7, mod = code[3] >> 6, rm = code[3] & 7;
    if ((code[0] != 0x48 && code[0] != 0x49) || code[1] != 0x0f || mod == 3 || rm == 4 || (mod == 0 && rm == 5))
        return false;
    u64 va = regs[rm | (code[0] & 1) << 3];
    unsigned length = 4;
    if (mod == 1) {
        va += (int8_t)code[4];
        length = 5;
    } else if (mod == 2) {
        int32_t displacement;
        __builtin_memcpy(&displacement, code + 4, 4);
        va += (i64)displacement;
        length = 8;
    }
    u64 requested = (regs[RDX] << 32 | (regs[RAX] & 0xffffffff)) & x->xcr0;
    bool done = false;
    if (code[2] == 0xc7 && operation == 4)
        done = save(x, va, requested, true);
    else if (code[2] == 0xae && (operation == 4 || operation == 6))
        done = save(x, va, requested, false);
    else if (code[2] == 0xae && operation == 5)
        done = restore(x, va, requested);
    if (done) {
        regs[RIP] = rip + length;
        x->handled++;
    }
    return done;
}
