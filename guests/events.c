/*
 * Event channels, the 2-level ABI: every way to make a port and to lose it, sending, the two masks and
 * the selector, upcalls, polling (public event_channel.h; the paper's section 3.2).
 */
#include "events.h"

#include "paging.h"
#include "traps.h"

#define WILD 0x700000000000ul

#define EVTCHNSTAT_closed 0
#define EVTCHNSTAT_unbound 1
#define EVTCHNSTAT_interdomain 2
#define EVTCHNSTAT_pirq 3
#define EVTCHNSTAT_virq 4
#define EVTCHNSTAT_ipi 5

struct status {
    u16 dom;
    u32 port, status, vcpu;
    union {
        u16 unbound_dom;
        struct {
            u16 dom;
            u32 port;
        } interdomain;
        u32 virq;
    };
};

static struct status status_of(u32 port)
{
    struct status s = {.dom = DOMID_SELF, .port = port, .status = 99};
    long error = HYPERCALL(HC_event_channel_op, EVTCHNOP_status, &s);
    if (error)
        s.status = (u32)error;
    return s;
}

static void making_ports(void)
{
    struct status s;
    print("# making ports\n");
    long unbound = evtchn_alloc_unbound(DOMID_SELF, 0);
    check_eq("  alloc_unbound", unbound > 0, 1);
    s = status_of((u32)unbound);
    check_eq("  its status is unbound", s.status, EVTCHNSTAT_unbound);
    check_eq("  for domain 0", s.unbound_dom, 0);
    check_eq("  at vCPU 0", s.vcpu, 0);
    check_eq("  alloc_unbound for another domain", evtchn_alloc_unbound(0, DOMID_SELF), -EPERM);
    check_eq("  alloc_unbound for a domain that does not exist", evtchn_alloc_unbound(999, 0), -ESRCH);
    check_eq("  the remote domain need not exist", evtchn_alloc_unbound(DOMID_SELF, 999) > 0, 1);

    long ipi = evtchn_bind_ipi(0);
    check_eq("  bind_ipi", ipi > 0, 1);
    check_eq("  its status is IPI", status_of((u32)ipi).status, EVTCHNSTAT_ipi);
    check_eq("  bind_ipi at a vCPU that does not exist", evtchn_bind_ipi(31), -ENOENT);
    check_eq("  bind_ipi at a vCPU beyond all", evtchn_bind_ipi(0xffffffff), -ENOENT);

    long virq = evtchn_bind_virq(VIRQ_DEBUG, 0);
    check_eq("  bind_virq", virq > 0, 1);
    s = status_of((u32)virq);
    check_eq("  its status is VIRQ", s.status, EVTCHNSTAT_virq);
    check_eq("  the VIRQ's number", s.virq, VIRQ_DEBUG);
    check_eq("  bind_virq twice", evtchn_bind_virq(VIRQ_DEBUG, 0), -EEXIST);
    check_eq("  bind_virq of a number beyond all", evtchn_bind_virq(24, 0), -EINVAL);
    check_eq("  bind_virq of a global one at vCPU 1", evtchn_bind_virq(VIRQ_DOM_EXC, 1), -EINVAL);
    check_eq("  bind_virq at a vCPU that does not exist", evtchn_bind_virq(VIRQ_TIMER, 31), -ENOENT);
    check_eq("  bind_virq of a global one at vCPU 0", evtchn_bind_virq(VIRQ_DOM_EXC, 0) > 0, 1);

    print("# losing them\n");
    check_eq("  close", evtchn_close((u32)ipi), 0);
    check_eq("  its status is closed", status_of((u32)ipi).status, EVTCHNSTAT_closed);
    check_eq("  close twice", evtchn_close((u32)ipi), -EINVAL);
    check_eq("  a new port is the lowest free one", evtchn_bind_ipi(0), ipi);
    check_eq("  close", evtchn_close((u32)ipi), 0);
    check_eq("  close of a VIRQ", evtchn_close((u32)virq), 0);
    check_eq("  which can be bound again", evtchn_bind_virq(VIRQ_DEBUG, 0), ipi < virq ? ipi : virq);
    evtchn_close((u32)(ipi < virq ? ipi : virq));
    check_eq("  close of port 0", evtchn_close(0), -EINVAL);
    check_eq("  close of a port beyond all", evtchn_close(4096), -EINVAL);
    check_eq("  close of a port far beyond all", evtchn_close(0xffffffff), -EINVAL);
    check_eq("  status of port 0", status_of(0).status, EVTCHNSTAT_closed);
    check_eq("  status of a port beyond all", (int)status_of(0x7fffffff).status, -EINVAL);
    check_eq("  close of an unbound one", evtchn_close((u32)unbound), 0);
}

