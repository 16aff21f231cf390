/* iret: hypercalls/iret.py. */

static bool is_flat(struct vcpu *v, u64 cs, u64 ss)
{
    for (unsigned i = 0; i < sizeof v->flat_pairs / sizeof *v->flat_pairs; i++)
        if (v->flat_pairs[i] == (cs << 16 | ss))
            return true;
    return false;
}

static bool do_iret(struct vcpu *v)
{
    u64 *regs = v->calls->regs, at = translate(v, regs[RSP], sizeof(struct iret_frame), READ);
    struct iret_frame frame;
    u8 *memory = (u8 *)words(v->domain_address);
    if (at == NOWHERE || v->nmi_masked || v->compatibility)
        return false;
    fetch(&frame, memory + at, sizeof frame);
    u64 rip = frame.rip, cs = frame.cs & 0xffff, rflags = frame.rflags, ss = frame.ss & 0xffff;
    if (rflags & EFLAGS_TF || !is_canonical(rip) || !is_flat(v, cs | 3, ss | 3))
        return false;
    if ((cs & 3) == 3) {
        if (!v->user_l4)
            return false;
        set_mode(v, false);
    }
    memory[v->info + VCPU_INFO_UPCALL_MASK] = !(rflags & EFLAGS_IF);
    bool in_syscall = frame.flags & VGCF_in_syscall;
    regs[RCX] = in_syscall ? rip : frame.rcx;
    regs[R11] = in_syscall ? rflags : frame.r11;
    regs[RSP] = frame.rsp;
    regs[RIP] = rip;
    if (v->architectural_iopl)
        v->iopl = rflags >> 12 & 3;
    v->calls->set_rflags((rflags & IRET_FLAGS) | ALWAYS_SET, v->calls->context);
    regs[CS] = cs | 3;
    regs[SS] = ss | 3;
    regs[RAX] = frame.rax;
    return true;
}
