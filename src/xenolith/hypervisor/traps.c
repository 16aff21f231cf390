/* Which trap goes where: traps.py. */

static bool page_fault(struct vcpu *v, u64 error_code, u64 address)
{
    struct domain *d = v->domain_address;
    if (v->kernel_mode
        && (error_code & (PFEC_WRITE | PFEC_PRESENT | PFEC_RESERVED | PFEC_INSN)) == (PFEC_WRITE | PFEC_PRESENT)) {
        u64 index = table_written(v, address);
        if (index != NOWHERE) {
            if (!carry_out(v, index, address))
                return false;
            d->trap_counts[COUNT_PAGE_TABLE_WRITE]++;
            return true;
        }
    }
    if (address >= HYPERVISOR_VIRT_START && address < HYPERVISOR_VIRT_END)
        return false;
    error_code &= ~PFEC_RESERVED;
    error_code = v->kernel_mode ? error_code & ~PFEC_USER : error_code | PFEC_USER;
    u64 info = v->info;
    if (!bounce(v, v->trap_address[VECTOR_PF], true, error_code, v->trap_flags[VECTOR_PF] & TRAP_INFO_MASK_EVENTS))
        return false;
    store((u8 *)words(d) + info + VCPU_INFO_ARCH_CR2, address);
    return true;
}

static bool system_call(struct vcpu *v)
{
    struct domain *d = v->domain_address;
    u64 *regs = v->calls->regs, number = regs[RAX];
    if (!v->kernel_mode) {
        if (!bounce_syscall(v))
            return false;
        d->trap_counts[COUNT_SYSCALL_BOUNCE]++;
        return true;
    }
    if (v->compatibility)
        return false;
    regs[CS] = FLAT_RING3_CS64;
    regs[SS] = FLAT_RING3_SS64;
    if (number == HYPERVISOR_iret) {
        if (!do_iret(v))
            return false;
        d->hypercall_counts[number]++;
        return true;
    }
    u64 a[6] = {regs[RDI], regs[RSI], regs[RDX], regs[R10], regs[R8]};
    i64 result = number == HYPERVISOR_multicall ? do_multicall(v, a) : hypercall(v, number, a);
    if (result == SLOW) { /* what was done already is taken off, until Python has done the rest */
        v->begun = a[0] != regs[RDI] || a[1] != regs[RSI] || v->call_begun;
        v->batch[0] = regs[RDI];
        v->batch[1] = regs[RSI];
        regs[RDI] = a[0];
        regs[RSI] = a[1];
        return false;
    }
    regs[RAX] = result;
    return true;
}

static bool handle(struct vcpu *v, u32 vector, u64 error_code, u64 address)
{
    if (vector == TRAP_SYSCALL)
        return system_call(v);
    if (!(vector == VECTOR_PF ? page_fault(v, error_code, address) : general_protection(v, error_code)))
        return false;
    v->domain_address->trap_counts[vector]++;
    return true;
}
