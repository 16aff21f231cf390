/* Event channels from the guest's side. */
#include "events.h"

#include "traps.h"

volatile u64 upcall_count, upcall_ports;

long evtchn_alloc_unbound(u16 dom, u16 remote_dom)
{
    struct {
        u16 dom, remote_dom;
        u32 port;
    } op = {dom, remote_dom, 0};
    long status = HYPERCALL(HC_event_channel_op, EVTCHNOP_alloc_unbound, &op);
    return status ? status : op.port;
}

long evtchn_bind_interdomain(u16 remote_dom, u32 remote_port)
{
    struct {
        u16 remote_dom;
        u32 remote_port, local_port;
    } op = {remote_dom, remote_port, 0};
    long status = HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_interdomain, &op);
    return status ? status : op.local_port;
}

long evtchn_bind_virq(u32 virq, u32 vcpu)
{
    struct {
        u32 virq, vcpu, port;
    } op = {virq, vcpu, 0};
    long status = HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_virq, &op);
    return status ? status : op.port;
}

long evtchn_bind_ipi(u32 vcpu)
{
    struct {
        u32 vcpu, port;
    } op = {vcpu, 0};
    long status = HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_ipi, &op);
    return status ? status : op.port;
}

long evtchn_close(u32 port)
{
    return HYPERCALL(HC_event_channel_op, EVTCHNOP_close, &port);
}

long evtchn_send(u32 port)
{
    return HYPERCALL(HC_event_channel_op, EVTCHNOP_send, &port);
}

long evtchn_unmask_op(u32 port)
{
    return HYPERCALL(HC_event_channel_op, EVTCHNOP_unmask, &port);
}

void events_quiet(void)
{
    for (u64 i = 0; i < 64; i++)
        *(volatile u64 *)&shared_info->evtchn_mask[i] = ~0ul;
    for (u64 i = 0; i < 64; i++)
        *(volatile u64 *)&shared_info->evtchn_pending[i] = 0;
    *(volatile u64 *)&shared_info->vcpu[0].pending_selector = 0;
    *(volatile u8 *)&shared_info->vcpu[0].upcall_pending = 0;
}

static bool collect(struct regs *regs)
{
    if (regs->vector != VECTOR_EVENT)
        return false;
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    upcall_count++;
    vcpu->upcall_pending = 0;
    u64 selector = __atomic_exchange_n(&vcpu->pending_selector, 0, __ATOMIC_SEQ_CST);
    for (int word = 0; word < 64; word++) {
        if (!(selector >> word & 1))
            continue;
        u64 ports = shared_info->evtchn_pending[word] & ~shared_info->evtchn_mask[word];
        if (word == 0)
            upcall_ports |= ports;
        for (int bit = 0; bit < 64; bit++)
            if (ports >> bit & 1)
                evtchn_clear((u32)(word * 64 + bit));
    }
    return true;
}

void upcalls_install(void)
{
    trap_hook = collect;
    check_eq("callback_op: register the event callback", callback_register(CALLBACKTYPE_event, 0, trap_256), 0);
}

void upcalls_disable(void)
{
    *(volatile u8 *)&shared_info->vcpu[0].upcall_mask = 1;
}

void upcalls_enable(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    vcpu->upcall_mask = 0;
    barrier();
    if (vcpu->upcall_pending)
        HYPERCALL(HC_xen_version, 0, 0); /* any hypercall: Xen delivers the upcall on the way out */
}

void evtchn_wait(u32 port, u64 until)
{
    struct {
        u32 *ports;
        u32 count;
        u64 timeout;
    } poll = {&port, 1, until};
    HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll);
    evtchn_clear(port);
}
