/* multicall, and the calls that it may hold: hypercalls/multicall.py. */

/* A hypercall that a multicall may hold. `a`: its arguments, changed where SLOW leaves it a rest. */
static i64 hypercall(struct vcpu *v, u64 number, u64 *a)
{
    struct domain *d = v->domain_address;
    i64 result;
    switch (number) {
    case HYPERVISOR_mmu_update:
        result = do_mmu_update(v, a);
        break;
    case HYPERVISOR_update_va_mapping:
        result = do_update_va_mapping(v, a);
        break;
    case HYPERVISOR_mmuext_op:
        result = do_mmuext_op(v, a);
        break;
    case HYPERVISOR_stack_switch:
        v->kernel_ss = a[0] & 0xffff;
        v->kernel_sp = a[1];
        result = 0;
        break;
    case HYPERVISOR_set_segment_base:
        result = do_set_segment_base(v, a);
        break;
    case HYPERVISOR_event_channel_op:
        result = do_event_channel_op(v, a);
        break;
    case HYPERVISOR_xen_version: /* by which a kernel lets Xen look for events, too */
        if ((a[0] & 0xffffffff) != XENVER_version)
            return SLOW;
        result = MAJOR << 16 | MINOR;
        break;
    default:
        return SLOW;
    }
    if (result != SLOW)
        d->hypercall_counts[number]++;
    return result;
}

static i64 do_multicall(struct vcpu *v, u64 *a)
{
    struct domain *d = v->domain_address;
    u8 *memory = (u8 *)words(d);
    u64 calls = a[1] & 0xffffffff, end = a[0] + MULTICALL_SIZE * calls, done;
    if (!calls || calls > BATCH || end < a[0] || (a[0] < HYPERVISOR_VIRT_END && end > HYPERVISOR_VIRT_START))
        return SLOW;
    for (done = 0; done < calls; done++) {
        u64 va = a[0] + MULTICALL_SIZE * done, at = va & 7 ? NOWHERE : translate(v, va, MULTICALL_SIZE, WRITE), entry[7], begun[7];
        if (at == NOWHERE || !undo(v) || !may_go_on(v))
            break;
        fetch(entry, memory + at, 8);
        fetch(entry + 1, memory + at + MULTICALL_ARGUMENTS, sizeof entry - 8);
        __builtin_memcpy(begun, entry, sizeof begun);
        i64 result = hypercall(v, begun[0], begun + 1);
        if (result == SLOW) {
            v->call_begun = __builtin_memcmp(begun, entry, sizeof begun) != 0;
            __builtin_memcpy(v->call, begun, sizeof begun);
            break;
        }
        u64 after = translate(v, va, MULTICALL_SIZE, WRITE); /* the call may have changed the page tables */
        if (after == NOWHERE) {
            d->hypercall_counts[HYPERVISOR_multicall]++;
            return -(i64)EFAULT;
        }
        store(memory + after + MULTICALL_RESULT, result);
    }
    if (done == calls) {
        d->hypercall_counts[HYPERVISOR_multicall]++;
        return 0;
    }
    a[0] += MULTICALL_SIZE * done;
    a[1] = calls - done;
    return SLOW;
}
