/* EVTCHNOP_send to a port of dom0's, whose handler an eventfd stands for: hypercalls/event_channel_op.py. */

i64 write(int descriptor, const void *data, size_t size);

static i64 do_event_channel_op(struct vcpu *v, u64 *a)
{
    static const u64 one = 1;
    struct domain *d = v->domain_address;
    u32 port;
    u64 at = (a[0] & 0xffffffff) != EVTCHNOP_send || a[1] & 3 ? NOWHERE : translate(v, a[1], sizeof port, READ);
    if (at == NOWHERE)
        return SLOW;
    fetch(&port, (u8 *)words(d) + at, sizeof port);
    return port < d->bell_count && d->bells[port] >= 0 && write(d->bells[port], &one, sizeof one) == sizeof one ? 0 : SLOW;
}
