/* Direct writes to page tables: writable_pagetables.py. */

static u64 status_flags(u64 left, u64 right)
{
    u64 result = left - right;
    return (left < right ? EFLAGS_CF : 0) | (__builtin_parity(result & 0xff) ? 0 : 4) | ((left ^ right ^ result) & 0x10)
        | (result ? 0 : 0x40) | (result >> 63 << 7) | (((left ^ right) & (left ^ result)) >> 63 << 11);
}

static u64 logic_flags(u8 value)
{
    return (__builtin_parity(value) ? 0 : 4) | (value & 0x80) | (value ? 0 : 0x40);
}

/* The instructions by which kernels write to page tables, all with one memory operand: MOV, XCHG, BTR, BTS, CMPXCHG of 64
   bits, AND and OR of a byte with an immediate.  One whose operand is not at `va` is not the one that faulted. */
static bool carry_out(struct vcpu *v, u64 index, u64 va)
{
    u64 *regs = v->calls->regs, rip = regs[RIP], at = translate(v, rip, 15, READ);
    if (at == NOWHERE)
        return false;
    u8 code[15], *c = code, rex = 0, opcode, modrm;
    fetch(code, (u8 *)words(v->domain_address) + at, 15);
    if (*c == 0xf0)
        c++;
    if ((*c & 0xf0) == 0x40)
        rex = *c++;
    opcode = *c++;
    bool two_bytes = opcode == 0x0f;
    if (two_bytes)
        opcode = *c++;
    modrm = *c++;
    u8 mod = modrm >> 6, rm = modrm & 7, reg = (u8)((modrm >> 3 & 7) | (rex & 4) << 1);
    if (mod == 3)
        return false;
    u64 operand = 0;
    u8 base = rm, index_register = 4, scale = 0;
    if (rm == 4) {
        base = *c & 7;
        index_register = (u8)((*c >> 3 & 7) | (rex & 2) << 2);
        scale = *c++ >> 6;
    }
    if (index_register != 4)
        operand += regs[index_register] << scale;
    bool displacement_alone = !mod && base == 5, of_rip = displacement_alone && rm == 5;
    if (!displacement_alone)
        operand += regs[base | (rex & 1) << 3];
    if (mod == 1)
        operand += (u64)(i64)(int8_t)*c++;
    else if (mod == 2 || displacement_alone) {
        int32_t displacement;
        __builtin_memcpy(&displacement, c, 4);
        c += 4;
        operand += (u64)(i64)displacement;
    }

    u64 old = words(v->domain_address)[index], new = old, *result = NULL, flags = 0, changed = 0;
    if (!two_bytes && opcode == 0x80 && ((modrm & 0x38) == 0x20 || (modrm & 0x38) == 0x08)) {
        unsigned shift = (va & 7) * 8;
        u8 byte = (u8)(old >> shift), immediate = *c++;
        byte = (modrm & 0x38) == 0x20 ? byte & immediate : byte | immediate;
        new = (old & ~(0xffull << shift)) | (u64)byte << shift;
        changed = EFLAGS_STATUS;
        flags = logic_flags(byte);
    } else if (va & 7 || !(rex & 8))
        return false;
    else if (!two_bytes && (opcode == 0x89 || opcode == 0x87)) {
        new = regs[reg];
        if (opcode == 0x87)
            result = &regs[reg];
    } else if (!two_bytes && opcode == 0xc7 && !(modrm >> 3 & 7)) {
        int32_t immediate;
        __builtin_memcpy(&immediate, c, 4);
        c += 4;
        new = (i64)immediate;
    } else if (two_bytes && (opcode == 0xb3 || opcode == 0xab || opcode == 0xba)) {
        u8 operation = opcode == 0xba ? modrm >> 3 & 7 : opcode == 0xb3 ? 6 : 5;
        u64 bit = opcode == 0xba ? *c++ & 63 : regs[reg];
        if (bit > 63 || (operation != 5 && operation != 6))
            return false;
        new = operation == 5 ? old | 1ull << bit : old & ~(1ull << bit);
        changed = EFLAGS_CF;
        flags = old >> bit & 1;
    } else if (two_bytes && opcode == 0xb1) {
        changed = EFLAGS_STATUS;
        flags = status_flags(regs[RAX], old);
        if (regs[RAX] == old)
            new = regs[reg];
        else
            result = &regs[RAX];
    } else
        return false;
    if (of_rip)
        operand += rip + (u64)(c - code);
    if (c > code + 15 || operand != va || (new != old && !modify_l1(v, index, new)))
        return false;
    if (result)
        *result = old;
    if (changed)
        v->calls->set_rflags((v->calls->get_rflags(v->calls->context) & ~changed) | flags, v->calls->context);
    regs[RIP] = rip + (c - code);
    return true;
}

/* Whether the faulting write to `va` hits an L1 table of the guest's: then its word's index, or else NOWHERE. */
static u64 table_written(struct vcpu *v, u64 va)
{
    struct domain *d = v->domain_address;
    u64 mapping = d->vm_assist >> VMASST_TYPE_writable_pagetables & 1 ? l1_entry_index(v, va) : NOWHERE;
    if (mapping == NOWHERE)
        return NOWHERE;
    u64 entry = words(d)[mapping], mfn = (entry & PTE_ADDRESS) >> 12;
    if (!(entry & PTE_P) || entry & PTE_RW || d->owner_address[mfn] != d->domid)
        return NOWHERE;
    u64 info = d->type_info_address[mfn];
    if ((info & TYPE_MASK) != TYPE_L1 || !(info & VALIDATED) || !(info & TYPE_COUNT))
        return NOWHERE;
    return mfn << 9 | (va >> 3 & 511);
}