static void loopback(void)
{
    struct status s;
    print("# a channel to ourselves\n");
    long a = evtchn_alloc_unbound(DOMID_SELF, DOMID_SELF);
    check_eq("  alloc_unbound", a > 0, 1);
    check_eq("  send into it before it is bound is silently lost", evtchn_send((u32)a), 0);
    long b = evtchn_bind_interdomain(DOMID_SELF, (u32)a);
    check_eq("  bind_interdomain", b > 0 && b != a, 1);
    s = status_of((u32)a);
    check_eq("  the first end's status is interdomain", s.status, EVTCHNSTAT_interdomain);
    check_eq("  its other end is the second", s.interdomain.port, b);
    check_eq("  the second's is the first", status_of((u32)b).interdomain.port, a);
    check_eq("  binding makes the local end pending", evtchn_pending((u32)b), 1);
    evtchn_clear((u32)b);
    check_eq("  send at the first", evtchn_send((u32)a), 0);
    check_eq("  the second is pending", evtchn_pending((u32)b), 1);
    check_eq("  the first is not", evtchn_pending((u32)a), 0);
    check_eq("  send at the second", evtchn_send((u32)b), 0);
    check_eq("  the first is pending", evtchn_pending((u32)a), 1);
    check_eq("  bind_interdomain to a port that is bound", evtchn_bind_interdomain(DOMID_SELF, (u32)a), -EINVAL);
    check_eq("  close the second", evtchn_close((u32)b), 0);
    check_eq("  the first is unbound", status_of((u32)a).status, EVTCHNSTAT_unbound);
    check_eq("  and can be bound anew", evtchn_bind_interdomain(DOMID_SELF, (u32)a), b);
    check_eq("  close both", evtchn_close((u32)a) | evtchn_close((u32)b), 0);
    check_eq("  bind_interdomain to a closed port", evtchn_bind_interdomain(DOMID_SELF, (u32)a), -EINVAL);
    check_eq("  bind_interdomain to a port that was not meant for us", evtchn_bind_interdomain(0, 1), -EINVAL);
    check_eq("  bind_interdomain to a domain that does not exist", evtchn_bind_interdomain(999, 1), -ESRCH);
    check_eq("  bind_interdomain to a port beyond all", evtchn_bind_interdomain(DOMID_SELF, 0xffffffff), -EINVAL);
    check_eq("  send at a closed port", evtchn_send((u32)a), -EINVAL);
    check_eq("  send at port 0", evtchn_send(0), -EINVAL);
    check_eq("  send at a port beyond all", evtchn_send(100000), -EINVAL);
    events_quiet();
}

static void masks(void)
{
    volatile struct vcpu_info *vcpu = &shared_info->vcpu[0];
    u32 port = (u32)evtchn_bind_ipi(0);
    print("# the bits\n");
    events_quiet();
    evtchn_send(port);
    check_eq("  a masked port: pending", evtchn_pending(port), 1);
    check_eq("  but not selected", (long)vcpu->pending_selector, 0);
    check_eq("  and no upcall", vcpu->upcall_pending, 0);
    check_eq("  unmask by hypercall", evtchn_unmask_op(port), 0);
    check_eq("  clears the mask", evtchn_masked(port), 0);
    check_eq("  and selects the port", (long)vcpu->pending_selector, 1l << (port / 64));
    check_eq("  and asks for an upcall", vcpu->upcall_pending, 1);
    vcpu->pending_selector = 0;
    vcpu->upcall_pending = 0;
    evtchn_send(port);
    check_eq("  send at a pending port changes nothing", (long)vcpu->pending_selector | vcpu->upcall_pending, 0);
    evtchn_clear(port);
    evtchn_send(port);
    check_eq("  send at an unmasked port selects it", (long)vcpu->pending_selector, 1l << (port / 64));
    check_eq("  and asks for an upcall", vcpu->upcall_pending, 1);
    events_quiet();
    check_eq("  unmask of a port that is not pending", evtchn_unmask_op(port), 0);
    check_eq("  asks for nothing", vcpu->upcall_pending, 0);
    check_eq("  unmask of a port beyond all", evtchn_unmask_op(0xffffffff), -EINVAL);
    check_eq("  unmask of a closed port", evtchn_unmask_op(4000), -EINVAL);

    print("# upcalls\n");
    events_quiet();
    upcalls_install();
    upcall_count = upcall_ports = 0;
    evtchn_unmask(port);
    evtchn_send(port);
    check_eq("  none while the vCPU masks them", (long)upcall_count, 0);
    upcalls_enable();
    check_eq("  one when it no longer does", (long)upcall_count, 1);
    check_eq("  for our port", (long)upcall_ports, 1l << port);
    check_eq("  iret unmasked them again", vcpu->upcall_mask, 0);
    evtchn_send(port);
    check_eq("  one more at once", (long)upcall_count, 2);
    evtchn_mask(port);
    evtchn_send(port);
    check_eq("  none for a masked port", (long)upcall_count, 2);
    evtchn_unmask_op(port);
    check_eq("  one when it is unmasked by hypercall", (long)upcall_count, 3);
    vcpu->upcall_pending = 1;
    HYPERCALL(HC_xen_version, 0, 0);
    check_eq("  Xen looks at upcall_pending alone", (long)upcall_count, 4);
    /* A fault, too, is a way back into the guest on which a pending event is delivered. */
    upcalls_disable();
    evtchn_send(port);
    vcpu->upcall_mask = 0;
    TRY("ud2", : : : "memory");
    check_eq("  and after a trap", (long)upcall_count, 5);
    upcalls_disable();
    check_eq("close", evtchn_close(port), 0);
}

