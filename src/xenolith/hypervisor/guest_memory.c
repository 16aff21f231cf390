/* Guest memory by linear address: guest_memory.py.  Nothing is copied here; see `fetch`. */

static u64 walk(struct vcpu *v, u64 table, u64 va, u64 rights)
{
    const volatile u64 *q = words(v->domain_address);
    if (va >= LOWER_HALF_END && va < HYPERVISOR_VIRT_END)
        return NOWHERE;
    u64 entry = q[table << 9 | (va >> 39 & 511)];
    for (int shift = 30; shift >= 12; shift -= 9) {
        if ((entry & rights) != rights)
            return NOWHERE;
        entry = q[(entry & PTE_ADDRESS) >> 3 | (va >> shift & 511)];
    }
    return (entry & rights) == rights ? (entry & PTE_ADDRESS) | (va & 0xfff) : NOWHERE;
}

/* The machine address of `size` bytes in one page, or NOWHERE. */
static u64 translate(struct vcpu *v, u64 va, unsigned size, u64 rights)
{
    if ((va & 0xfff) + size > 0x1000)
        return NOWHERE;
    return walk(v, v->kernel_mode ? v->kernel_l4 : v->user_l4, va, rights);
}
