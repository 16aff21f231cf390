/* Instructions that trap: emulate.py. */

/* CPUID without prefixes, with an answer that Python has given before.  Only registers may change: an engine
   that intercepts it goes on behind it whatever RIP is. */
static int cpuid(struct vcpu *v)
{
    u64 *regs = v->calls->regs, at = translate(v, regs[RIP], 2, READ);
    const u8 *code = (u8 *)words(v->domain_address) + at;
    if (at == NOWHERE || code[0] != OPCODE_TWO_BYTES || code[1] != OPCODE_CPUID)
        return NOT_HANDLED;
    u32 leaf = (u32)regs[RAX], subleaf = (u32)regs[RCX];
    if (leaf <= LAST_SIMPLE || (leaf >= 0x80000000 && leaf <= LAST_SIMPLE_EXTENDED)) /* cpuid.asked */
        subleaf = 0;
    for (u32 i = 0; i < v->cpuid_count; i++) {
        const u32 *entry = v->cpuid_table[i];
        if (entry[0] != leaf || entry[1] != subleaf)
            continue;
        regs[RAX] = entry[2];
        regs[RBX] = entry[3];
        regs[RCX] = entry[4];
        regs[RDX] = entry[5];
        regs[RIP] += 2;
        v->domain_address->trap_counts[TRAP_CPUID]++;
        return v->may_run ? GO_ON : LEAVE;
    }
    return NOT_HANDLED;
}

/* CLI and STI of a guest kernel, which are allowed and do nothing. */
static bool general_protection(struct vcpu *v, u64 error_code)
{
    u64 *rip = &v->calls->regs[RIP], at = translate(v, *rip, 1, READ);
    u8 code;
    if (error_code || !v->kernel_mode || (!v->iopl && !v->architectural_iopl) || v->compatibility || at == NOWHERE)
        return false;
    fetch(&code, (u8 *)words(v->domain_address) + at, 1);
    if (code != OPCODE_CLI && code != OPCODE_STI)
        return false;
    ++*rip;
    v->domain_address->trap_counts[COUNT_PRIVILEGED]++;
    return true;
}