static void polling(void)
{
    u32 port = (u32)evtchn_bind_ipi(0), other = (u32)evtchn_bind_ipi(0), ports[2] = {other, port};
    struct {
        u32 *ports;
        u32 nr_ports;
        u64 timeout;
    } poll = {ports, 2, 0};
    u32 many[200];
    print("# polling\n");
    events_quiet();
    evtchn_send(port);
    check_eq("  a pending port ends the wait at once", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    check_eq("  and stays pending", evtchn_pending(port), 1);
    evtchn_clear(port);
    poll.timeout = 1;
    check_eq("  a time that has passed does too", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    ports[0] = 0xffffffff;
    check_eq("  a port beyond all", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), -EINVAL);
    poll.ports = (u32 *)WILD;
    check_eq("  a wild list", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), -EFAULT);
    poll.ports = many, poll.nr_ports = 129;
    check_eq("  more than 128 ports", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), -EINVAL);
    poll.nr_ports = 0;
    check_eq("  none, but a time", HYPERCALL(HC_sched_op, SCHEDOP_poll, &poll), 0);
    check_eq("  a wild argument", HYPERCALL(HC_sched_op, SCHEDOP_poll, WILD), -EFAULT);
    evtchn_close(port), evtchn_close(other);
}

static void other_operations(void)
{
    struct {
        u32 port, vcpu;
    } bind = {0, 0};
    struct {
        u32 pirq, flags, port;
    } bind_pirq = {9, 0, 0};
    struct {
        u16 dom;
    } reset = {DOMID_SELF};

    print("# bind_vcpu\n");
    bind.port = (u32)evtchn_alloc_unbound(DOMID_SELF, DOMID_SELF);
    check_eq("  of an unbound port", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), 0);
    bind.vcpu = 31;
    check_eq("  to a vCPU that does not exist", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), -ENOENT);
    evtchn_close(bind.port);
    bind.vcpu = 0;
    check_eq("  of a closed port", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), -EINVAL);
    bind.port = (u32)evtchn_bind_ipi(0);
    check_eq("  of an IPI", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), -EINVAL);
    evtchn_close(bind.port);
    bind.port = (u32)evtchn_bind_virq(VIRQ_TIMER, 0);
    check_eq("  of a VIRQ of one vCPU", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), -EINVAL);
    evtchn_close(bind.port);
    bind.port = 100000;
    check_eq("  of a port beyond all", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_vcpu, &bind), -EINVAL);

    print("# the rest\n");
    check_eq("  bind_pirq of an interrupt that is not ours", HYPERCALL(HC_event_channel_op, EVTCHNOP_bind_pirq, &bind_pirq), -EPERM);
    check_eq("  an unknown operation", HYPERCALL(HC_event_channel_op, 99, &bind), -ENOSYS);
    check_eq("  a wild argument", HYPERCALL(HC_event_channel_op, EVTCHNOP_send, WILD), -EFAULT);
    check_eq("  an argument in Xen's memory", HYPERCALL(HC_event_channel_op, EVTCHNOP_alloc_unbound, 0xffff830000000000), -EFAULT);
    reset.dom = 0;
    check_eq("  reset of another domain", HYPERCALL(HC_event_channel_op, EVTCHNOP_reset, &reset), -EPERM);

    /* The ABI has 4096 ports; the toolstack gives a domain 1024 of them unless told otherwise. */
    long port, greatest = 0, made = 0;
    while ((port = evtchn_bind_ipi(0)) >= 0) {
        made++;
        if (port > greatest)
            greatest = port;
    }
    check_eq("  the greatest port", greatest, greatest == 4095 ? 4095 : 1023);
    check_eq("  nearly all were free", made > 1000, 1);
    check_eq("  when there are no more ports", port, -ENOSPC);
    for (u32 p = 1; p <= greatest; p++)
        if (status_of(p).status == EVTCHNSTAT_ipi)
            evtchn_close(p);
    check_eq("  and when they are closed there are", evtchn_bind_ipi(0) > 0, 1);
    check_eq("  the console's port has survived all this", status_of(start_info->console_evtchn).status, EVTCHNSTAT_interdomain);
}

int main(void)
{
    traps_install();
    events_quiet();
    making_ports();
    loopback();
    masks();
    polling();
    other_operations();
    return 0;
}
