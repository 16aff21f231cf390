/* Event channels, 2-level ABI: one pending and one mask bit a port, in the shared-info page. */
#ifndef GUEST_EVENTS_H
#define GUEST_EVENTS_H

#include "guest.h"

long evtchn_alloc_unbound(u16 dom, u16 remote_dom); /* the port or a negative errno */
long evtchn_bind_interdomain(u16 remote_dom, u32 remote_port);
long evtchn_bind_virq(u32 virq, u32 vcpu);
long evtchn_bind_ipi(u32 vcpu);
long evtchn_close(u32 port);
long evtchn_send(u32 port);
long evtchn_unmask_op(u32 port);

#define VIRQ_TIMER 0
#define VIRQ_DEBUG 1
#define VIRQ_CONSOLE 2
#define VIRQ_DOM_EXC 3

static inline bool evtchn_pending(u32 port)
{
    return *(volatile u64 *)&shared_info->evtchn_pending[port / 64] >> (port % 64) & 1;
}
static inline bool evtchn_masked(u32 port)
{
    return *(volatile u64 *)&shared_info->evtchn_mask[port / 64] >> (port % 64) & 1;
}
/* Set or clear a bit as Xen sees it: atomically. */
static inline void evtchn_mask(u32 port)
{
    __asm__ volatile("lock btsq %1, %0" : "+m"(shared_info->evtchn_mask[port / 64]) : "r"((u64)port % 64) : "memory");
}
static inline void evtchn_unmask(u32 port)
{
    __asm__ volatile("lock btrq %1, %0" : "+m"(shared_info->evtchn_mask[port / 64]) : "r"((u64)port % 64) : "memory");
}
static inline void evtchn_clear(u32 port)
{
    __asm__ volatile("lock btrq %1, %0" : "+m"(shared_info->evtchn_pending[port / 64]) : "r"((u64)port % 64) : "memory");
}

void evtchn_wait(u32 port, u64 until); /* ns; 0: for ever. Until it is pending, which is taken */
void events_quiet(void); /* mask every port and forget what is pending */

/*
 * upcalls_install() registers the event callback; it collects pending ports (clearing them) into
 * upcall_count and upcall_ports, a bit for each of the first 64 ports.
 */
void upcalls_install(void);
extern volatile u64 upcall_count, upcall_ports;
void upcalls_enable(void); /* clear vCPU 0's mask and take what is pending */
void upcalls_disable(void);

#endif
