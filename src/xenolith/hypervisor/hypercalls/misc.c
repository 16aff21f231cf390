/* set_segment_base: hypercalls/misc.py. */

static i64 do_set_segment_base(struct vcpu *v, u64 *a)
{
    u64 *regs = v->calls->regs, base = a[1];
    if (!is_canonical(base))
        return SLOW;
    switch (a[0] & 0xffffffff) {
    case SEGBASE_FS:
        regs[FS_BASE] = base;
        return 0;
    case SEGBASE_GS_USER:
        *(v->kernel_mode ? &v->other_gs_base : &regs[GS_BASE]) = base;
        return 0;
    case SEGBASE_GS_KERNEL:
        *(v->kernel_mode ? &regs[GS_BASE] : &v->other_gs_base) = base;
        return 0;
    }
    return SLOW;
}
