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

/* An instruction with one operand in memory, up to its immediate. */
struct instruction {
    u8 code[15], rex, opcode, modrm;
    bool two_bytes, of_rip; /* the operand counts from the instruction's end, which is yet to be added */
    u64 operand;            /* its address */
    u8 *next;               /* in code, whose 15 bytes are more than these instructions can have */
};

static i64 immediate32(struct instruction *i)
{
    int32_t value;
    __builtin_memcpy(&value, i->next, 4);
    i->next += 4;
    return value;
}

/* Decode the instruction at RIP as far as that; false where it has no operand in memory, or cannot be read. */
static bool decode(struct vcpu *v, struct instruction *i)
{
    const u64 *regs = v->calls->regs;
    u64 at = translate(v, regs[RIP], 15, READ);
    if (at == NOWHERE)
        return false;
    fetch(i->code, (u8 *)words(v->domain_address) + at, 15);
    i->next = i->code;
    if (*i->next == 0xf0)
        i->next++;
    i->rex = (*i->next & 0xf0) == 0x40 ? *i->next++ : 0;
    i->opcode = *i->next++;
    i->two_bytes = i->opcode == 0x0f;
    if (i->two_bytes)
        i->opcode = *i->next++;
    i->modrm = *i->next++;
    u8 mod = i->modrm >> 6, rm = i->modrm & 7, base = rm, index_register = 4, scale = 0;
    if (mod == 3)
        return false;
    if (rm == 4) {
        base = *i->next & 7;
        index_register = (u8)((*i->next >> 3 & 7) | (i->rex & 2) << 2);
        scale = *i->next++ >> 6;
    }
    i->operand = index_register != 4 ? regs[index_register] << scale : 0;
    bool displacement_alone = !mod && base == 5;
    i->of_rip = displacement_alone && rm == 5;
    if (!displacement_alone)
        i->operand += regs[base | (i->rex & 1) << 3];
    if (mod == 1)
        i->operand += (u64)(i64)(int8_t)*i->next++;
    else if (mod == 2 || displacement_alone)
        i->operand += (u64)immediate32(i);
    return true;
}

/* The instructions by which kernels write to page tables, all with one memory operand: MOV, XCHG, BTR, BTS, CMPXCHG of 64
   bits, AND and OR of a byte with an immediate.  One whose operand is not at `va` is not the one that faulted. */
static bool carry_out(struct vcpu *v, u64 index, u64 va)
{
    struct instruction i;
    if (!decode(v, &i))
        return false;
    u64 *regs = v->calls->regs, rip = regs[RIP];
    u8 opcode = i.opcode, operation = i.modrm >> 3 & 7, reg = (u8)(operation | (i.rex & 4) << 1);
    u64 old = words(v->domain_address)[index], new = old, *result = NULL, flags = 0, changed = 0;
    if (!i.two_bytes && opcode == 0x80 && (operation == 4 || operation == 1)) {
        unsigned shift = (va & 7) * 8;
        u8 byte = (u8)(old >> shift), immediate = *i.next++;
        byte = operation == 4 ? byte & immediate : byte | immediate;
        new = (old & ~(0xffull << shift)) | (u64)byte << shift;
        changed = EFLAGS_STATUS;
        flags = logic_flags(byte);
    } else if (va & 7 || !(i.rex & 8))
        return false;
    else if (!i.two_bytes && (opcode == 0x89 || opcode == 0x87)) {
        new = regs[reg];
        if (opcode == 0x87)
            result = &regs[reg];
    } else if (!i.two_bytes && opcode == 0xc7 && !operation)
        new = (u64)immediate32(&i);
    else if (i.two_bytes && (opcode == 0xb3 || opcode == 0xab || opcode == 0xba)) {
        operation = opcode == 0xba ? operation : opcode == 0xb3 ? 6 : 5;
        u64 bit = opcode == 0xba ? *i.next++ & 63 : regs[reg];
        if (bit > 63 || (operation != 5 && operation != 6))
            return false;
        new = operation == 5 ? old | 1ull << bit : old & ~(1ull << bit);
        changed = EFLAGS_CF;
        flags = old >> bit & 1;
    } else if (i.two_bytes && opcode == 0xb1) {
        changed = EFLAGS_STATUS;
        flags = status_flags(regs[RAX], old);
        if (regs[RAX] == old)
            new = regs[reg];
        else
            result = &regs[RAX];
    } else
        return false;
    u64 length = (u64)(i.next - i.code);
    if (length > 15 || i.operand + (i.of_rip ? rip + length : 0) != va || (new != old && !modify_l1(v, index, new)))
        return false;
    if (result)
        *result = old;
    if (changed)
        v->calls->set_rflags((v->calls->get_rflags(v->calls->context) & ~changed) | flags, v->calls->context);
    regs[RIP] = rip + length;
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
